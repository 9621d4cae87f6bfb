"""A transformers model's norms, gated MLPs and rotary embeddings in native kernels, one pass each where eager torch
takes five to ten, and its linear layers' products by `ops.products`.

`CompiledLayers` looks for modules of the usual forms (RMSNorm, Llama's MLP, rotary embeddings of halves) and gives each
a compiled forward if that returns the same numbers on a random input. Everything else uses the old forward: other
dtypes than float32 (except for products), other devices, autocast, weights sharded by FSDP. Less is kept for the
backward pass: a norm keeps its input and one number per token; an MLP recomputes its gate's activation and the product
of its halves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import backend
from fastalign.backend import threads
from fastalign.models import linear_layers
from fastalign.ops import products
from fastalign.ops.buffers import buffer, rows
from fastalign.ops.once import once_differentiable

MLP = ("gate_proj", "up_proj", "down_proj")
ROTATION = "apply_rotary_pos_emb"  # has this name in every model of transformers


class CompiledLayers:
    """Within `with CompiledLayers.of(model):` the model's forward passes run their small operations in native kernels.

    Outside the block the model is unchanged. Gradients are correct wherever backward is called. Models with gradient
    checkpointing run unchanged, because their second forward pass would not find what the first one kept.
    """

    @classmethod
    def of(cls, model: nn.Module) -> CompiledLayers:
        if model not in _known:
            _known[model] = cls(model)
        return _known[model]

    def __init__(self, model: nn.Module):
        self._model: Callable[[], Any] = weakref.ref(model)  # it lives wherever the block is entered
        self._forwards: list[tuple[nn.Module, Callable]] = []
        self._rotations: list[tuple[types.ModuleType, Callable, Callable]] = []  # the model's, then ours
        self._linears: list[nn.Module] = [m for m in model.modules() if type(m) is nn.Linear]
        self._undo = contextlib.ExitStack()
        if backend.native is None:
            return
        tried: dict[tuple, Callable | None] = {}  # modules of one class and shape are tried once
        for module in model.modules():
            candidates = _norm_forwards if _is_norm(module) else _mlp_forwards if _is_mlp(module) else None
            if candidates is None:
                continue
            kind = (type(module), _settings(module), *(p.shape for p in module.parameters()))
            if kind not in tried:
                tried[kind] = next((f for f in candidates(type(module).forward) if _agrees(module, f)), None)
            if (forward := tried[kind]) is not None:
                self._forwards.append((module, types.MethodType(forward, module)))
        for place in {sys.modules[type(m).__module__] for m in model.modules() if hasattr(m, "q_proj")}:
            original = getattr(place, ROTATION, None)
            if original is not None and _rotates_halves(original):
                self._rotations.append((place, original, _rotation(original)))

    def __len__(self) -> int:
        """How many modules have a compiled forward."""
        return len(self._forwards)

    def __enter__(self) -> CompiledLayers:
        model = self._model()
        checkpointed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if checkpointed or backend.choose(torch.device("cpu")) != "cpu":
            return self
        for module, forward in [*self._forwards, *linear_layers.forwards(self._linears)]:
            if "forward" not in vars(module):  # replaced by someone else since: it stays
                vars(module)["forward"] = forward
                self._undo.callback(vars(module).pop, "forward", None)
        for place, original, compiled in self._rotations:
            setattr(place, ROTATION, compiled)
            self._undo.callback(setattr, place, ROTATION, original)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.pop_all().close()


_known: weakref.WeakKeyDictionary[nn.Module, CompiledLayers] = weakref.WeakKeyDictionary()


# ---- which modules have a compiled form, tested on random inputs ----


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "RMSNorm" in type(module).__name__ and eps_of(module) is not None and weight is not None and weight.ndim == 1


def _is_mlp(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in MLP) and hasattr(module, "act_fn")


def eps_of(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _settings(module: nn.Module) -> str:
    """The module's plain attributes: of two modules of a class, one may scale and the other not."""
    kept = {
        k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, type(None))) and k != "training"
    }
    kept.pop("layer_idx", None)
    return (
        f"{kept} {type(getattr(module, 'act_fn', None))} {getattr(getattr(module, 'act_fn', None), '__dict__', None)}"
    )


