"""The executor of plans: one timm ViT block with some of its units left out.

A *unit* of a block with H heads is one attention head with its share of the MLP's hidden units, which are
dealt evenly and contiguously over the heads; a block that cannot be sliced so is one unit. A *row* holds one
`Op` per unit, or one for the whole block. Biases that are added once (of `proj` and `fc2`), norms and
LayerScale belong to no unit: they run where any unit runs, and train where any is FULL.

Only the weights of units that run are multiplied; nothing is masked. The ops are those of D2FT, arXiv
2504.12471.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from fedsplit.types import FedsplitError, Op

Runs = tuple[tuple[int, int], ...]  # stretches (start, length) of a dimension, ascending

# The linear layers of a branch: name, the dimension of the weight that is dealt to units, and the equal
# groups that it falls into first (query, key and value; value and gate).
_Layers = tuple[tuple[str, int, int], ...]
_ATTENTION: _Layers = (("qkv", 0, 3), ("proj", 1, 1))
_MLP: dict[type[nn.Module], _Layers] = {
    Mlp: (("fc1", 0, 1), ("fc2", 1, 1)),
    GluMlp: (("fc1", 0, 2), ("fc2", 1, 1)),
    SwiGLU: (("fc1_g", 0, 1), ("fc1_x", 0, 1), ("fc2", 1, 1)),
}

# On a CPU, products with so few columns, as those of adapters, run up to five times faster as their transpose.
_NARROW = 16


def units(block: nn.Module) -> int:
    """The number of units of `block`: its heads where it can be sliced, else 1.

    Sliced are timm's `Block` and `ResPostBlock` with plain attention and MLP and no norm over what is dealt
    to units; the linear layers may carry plain LoRA adapters of peft.
    """
    attn, mlp = cast(Any, getattr(block, "attn", None)), cast(Any, getattr(block, "mlp", None))
    if type(block) not in (Block, ResPostBlock) or type(attn) is not Attention or type(mlp) not in _MLP:
        return 1
    if getattr(attn, "gate", None) is not None or not all(type(m.norm) is nn.Identity for m in (attn, mlp)):
        return 1
    if not all(_can_slice(layer) for _, layer, _, _ in _layers(block)) or any(True for _ in mlp.act.parameters()):
        return 1
    return int(attn.num_heads) if mlp.fc2.in_features >= attn.num_heads else 1


def execute(block: nn.Module, x: Tensor, row: tuple[int, ...] | None = None, scale: float = 1.0) -> Tensor:
    """Run `block` on tokens `x` (B, N, C) as `row` says, to (B, N, C); None is all FULL.

    FULL units run and train. FORWARD units read detached input and add their detached output, without
    autograd. SKIP units do not run; with all of them skipped, `x` comes back as it is. The residual passes
    the gradient whatever the row. What the block adds to `x` is multiplied by `scale`. Dropout within
    attention, MLP and adapters is drawn for FULL and FORWARD units apart, on what runs.

    Raises:
        FedsplitError: the row fits neither the block's units nor the block as one.
    """
    row = (Op.FULL,) if row is None else row
    if len(row) != 1 and len(row) != units(block):
        raise FedsplitError(
            f"A plan gives {len(row)} ops to a block of {units(block)} units: give one for each unit, or one for all."
        )
    ops = set(row)
    if ops == {Op.SKIP}:
        return x
    trains = Op.FULL in ops
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        whole = getattr(block, "compiled", block.forward)  # past any hooks
        y = cast(Tensor, whole(x)) if len(ops) == 1 else _mixed(block, x, row)
        if trains and scale == 1:
            return y
        branch = y - x if scale == 1 else scale * (y - x)
    return x + branch


def idle(block: nn.Module, row: tuple[int, ...]) -> dict[str, tuple[int, Tensor]]:
    """By parameter name: a dimension, and the int64 positions on it, of entries of units that are not FULL.

    Their gradient is zero, not None, so an optimiser with momentum or weight decay would still move them.
    Empty where all units are FULL, and where none is: then no parameter gets a gradient.
    """
    off = tuple(unit for unit, op in enumerate(row) if op != Op.FULL)
    if not off or len(off) == len(row):
        return {}
    cpu = torch.device("cpu")
    return {
        name: (dim, _index(runs_of(off, len(row), parameter.shape[dim], groups), cpu).clone())
        for name, (parameter, dim, groups) in dealt(block).items()
    }


def _mixed(block: Any, x: Tensor, row: tuple[int, ...]) -> Tensor:
    """The block with only the units that run: its own forward, step for step."""
    if type(block) is ResPostBlock:
        x = x + block.drop_path1(block.norm1(_branch(block.attn, _attention, x, row)))
        return cast(Tensor, x + block.drop_path2(block.norm2(_branch(block.mlp, _mlp, x, row))))
    x = x + block.drop_path1(block.ls1(_branch(block.attn, _attention, block.norm1(x), row)))
    return cast(Tensor, x + block.drop_path2(block.ls2(_branch(block.mlp, _mlp, block.norm2(x), row))))


def _branch(
    module: Any, run: Callable[[Any, Tensor, tuple[int, ...], int, bool], Tensor], x: Tensor, row: tuple[int, ...]
) -> Tensor:
    """Attention or MLP: FULL units with autograd, FORWARD units without, and what is applied to their sum."""
    full, forward = (tuple(unit for unit, op in enumerate(row) if op == which) for which in (Op.FULL, Op.FORWARD))
    last = module.proj_drop if run is _attention else module.drop2
    parts = [run(module, x, full, len(row), True)] if full else []
    if forward:
        with torch.no_grad():
            parts.append(run(module, x.detach(), forward, len(row), not full))
    return cast(Tensor, last(parts[0] + parts[1] if len(parts) == 2 else parts[0]))


def _attention(attn: Any, x: Tensor, which: tuple[int, ...], count: int, bias: bool) -> Tensor:
    """The heads `which` of `count`, up to the output projection; timm's `Attention.forward` on fewer heads."""
    batch, tokens, _ = x.shape
    qkv = _linear(attn.qkv, x, runs_of(which, count, 3 * count * attn.head_dim, 3), 0)
    q, k, v = qkv.reshape(batch, tokens, 3, len(which), attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        out = attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    out = out.transpose(1, 2).reshape(batch, tokens, len(which) * attn.head_dim)
    return _linear(attn.proj, out, runs_of(which, count, count * attn.head_dim, 1), 1, bias)


def _mlp(mlp: Any, x: Tensor, which: tuple[int, ...], count: int, bias: bool) -> Tensor:
    """The hidden units of the units `which` of `count`; timm's forward on fewer of them."""
    hidden = mlp.fc2.in_features
    runs = runs_of(which, count, hidden, 1)
    if type(mlp) is Mlp:
        h = mlp.act(_linear(mlp.fc1, x, runs, 0))
    elif type(mlp) is GluMlp:
        one, two = _linear(mlp.fc1, x, runs_of(which, count, 2 * hidden, 2), 0).chunk(2, dim=-1)
        h = one * mlp.act(two) if mlp.gate_last else mlp.act(one) * two
    else:
        h = mlp.act(_linear(mlp.fc1_g, x, runs, 0)) * _linear(mlp.fc1_x, x, runs, 0)
    return _linear(mlp.fc2, mlp.drop1(h), runs, 1, bias)


def _linear(layer: Any, x: Tensor, runs: Runs, dim: int, bias: bool = True) -> Tensor:
    """A linear layer, with its adapters if any, cut to `runs` of its outputs (`dim` 0) or inputs (1)."""
    base = getattr(layer, "base_layer", layer)
    y = _sliced(x, base.weight, base.bias if bias else None, runs, dim)
    if base is layer or layer.disable_adapters:
        return y
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            of_a, of_b = (((0, len(a)),), runs) if dim == 0 else (runs, ((0, len(b)),))
            h = _sliced(layer.lora_dropout[name](x.to(a.dtype)), a, None, of_a, dim)
            y = (y + _sliced(h * layer.scaling[name], b, None, of_b, 0)).to(y.dtype)
    return y


def _sliced(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, dim: int) -> Tensor:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    return cast(Tensor, _Sliced.apply(x, weight, bias, runs, dim))  # type: ignore[no-untyped-call]


class _Sliced(torch.autograd.Function):
    """`F.linear` with part of a weight: without it, autograd keeps a copy of that part for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, dim: int) -> Tensor:
        """(..., in) to (..., out), as `_linear`."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.runs, ctx.dim = runs, dim
        ctx.size, ctx.dtype = weight.shape[dim], weight.dtype
        part = _take(weight, runs, dim).to(x.dtype)
        if bias is None:
            return _product(x, part)
        return F.linear(x, part, (bias if dim == 1 else _take(bias, runs, 0)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight and bias; those of the weight's other entries are zero."""
        g, (x, weight), of_weight, of_bias = gradients[0], ctx.saved_tensors, None, None
        of_x = None if weight is None else _product(g, _take(weight, ctx.runs, ctx.dim).to(g.dtype).t())
        rows = g.flatten(0, -2)
        if x is not None:
            of_weight = _put(_product(rows.t(), x.flatten(0, -2).t()), ctx.size, ctx.runs, ctx.dim).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.dtype)
            of_bias = of_bias if ctx.dim == 1 else _put(of_bias, ctx.size, ctx.runs, 0)
        return of_x, of_weight, of_bias, None, None


def _product(x: Tensor, w: Tensor) -> Tensor:
    """`F.linear(x, w)`, (..., in) by (out, in)."""
    if w.shape[0] > _NARROW:
        return x @ w.t()
    return cast(Tensor, (w @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1]))


def _take(x: Tensor, runs: Runs, dim: int) -> Tensor:
    if len(runs) == 1:
        return x.narrow(dim, *runs[0])
    if dim == 0:
        return x.index_select(0, _index(runs, x.device))
    return torch.cat([x.narrow(dim, *run) for run in runs], dim)  # faster than an index on this dimension


def _put(x: Tensor, size: int, runs: Runs, dim: int) -> Tensor:
    """Zeros with `size` entries on `dim`, and `x` at `runs`."""
    if x.shape[dim] == size:
        return x
    shape = [*x.shape]
    shape[dim] = size
    out = x.new_zeros(shape)
    if len(runs) > 1 and dim == 0:
        return out.index_add_(0, _index(runs, x.device), x)
    for (start, length), part in zip(runs, x.split([length for _, length in runs], dim), strict=True):
        out.narrow(dim, start, length).copy_(part)
    return out


@lru_cache(maxsize=4096)
def runs_of(which: tuple[int, ...], count: int, size: int, groups: int) -> Runs:
    """Where the units `which` of `count` lie on a dimension of `size` in `groups`; neighbours are one run."""
    share, more = divmod(size // groups, count)  # the first `more` units have one entry more
    runs: list[tuple[int, int]] = []
    for group in range(groups):
        for unit in which:
            start = group * (size // groups) + unit * share + min(unit, more)
            length = share + (unit < more)
            if runs and sum(runs[-1]) == start:
                start, length = runs[-1][0], runs.pop()[1] + length
            runs.append((start, length))
    return tuple(runs)


@lru_cache(maxsize=4096)
def _index(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in runs])


def _layers(block: Any) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Name, module, dealt dimension and groups of every linear layer of a block that may be sliced."""
    for branch, layers in (("attn", _ATTENTION), ("mlp", _MLP[type(block.mlp)])):
        for name, dim, groups in layers:
            yield f"{branch}.{name}", getattr(getattr(block, branch), name), dim, groups


def _can_slice(layer: Any) -> bool:
    if type(layer) is nn.Linear:
        return True
    if (type(layer).__module__, type(layer).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    plain = not layer.merged and not layer.lora_variant and not layer.fan_in_fan_out
    adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
    plain = plain and all(type(adapter) is nn.Linear and adapter.bias is None for adapter in adapters)
    return plain and type(layer.base_layer) is nn.Linear


def dealt(block: nn.Module) -> dict[str, tuple[nn.Parameter, int, int]]:
    """By name: the parameters of a block whose entries belong to units, their dealt dimension and its groups."""
    dealt = {}
    for path, layer, dim, groups in _layers(block):
        shared = "lora_A" if dim == 0 else "lora_B"
        for name, parameter in layer.named_parameters():
            if not name.startswith(shared) and not (dim == 1 and parameter.ndim == 1):
                dealt[f"{path}.{name}"] = (parameter, dim, groups)
    return dealt
