"""Memory of one side of the split, measured while it runs.

Process-wide figures (resident memory, the CUDA allocator) cannot tell client from server when both
run in one process; the tensors that each side keeps for its backward pass can.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class Meter:
    """Bytes that autograd keeps for the forward code inside, each storage once, summed over uses.

    Parameters passed to `ignore` are not counted: they are weights. What the next step keeps is not kept
    beside it: `turn` between steps, and of all the largest counts; or `close` after one, if all are alike,
    since the hooks cost time.
    """

    def __init__(self) -> None:
        self._open = True
        self._most = 0
        self._ignored: set[int] = set()
        self._seen: dict[int, int] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    @property
    def saved_bytes(self) -> int:
        """What was kept, in bytes; of several steps the most."""
        return max(self._most, sum(self._seen.values()))

    def ignore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do not count these tensors."""
        self._ignored |= {_address(parameter) for parameter in parameters}

    def turn(self) -> None:
        """The next step begins."""
        self._most = self.saved_bytes
        self._seen.clear()

    def close(self) -> None:
        """Measure no more."""
        self._open = False

    def __enter__(self) -> Meter:
        if self._open:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
            self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(kind, value, trace)
            self._hooks = None

    def _pack(self, tensor: Tensor) -> Tensor:
        if _address(tensor) not in self._ignored:
            self._seen[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _address(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # on the meta device there is no data, but a storage for each


def weight_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the weights, plus those of the gradients of the ones that train."""
    return sum(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in parameters)