def _norm_forwards(original: Callable) -> Iterator[Callable]:
    for offset in (0.0, 1.0):  # Gemma's weight is the deviation from one
        yield _norm_forward(original, offset)


def _norm_forward(original: Callable, offset: float) -> Callable:
    def forward(self, hidden_states, *args, **kwargs):
        if args or kwargs or not runs_natively(hidden_states, self.weight):
            return original(self, hidden_states, *args, **kwargs)
        y = _RMSNorm.apply(hidden_states, self.weight, eps_of(self), offset)
        if y.requires_grad:
            y.fastalign_norm = (hidden_states.detach(), self.weight.detach(), eps_of(self), offset)  # to recompute it
        return y

    return forward


def _mlp_forwards(original: Callable) -> Iterator[Callable]:
    def forward(self, x, *args, **kwargs):
        if args or kwargs or not runs_natively(x):
            return original(self, x, *args, **kwargs)
        gate, up, down = layers = [getattr(self, name) for name in MLP]
        if all(map(_plain, layers)) and runs_natively(*(layer.weight for layer in layers)):
            return _GatedMLP.apply(x, *(layer.weight for layer in layers))
        g, u = gate(x), up(x)  # respects adapters and hooks
        return down(_SiluGate.apply(g, u) if runs_natively(g, u) and g.shape == u.shape else self.act_fn(g) * u)

    yield forward


@torch.no_grad()
def _agrees(module: nn.Module, forward: Callable) -> bool:
    """Whether `forward` equals the module on random inputs, also tiny and large ones, up to float32's rounding."""
    parameters = list(module.parameters())
    if not parameters or any(
        p.device.type != "cpu" or type(p) is not nn.Parameter or p.dtype != torch.float32 for p in parameters
    ):
        return False
    width = parameters[0].shape[-1]
    scales = torch.tensor([1.0, 1e-3, 30.0, 1.0])[:, None]
    x = (scales * torch.randn(4, width, generator=torch.Generator().manual_seed(0))).view(2, 2, width)
    try:
        with torch.autocast("cpu", enabled=False):
            expected = type(module).forward(module, x)
            result = forward(module, x)
    except Exception:  # takes more than one tensor: no compiled form
        return False
    return agree(expected, result)


def agree(expected: object, result: Tensor) -> bool:
    """Whether both are the same up to float32's rounding."""
    if not isinstance(expected, Tensor) or expected.shape != result.shape:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((result - expected).abs() <= 1e-4 * expected.abs() + 1e-5 * size).all())


