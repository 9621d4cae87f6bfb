"""Decoder layers of Llama's form in a decoding step. On a CPU each is about ten calls: queries, keys and values are one
product, the gated MLP's halves another, with weights packed once. On a GPU each is 13 launches, on the model's weights;
there layers of Gemma's forms are taken too, 13 to 16 launches.

A layer is taken only where that gives what its own forward gives; any other keeps its forward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign import backend
from fastalign._base.devices import free_memory
from fastalign._base.whole_sums import whole_sums
from fastalign.decode.plan import planned
from fastalign.models.compiled_layers import agree, eps_of, gated, normed, rotated
from fastalign.models.linear_layers import PackedLayers, is_changed, is_plain, room
from fastalign.ops import layer_passes, products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the passes
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QKV, _OUT = tuple(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.o_proj"
_HALVES, _DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
_LINEARS = (*_QKV, _OUT, *_HALVES, _DOWN)
# Taken on a GPU alone: Qwen3's norms of heads, and Gemma 2's of what attention and MLP give, `post_attention_layernorm`
# and the second of these.
_HEAD_NORMS = "self_attn.q_norm", "self_attn.k_norm"
_MORE_NORMS = "pre_feedforward_layernorm", "post_feedforward_layernorm"


class StepLayers:
    """Within `with`, the model runs steps of one token for each of about `rows` rows, with a `plan` for its attention.

    Packed copies of the weights are made where that is faster and they take no more than a quarter of the available
    memory and `spare` bytes. head: the packed weight (V, H) of the output embeddings, or None. whole: whether all of
    the model's attention is in the layers that are taken.
    """

    head: Tensor | None
    whole: bool

    def __init__(self, model: PreTrainedModel, head: Tensor, rows: int, spare: int | None = None):
        with planned(model):
            taken = {m: found for m in model.modules() if (found := _of_layer(m)) is not None}
        inside = {m for layer in taken for m in layer.modules()}
        linears = [m for m in model.modules() if is_plain(m) and m.weight is not head]
        size = sum(m.weight.nbytes for m in linears) + head.nbytes
        if size > room(free_memory(), spare) or backend.choose(head.device) == "triton":
            rows = 1  # nothing is packed
        self.head = products.pack(head, rows)
        self._layers = [(layer, _form(layer, found, rows)) for layer, found in taken.items()]
        self.whole = len(taken) == model.config.get_text_config().num_hidden_layers
        self._others = PackedLayers([m for m in linears if m not in inside], rows)

    def __enter__(self) -> StepLayers:
        self._others.__enter__()
        for layer, forward in self._layers:
            vars(layer)["forward"] = forward
        return self

    def __exit__(self, *error: object) -> None:
        for layer, _ in self._layers:
            vars(layer).pop("forward", None)
        self._others.__exit__(*error)


class _Attention(NamedTuple):
    """What a layer's own forward hands to its attention, beside queries, keys and values."""

    layer: int
    scaling: float
    window: int | None
    softcap: float | None


class _Kind(NamedTuple):
    """How a layer computes its norms and the gate of its MLP."""

    offset: float = 0.0  # of the norms' weights
    gelu: bool = False


class _Taken(NamedTuple):
    attention: _Attention
    kind: _Kind


class _Products:
    """x Wᵀ + b of several linear layers on the same x, as one product if the weights are packed."""

    def __init__(self, layer: Any, names: Sequence[str], rows: int):
        self._linears = [layer.get_submodule(name) for name in names]
        weights, biases = ([getattr(m, name) for m in self._linears] for name in ("weight", "bias"))
        together = len({bias is None for bias in biases}) == 1 and products.packs(weights[0], rows)
        self._packed = products.pack(torch.cat(weights), rows) if together else None
        self._bias = torch.cat(biases) if self._packed is not None and biases[0] is not None else None
        self._sizes = [len(weight) for weight in weights]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self._packed is None:
            return [products.linear(x, m.weight, m.bias) for m in self._linears]
        return products.packed_linear(x, self._packed, self._bias).split_with_sizes(self._sizes, -1)

    def onto(self, total: Tensor, x: Tensor) -> Tensor:
        """total + x Wᵀ + b of the one layer, in place."""
        (linear,) = self._linears
        if linear.bias is None:
            return total.addmm_(x, linear.weight.t())
        return total.add_(products.linear(x, linear.weight, linear.bias))


