"""Harden a front offline against inversion, and make it cheaper: PATROL, arXiv 2307.10981.

The whole model trains in one place on images that are public, or stand in for the clients': first with soft masks
on the structures of the front's blocks and the front's penalties in the loss, then, without the structures that the
masks gave up, with the penalties alone. What comes out is a checkpoint for `model.checkpoint` of any run.

Read `train` first, the phases and the folder that they leave, then `training`, one step of them. `recipe` checks the
keys, `checkpoint` is how it survives a kill, `card` says what was made. Keys that only a run with clients has
(`train`, `body.*`, `wire.*`, `share.*`, `local.*`, `data.partition`, ...) are not read.
"""

from fedsplit.config import load
from fedsplit.harden.train import run

__all__ = ["load", "run"]