def runs_natively(*tensors: Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> bool:
    return not torch.is_autocast_enabled("cpu") and all(
        type(x) in (Tensor, nn.Parameter) and x.dtype in dtypes and x.device.type == "cpu" for x in tensors
    )


def _plain(layer: nn.Module) -> bool:
    """A linear layer without hooks: its product may be computed without calling it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    own = "forward" in vars(layer) and not linear_layers.replaces(layer)
    return type(layer) is nn.Linear and layer.bias is None and not hooks and not own


@functools.lru_cache
@torch.no_grad()
def _rotates_halves(original: Callable) -> bool:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=draw), torch.randn(1, 1, 3, 8, generator=draw)
    cos, sin = torch.randn(2, 1, 3, 8, generator=draw).unbind()
    try:
        expected = original(q, k, cos, sin)
    except Exception:  # another signature: another rotation
        return False
    rotated = (_Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(rotated, expected, strict=True))


def _rotation(original: Callable) -> Callable:
    def rotate(q, k, cos, sin, *args, **kwargs):
        batch, _, length, d = q.shape
        same = cos.shape == sin.shape == (batch, length, d) and k.shape[2:] == q.shape[2:]
        if args or kwargs or not same or cos.requires_grad or not runs_natively(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)

    return rotate


# ---- the passes ----


class _RMSNorm(torch.autograd.Function):
    """(offset + weight) x / sqrt(mean(x²) + eps) over the last dimension (Zhang, Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        dy, width, count = dy.contiguous(), x.shape[-1], threads()
        dx = torch.empty_like(x)
        shares = x.new_empty(count, width) if ctx.needs_input_grad[1] else None
        backend.native.rms_norm_backward(
            buffer(dx), buffer(shares), buffer(dy), buffer(x), buffer(rstd), buffer(weight), len(rstd), width,
            ctx.offset, count,
        )  # fmt: skip
        return dx, None if shares is None else shares.sum(0), None, None


def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y of x's shape, 1 / sqrt(mean(x²) + eps) of each row)."""
    width = x.shape[-1]
    rows = x.numel() // width
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    backend.native.rms_norm(buffer(y), buffer(rstd), buffer(x), buffer(weight), rows, width, eps, offset, threads())
    return y, rstd


def gated(g: Tensor, u: Tensor) -> Tensor:
    out = g.new_empty(g.shape)
    (gate, _g), (up, _u) = rows(g), rows(u)  # and what they point into
    backend.native.silu_gate(buffer(out), gate, up, threads())
    return out


def _gate_backward(dh: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(dg, du); dh is overwritten with the gate's output."""
    dg, du = torch.empty_like(g), torch.empty_like(u)
    backend.native.silu_gate_backward(buffer(dg), buffer(du), buffer(dh), buffer(g), buffer(u), g.numel(), threads())
    return dg, du


class _SiluGate(torch.autograd.Function):
    """silu(g) u (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, g: Tensor, u: Tensor) -> Tensor:
        g, u = g.contiguous(), u.contiguous()
        ctx.save_for_backward(g, u)
        return gated(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor):
        return _gate_backward(dh.clone(memory_format=torch.contiguous_format), *ctx.saved_tensors)


class _GatedMLP(torch.autograd.Function):
    """(silu(x Wgᵀ) ∘ x Wuᵀ) Wdᵀ, which keeps x (or the input of the norm before it) and the first two products."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        g, u = products.linear(rows, gate), products.linear(rows, up)
        source, weight, *ctx.norm = getattr(x, "fastalign_norm", (rows, None))
        ctx.save_for_backward(source, weight, g, u, gate, up, down)
        return products.linear(gated(g, u), down).view(*x.shape[:-1], len(down))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        source, weight, g, u, gate, up, down = ctx.saved_tensors
        x_shape, dy = (*dy.shape[:-1], gate.shape[1]), dy.reshape(-1, dy.shape[-1])
        h = products.grad_input(dy, down)
        dg, du = _gate_backward(h, g, u)
        dx, *weights = ctx.needs_input_grad
        if any(weights[:2]):
            x = source if weight is None else normed(source.contiguous(), weight.contiguous(), *ctx.norm)[0]
            rows = x.reshape(-1, x.shape[-1])
        return (
            products.grad_input(dg, gate).add_(products.grad_input(du, up)).view(x_shape) if dx else None,
            products.grad_weight(dg, rows) if weights[0] else None,
            products.grad_weight(du, rows) if weights[1] else None,
            products.grad_weight(dy, h) if weights[2] else None,
        )


class _Rotate(torch.autograd.Function):
    """x cos + (−x₂, x₁) sin for heads (B, heads, L, d) of halves (x₁, x₂) (Su et al. 2021, arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotated(dy, cos, sin, inverse=True), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x and the result (B, heads, L, d)."""
    batch, heads, length, d = x.shape
    out = x.new_empty(batch, length, heads, d)
    halves, _x = rows(x.transpose(1, 2))  # and what they point into
    backend.native.rotate(buffer(out), halves, buffer(cos), buffer(sin), batch * length, heads, inverse, threads())
    return out.transpose(1, 2)