class _Layer:
    """The forward of one layer."""

    def __init__(self, layer: Any, taken: _Taken, rows: int):
        self._attention, self._width = taken.attention, layer.self_attn.head_dim
        self._norms = [layer.get_submodule(name) for name in _NORMS]
        self._qkv, self._halves = (_Products(layer, names, rows) for names in (_QKV, _HALVES))
        self._out, self._down = (_Products(layer, [name], rows) for name in (_OUT, _DOWN))

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], plan: Any, **kwargs: object
    ) -> Tensor:
        x = hidden_states.flatten(0, 1)
        before, behind = self._norms
        cos, sin = (y.contiguous() for y in position_embeddings)
        q, k, v = (y.unflatten(-1, (1, -1, self._width)).transpose(1, 2) for y in self._qkv(_norm(before, x)))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        layer, *settings = self._attention
        (out,) = self._out(plan.attend(layer, q, k, v, *settings).flatten(1))
        x = out.add_(x)
        (out,) = self._down(gated(*self._halves(_norm(behind, x))))
        return out.add_(x).view_as(hidden_states)


def _norm(module: Any, x: Tensor) -> Tensor:
    return normed(x, *_of_norm(module), 0.0)[0]


def _of_norm(module: Any) -> tuple[Tensor, float]:
    eps: Any = eps_of(module)  # a number: the layer has been tried
    return module.weight, eps


class _LaunchedLayer(_Layer):
    """The same on a GPU: norms of heads, rotary embeddings and the cache's new tokens are one launch of the plan's."""

    def __init__(self, layer: Any, taken: _Taken, rows: int):
        super().__init__(layer, taken, rows)
        parts, self._kind = dict(layer.named_modules()), taken.kind
        self._heads = [_of_norm(parts[name]) if name in parts else (None, 0.0) for name in _HEAD_NORMS]
        self._more = [parts[name] for name in _MORE_NORMS if name in parts]

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], plan: Any, **kwargs: object
    ) -> Tensor:
        x = hidden_states.flatten(0, 1)
        before, behind = self._norms
        cos, sin = (y.flatten(0, 1) for y in position_embeddings)
        turn = layer_passes.Turn(cos, sin, self._heads, self._kind.offset)
        q, k, v = (y.unflatten(-1, (-1, 1, self._width)) for y in self._qkv(self._norm(before, x)))
        layer, *settings = self._attention
        (out,) = self._out(plan.attend(layer, q, k, v, *settings, turn=turn).flatten(1))
        if self._more:
            out, behind = self._norm(behind, out), self._more[0]
        y, x = layer_passes.add_norm(out, x, *_of_norm(behind), self._kind.offset)
        g, u = self._halves(y)
        y = layer_passes.gate(g, u, self._kind.gelu)
        if self._more:
            (out,) = self._down(y)
            return x.add_(self._norm(self._more[1], out)).view_as(hidden_states)
        return self._down.onto(x, y).view_as(hidden_states)

    def _norm(self, module: Any, x: Tensor) -> Tensor:
        return layer_passes.norm(x, *_of_norm(module), self._kind.offset)


def _form(layer: Any, taken: _Taken, rows: int) -> _Layer:
    return (_LaunchedLayer if _backend_of(layer) == "triton" else _Layer)(layer, taken, rows)


# ---- which layers, and whether theirs is what is done here ----

_KINDS = (_Kind(), _Kind(offset=1.0, gelu=True))  # Llama's, Gemma's; on a GPU

# Of a layer, with the forwards of its parts when it was tried
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], _Taken | None]] = weakref.WeakKeyDictionary()


