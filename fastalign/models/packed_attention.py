"""Attention within packed rows (`models.packing`), as transformers calls it.

On a GPU all segments of a row are one call of FlashAttention for sequences of many lengths, by torch. Elsewhere, and
for what that cannot do (float32, a softcap, dropout, odd heads), there is one call a segment.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops.head import as_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastalign.models.packing import OneCall, Pack


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, L, d), key, value (1, kv heads, L, d) -> (1, L, heads, d)."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UserError("attention sinks and position biases cannot run packed")
    if pack is None:
        if softcap is not None:
            return _capped(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    pack.calls += 1
    query, key, value = as_autocast(query.device, query, key, value)
    if softcap is None and not dropout and _fits(query):
        return _together(query, key, value, pack.one_call, scaling, sliding_window)[None], None
    dtype = query.dtype
    if query.device.type == "cpu" and dtype.itemsize < 4 and torch.is_grad_enabled() and query.requires_grad:
        query, key, value = query.float(), key.float(), value.float()  # torch's gradient is 2 to 4 times as fast there
    # Split, not sliced: the gradient of a slice would be a whole row, zero outside the segment.
    lengths = [segment.end - segment.start for segment in pack.segments]
    pieces = {
        s.start: qkv for s, *qkv in zip(pack.segments, *(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    }
    outputs = []
    for segment in pack.segments:
        q, k, v = pieces[segment.start]
        shared = segment.prefix_end - segment.prefix_start
        if shared:
            _, *first = pieces[segment.prefix_start]
            k, v = (torch.cat((x[:, :, :shared], own), 2) for x, own in zip(first, (k, v), strict=True))
        mask = pack.mask(segment, sliding_window)
        if softcap is not None:
            if mask is None:
                mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            outputs.append(_capped(q, k, v, mask, dropout, scaling, softcap))
        else:
            options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
            outputs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, **options))
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype), None


def _fits(query: Tensor) -> bool:
    """Whether FlashAttention takes such queries; on "meta" tensors as on an NVIDIA GPU."""
    d = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16) or d % 8 or not (d <= 192 or d == 256):
        return False  # of other heads it has no backward pass on some GPUs
    return _has_flash(query.device) and _varlen() is not None


@cache
def _has_flash(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "meta"
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's attention for sequences of many lengths; None before it had windows and groups of heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale", "enable_gqa"} <= set(signature(varlen_attn).parameters) else None


def _together(
    query: Tensor, key: Tensor, value: Tensor, plan: OneCall, scaling: float | None, window: int | None
) -> Tensor:
    """query (1, heads, L, d), key, value (1, kv heads, L, d) -> (L, heads, d), in one call.

    The last query of a segment sees its last key, so that each sees its prefix and what precedes it.
    """
    varlen = _varlen()
    assert varlen is not None  # `_fits`
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    left = -1 if window is None or window >= plan.most_keys else window - 1
    return varlen(
        q.contiguous(),
        k.index_select(0, plan.keys),
        v.index_select(0, plan.keys),
        plan.cu_queries,
        plan.cu_keys,
        plan.most_queries,
        plan.most_keys,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _capped(q, k, v, mask, dropout, scaling, softcap) -> Tensor:
    """softmax(softcap · tanh(q kᵀ scaling / softcap)) v, as Gemma 2's eager attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1, dtype=torch.float32).to(q.dtype) if q.dtype != torch.float64 else scores.softmax(-1)
    return F.dropout(p, dropout) @ v
