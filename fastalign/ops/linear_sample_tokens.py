"""linear_sample_tokens: one token per row from hidden states and the head's weight, without the logits.

Two passes: the mass of every part of the vocabulary; then the logits of the part in which the uniform number falls. The
token is the one that sample_tokens draws from these logits with the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.dtypes import compute_dtype
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks, linear_cpu
from fastalign.ops.buffers import buffer
from fastalign.ops.head import as_autocast
from fastalign.ops.head import check as check_head
from fastalign.ops.library import Op, define
from fastalign.ops.sample_tokens import SampledTokens
from fastalign.ops.sample_tokens import check as check_draw

MIN_TEMPERATURE = 1e-30  # below this, logits / temperature would overflow, and only the largest logit has any mass
NEG_INF = float("-inf")


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    adapter: tuple[Tensor, Tensor, float] | None = None,
    seed: int,
    offset: int = 0,
    rows: Tensor | None = None,
) -> SampledTokens:
    """`sample_tokens` of logit_scale · (hidden Wᵀ + bias), softcapped, without holding the logits; no filters.

    With the same seed, the token is the one that sample_tokens draws from these logits, up to rounding: summing a
    product in another order may change a logit's last digits, and with them the boundary between two tokens.

    Args:
        hidden: (B, H) float32, bfloat16, float16 or float64, any strides.
        weight, bias, softcap, logit_scale, adapter: as in `linear_token_logprobs`. -inf in bias masks a token.
        temperature: at least 0; 0 takes the largest logit (the lowest index among ties, log-probability 0).
        seed, offset, rows: as in `sample_tokens`.

    Returns:
        SampledTokens, without gradients: ids (B,), and log_probs (B,) float32 (float64 for float64). A row with NaN or
        +inf among its logits, or with no finite one, gives id -1 and log-probability NaN.

    Raises:
        UserError, TypeError: a shape, dtype, device or option that breaks these rules.
    """
    checks.logits("hidden", hidden, last="H")
    if hidden.ndim != 2:
        raise UserError(f"hidden must have shape (B, H), got {tuple(hidden.shape)}")
    no_labels = hidden.new_zeros(len(hidden), dtype=torch.int64)
    check_head(hidden, weight, no_labels, bias, 1.0, softcap, logit_scale, None, adapter, None)
    if weight.shape[0] > 2**31 - 1:
        raise UserError(f"weight must have shape (V, H) with V below 2^31, got {tuple(weight.shape)}")
    check_draw(hidden, temperature, 0, 1.0, 0.0, offset, rows)
    checks.seed(seed)
    a, b, adapter_scale = (None, None, 1.0) if adapter is None else adapter
    hidden, weight = hidden.detach(), weight.detach()
    bias, a, b = (None if x is None else x.detach() for x in (bias, a, b))
    options = (float(temperature), softcap, float(logit_scale), checks.as_signed(seed), offset, rows)
    if backend.choose(hidden.device) == "reference":
        given = None if a is None or b is None else (a, b, adapter_scale)
        with torch.autocast(hidden.device.type, enabled=False):
            return SampledTokens(*reference.linear_sample_tokens(hidden, weight, bias, *options, given))
    temperature = max(float(temperature), MIN_TEMPERATURE) if temperature else 0.0
    options = (temperature, float(softcap or 0.0), *options[2:])
    hidden, weight, bias, a, b = as_autocast(hidden.device, hidden, weight, bias, a, b)
    return SampledTokens(*sample_op(hidden, weight, bias, a, b, float(adapter_scale), *options))


def _sample_cpu(hidden, weight, bias, a, b, adapter_scale, temperature, softcap, logit_scale, seed, offset, rows):
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        greedy = temperature == 0
        temperature = 1.0 if greedy else temperature
        count, dtype = len(hidden), compute_dtype(hidden.dtype)
        labels = torch.full((count,), -1)
        tiles = linear_cpu.Tiles(
            hidden, weight, bias, a, b, labels, adapter_scale, (temperature, softcap, logit_scale), None
        )
        steps = -(-tiles.vocab // tiles.width)
        stats = torch.zeros(steps, 7, count, dtype=dtype)  # of each part of the vocabulary
        stats[:, 0] = NEG_INF
        for step, (first, _, w, b_part) in enumerate(tiles.columns()):
            for some in tiles.rows():
                tile = tiles.project(some, w, b_part)
                backend.native.head_forward(
                    tiles.describe(tile, some, first), buffer(stats[step]), False, None, threads()
                )
                del tile
        tops, sums = stats[:, 0], stats[:, 1].double()
        top = tops.amax(0)
        masses = torch.where(sums > 0, sums * (tops - top).double().exp(), sums)
        total = masses.sum(0)
        sound = (total > 0) & total.isfinite() & top.isfinite()
        before = masses.cumsum(0)
        target = reference.uniform(seed, *reference.counters(rows, offset, hidden)) * total
        chosen = _first_largest(tops, 0) if greedy else _first_beyond(masses, before, target)
        picked = chosen[None]
        share = (target - (before - masses).gather(0, picked)[0]) / masses.gather(0, picked)[0]
        ids, log_probs = torch.full((count,), -1), torch.full((count,), float("nan"), dtype=dtype)
        for step in chosen[sound].unique().tolist():
            part = slice(step * tiles.width, (step + 1) * tiles.width)
            w, b_part = weight[part].to(dtype), None if b is None else b[part].to(dtype)
            for few in ((chosen == step) & sound).nonzero().flatten().split(linear_cpu.TOKENS):
                x = tiles.hidden[few] @ w.t()
                if b_part is not None:
                    x.addmm_(tiles.low[few], b_part.t())
                if bias is not None:
                    x += tiles.bias[part]
                z = reference.transform_logits(x.mul_(logit_scale), temperature, softcap or None)
                if greedy:
                    place = _first_largest(z, -1)
                else:
                    weights = (z - z.amax(-1, keepdim=True)).double().exp().t()
                    sums_to = weights.cumsum(0)
                    place = _first_beyond(weights, sums_to, share[few] * sums_to[-1])
                ids[few] = part.start + place
                drawn = z.gather(-1, place[:, None])[:, 0]
                log_probs[few] = 0 if greedy else ((drawn - top[few]).double() - total[few].log()).to(dtype)
        return ids, log_probs


def _first_largest(x: Tensor, dim: int) -> Tensor:
    """The first index of the maximum along dim."""
    return ((x == x.amax(dim, keepdim=True)).int().cumsum(dim) == 0).sum(dim).clamp_max(x.shape[dim] - 1)


def _first_beyond(weights: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """Along dim 0, the first index whose cumulative weight exceeds target, else the last index with any weight."""
    last = (weights > 0).int().cumsum(0).argmax(0)
    return torch.minimum((sums <= target).sum(0), last)


sample_op: Op = define(
    "linear_sample_tokens(Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float adapter_scale, "
    "float temperature, float softcap, float logit_scale, int seed, int offset, Tensor? rows) -> (Tensor, Tensor)",
    _sample_cpu,
    lambda hidden, *_: empty.sample_tokens(hidden),
    triton="linear_sample_tokens.sample",
)