def _of_layer(layer: nn.Module) -> _Taken | None:
    """Of a layer that may be taken; None for any other."""
    parts = dict(layer.named_modules())
    if not {*_NORMS, *_LINEARS} <= parts.keys():
        return None
    parameters = {name: p for name, p in layer.named_parameters() if not name.endswith("bias")}
    known = [{f"{name}.weight" for name in (*_NORMS, *_LINEARS)}]
    if _backend_of(layer) == "triton":
        for more in (_HEAD_NORMS, _MORE_NORMS):
            known += [names | {f"{name}.weight" for name in more} for names in known]
    if (
        parameters.keys() not in known
        or not all(is_plain(parts[name]) for name in _LINEARS)
        or any(map(is_changed, parts.values()))
        or not _runs(*layer.parameters())
        or len({(p.dtype, p.device) for p in layer.parameters()}) > 1
        # What is multiplied by 0 is not seen in a trial.
        or not all(p.is_meta or p.ravel()[:1].any() or p.any() for p in parameters.values())
    ):
        return None
    forwards: list[Any] = [_backend_of(layer), *(type(part).forward for part in parts.values())]
    if layer not in _seen or _seen[layer][0] != forwards:
        kinds = _KINDS if _backend_of(layer) == "triton" else _KINDS[:1]
        _seen[layer] = forwards, _try(layer, kinds)
    return _seen[layer][1]


def _runs(*parameters: Tensor) -> bool:
    """Whether the backend in force has the passes for them."""
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return False
    chosen = {backend.choose(p.device) for p in parameters}
    return chosen in ({"cpu"}, {"triton"}) and all(type(p) is nn.Parameter and p.dtype in DTYPES for p in parameters)


def _backend_of(layer: Any) -> str:
    return backend.choose(next(layer.parameters()).device)


class _Recorded:
    """In place of attention: a function of all that is handed to it, which it keeps."""

    calls: list[_Attention]

    def __init__(self) -> None:
        self.calls = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *settings: Any, turn: Any = None) -> Tensor:
        self.calls.append(_Attention(layer, *settings))
        if turn is not None:
            keys, values = torch.empty_like(k), torch.empty_like(v)
            first = torch.zeros(len(k), dtype=torch.int64, device=k.device)
            q = layer_passes.rotate(q[:, :, 0], k[:, :, 0], v[:, :, 0], turn, keys, values, first).unsqueeze(2)
            k, v = keys, values
        return 0.5 * q + (k - 2 * v).repeat_interleave(q.shape[1] // k.shape[1], 1)


@torch.inference_mode()
def _try(layer: Any, kinds: Sequence[_Kind]) -> _Taken | None:
    parameters = list(layer.parameters())
    device = torch.device("cpu") if parameters[0].is_meta else parameters[0].device
    draw = torch.Generator().manual_seed(0)
    theirs = _Recorded()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32).to(device)

    try:
        if parameters[0].dtype != torch.float32:  # in which the rounding hides nothing
            layer = copy.deepcopy(layer).float()
        if parameters[0].is_meta:  # there is only its form
            layer = copy.deepcopy(layer).to_empty(device=device)
            for p in layer.parameters():
                p.copy_(normal(*p.shape) * p.shape[-1] ** -0.5)
        width, d = layer.self_attn.q_proj.in_features, layer.self_attn.head_dim
        arguments: dict[str, Any] = {"position_embeddings": (normal(3, 1, d), normal(3, 1, d)), "attention_mask": None}
        sizes = torch.tensor([1.0, 1e-3, 30.0], device=device)  # which norms may treat differently
        x = normal(3, 1, width) * sizes[:, None, None]
        with whole_sums():
            expected = type(layer).forward(layer, x, plan=theirs, **arguments)
            (attention,) = theirs.calls
            for taken in (_Taken(attention, kind) for kind in kinds):
                if agree(expected, _form(layer, taken, 1)(x, plan=_Recorded(), **arguments)):
                    return taken
    except Exception:  # another signature or shape: not this form
        pass
    return None
