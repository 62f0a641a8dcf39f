"""Train our own small vision transformers from scratch, since no model hub can be assumed.

Read `train` first, the loop and the folder that it leaves, then `training`, one step of it. `recipe`
holds the keys, `views` what an image goes through, `checkpoint` how a run survives a kill, `probe`
the figures of a finished backbone, `card` the text that goes with it.
"""

from fedsplit.pretrain.recipe import SHAPES, Pretrain, load
from fedsplit.pretrain.train import run

__all__ = ["SHAPES", "Pretrain", "load", "run"]
