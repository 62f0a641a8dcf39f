"""fedsplit: federated split fine-tuning of vision transformers.

    client                            |  server
    data ─► front ──activations──►    |  body      (plan: one op per micro-batch, block and unit)
            tail  ◄──activations──    |
            loss                      |
            tail  ──gradients────►    |  body
            front ◄──gradients────    |
    front, tail ──update──► share     |  share ──model──► front, tail

The folder listing is the data path, a method is a small piece at one place of that path, and a
paper is a config that composes pieces. Read `step.py` first, then `round.py`, then a file of
`configs/`.
"""

from fedsplit import compat

compat.mend_torchvision()

__version__ = "0.1.0"
