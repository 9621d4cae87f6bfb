"""Every op in plain torch, in any floating dtype: the definition against which the compiled backends are tested.

The code is as simple as possible. In float64 it is the ground truth of the tests; it also runs where no compiled
backend can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")


def _compute(x: Tensor) -> Tensor:
    """float32 for narrow inputs, float64 kept: the precision in which all backends accumulate."""
    return x if x.dtype == torch.float64 else x.float()


def transform_logits(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """z = softcap · tanh(x / softcap) / temperature (softcapping as in Gemma 2, arXiv 2408.00118)."""
    z = _compute(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> dict[str, Tensor]:
    """log softmax(z) at the label, and statistics of the softmax. logits (..., V), labels (...) -> each (...).

    entropy = -Σ p log p;  mean_logits = Σ z / V;  log_sum_sq_probs = log Σ p² (WPO, arXiv 2406.11827);
    is_top1: the label is the first maximum of the logits; False in rows with NaN or +inf. Ignored positions and rows
        that are all -inf give 0.
    """
    z = transform_logits(logits, temperature, softcap)
    ignored = labels == ignore_index
    empty = (z == NEG_INF).all(-1)
    skip = ignored | empty
    # Skipped rows are replaced before the softmax, so that no NaN of theirs reaches a gradient.
    safe = torch.where(skip.unsqueeze(-1), torch.zeros_like(z), z)
    logp = torch.log_softmax(safe, -1)
    picked = logp.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    p = logp.exp()
    plogp = torch.where(p == 0, torch.zeros_like(p), p * torch.where(p == 0, torch.zeros_like(logp), logp))
    outputs = {
        "log_probs": picked,
        "entropy": -plogp.sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp.detach(), -1),
    }
    outputs = {name: x.masked_fill(skip, 0) for name, x in outputs.items()}
    outputs["mean_logits"] = z.detach().mean(-1).masked_fill(ignored, 0)
    outputs["is_top1"] = (z.argmax(-1) == labels) & ~skip & ~picked.isnan()
    return outputs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    adapter: tuple[Tensor, Tensor, float] | None = None,
) -> dict[str, Tensor]:
    """token_logprobs of logit_scale · (hidden Wᵀ + bias). hidden (..., H), weight (V, H), labels (...) -> each (...).

    adapter (A (r, H), B (V, r), scale): W + scale · B A replaces W (LoRA, arXiv 2106.09685).
    """
    # An ignored position's hidden state is replaced, so that no NaN of its reaches a gradient.
    h = _compute(hidden).masked_fill((labels == ignore_index).unsqueeze(-1), 0)
    logits = h @ _compute(weight).T
    if adapter is not None:
        a, b, scale = adapter
        logits = logits + scale * (h @ _compute(a).T) @ _compute(b).T
    if bias is not None:
        logits = logits + _compute(bias)
    return token_logprobs(logits * logit_scale, labels, temperature, softcap, ignore_index)


def token_logratios(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log p(label) - log p0(label) per token: the implicit reward of DPO over beta (arXiv 2305.18290, eq. 5)."""
    policy = token_logprobs(policy_logits, labels, temperature, None, ignore_index)["log_probs"]
    ref = token_logprobs(ref_logits, labels, temperature, None, ignore_index)["log_probs"]
    return policy - ref


def map_statistics(
    rewards: Tensor,
    lam: Tensor,
    center: Tensor | None = None,
    log_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> dict[str, Tensor]:
    """Moments of R - center under p_i ∝ w_i e^{lam·(R_i - center)}; the mean of each over the groups, if any.

    rewards (n, m), lam (m,) or (K, m) -> log_z (), mean (m,), cov (m, m), ess (), max_score (), float64, K leading.
    log_z and its derivatives mean and cov: the dual of MAP, arXiv 2410.19198.
    """
    x = rewards.double() if center is None else rewards.double() - center.double()
    log_w = x.new_zeros(len(x)) if log_weights is None else log_weights.double()
    members = [torch.arange(len(x), device=x.device)]
    if groups is not None:
        members = [(groups == g).nonzero().flatten() for g in groups.unique()]
    moments: dict[str, list[Tensor]] = {"log_z": [], "mean": [], "cov": [], "ess": [], "max_score": []}
    for rows in members:
        part, log_part = x[rows], log_w[rows]
        s = lam.double() @ part.T
        log_p = torch.where(log_part == NEG_INF, log_part, s + log_part)
        p = torch.softmax(log_p, -1)
        mean = p @ part
        moments["log_z"].append(torch.logsumexp(log_p, -1) - torch.logsumexp(log_part, -1))
        moments["mean"].append(mean)
        apart = part - mean.unsqueeze(-2)
        moments["cov"].append((p.unsqueeze(-1) * apart).mT @ apart)
        moments["ess"].append(1 / p.square().sum(-1))
        moments["max_score"].append(s.masked_fill(log_part == NEG_INF, NEG_INF).amax(-1))
    return {name: torch.stack(each).mean(0) for name, each in moments.items()}


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ A_{t'}, δ_t = r_t + γ V_{t'} - V_t, with t' the next valid token (arXiv 1506.02438, eq. 16).

    (..., T) each, mask bool -> advantages, and returns A + V; 0 where the mask is False, V and A 0 past the end.
    """
    rewards, values = (_compute(x).masked_fill(~mask, 0) for x in (rewards, values))
    next_value = next_advantage = torch.zeros_like(values[..., 0])
    advantages = []
    for t in reversed(range(values.shape[-1])):
        valid = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = delta + gamma * lam * next_advantage
        advantages.append(advantage.masked_fill(~valid, 0))
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, values[..., t], next_value)
    result = torch.stack(advantages[::-1], -1)
    return result, result + values


def philox(seed: int, row: Tensor, offset: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011, Random123) of broadcast int64 row and offset -> (..., 4) words in int64.

    key = (seed low, seed high), counter = (row low, row high, offset low, offset high), 32 bits each.
    """
    low = 0xFFFFFFFF
    row, offset = torch.broadcast_tensors(row, offset)
    c0, c1, c2, c3 = row & low, (row >> 32) & low, offset & low, (offset >> 32) & low
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], -1)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 by 32 bit product, in halves so that no signed 64-bit number overflows."""
    small = (a & 0xFFFF) * b
    rest = (a >> 16) * b + (small >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (small & 0xFFFF)


def uniform(seed: int, row: Tensor, offset: Tensor) -> Tensor:
    """53 bits of Philox's first two words as a float64 in (0, 1): a multiple of 2^-53, at least one."""
    words = philox(seed, row, offset)
    bits = ((words[..., 0] >> 5) << 26) | (words[..., 1] >> 6)
    return bits.clamp_min(1).double() * 2.0**-53


def slack(dtype: torch.dtype) -> float:
    """The tolerance within which a mass counts as reaching top_p or min_p, so that p = 0.9 keeps nine of ten equal
    tokens.

    It is the rounding of the logits' own dtype, the error of the probabilities that they represent.
    """
    return max(torch.finfo(dtype).eps, 1e-12)


def survivors(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Which tokens may be drawn, bool (B, V), for logits (B, V) without NaN, filtered in transformers' order.

    top_k keeps every tie of the k-th. top_p (Holtzman et al., arXiv 1904.09751) keeps the most likely tokens, the
    higher index first among ties, while the mass of the previous ones is below top_p. min_p: arXiv 2407.01082.
    """
    x, near = _compute(logits), slack(logits.dtype)
    d = _below_top(x, temperature)
    keep = x > NEG_INF
    if top_k > 0:
        keep &= x >= x.topk(min(top_k, x.shape[-1])).values[:, -1:]
    if top_p < 1:
        order = x.masked_fill(~keep, NEG_INF).sort(dim=-1, stable=True).indices.flip(-1)
        weights = (d.double().exp() * keep).gather(-1, order)
        mass = weights.cumsum(-1)
        kept = mass - weights < top_p * (1 - near) * mass[:, -1:]
        kept[:, 0] = True
        keep &= torch.zeros_like(keep).scatter(-1, order, kept)
    if min_p > 0:
        keep &= d >= math.log(min_p) - 2 * near
    return keep


def _below_top(x: Tensor, temperature: float) -> Tensor:
    """(x - max x) / temperature: the maximum is subtracted first, so that no temperature overflows."""
    limits = torch.finfo(x.dtype)
    return (x - x.amax(-1, keepdim=True)) * min(max(1 / temperature, limits.tiny), limits.max)


def counters(rows: Tensor | None, offset: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's stream and step, (B,) each, of `rows` (B,), (B, 2) or None for the B rows of x."""
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    streams, steps = rows.unbind(-1) if rows.ndim == 2 else (rows, torch.zeros_like(rows))
    return streams, steps + offset


def sample_tokens(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row by inverting its cumulative sum in index order. logits (B, V) -> ids, log_probs (B,)."""
    x = _compute(logits)
    bad = (x.isnan() | (x == -NEG_INF)).any(-1) | (x == NEG_INF).all(-1)
    logits, x = (each.masked_fill(bad[:, None], 0) for each in (logits, x))
    if temperature == 0:
        index = torch.arange(x.shape[-1], device=x.device)
        ids = torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1]).amin(-1)
        log_probs = torch.zeros_like(x[:, 0])
    else:
        d = _below_top(x, temperature)
        mass = (d.double().exp() * survivors(logits, temperature, top_k, top_p, min_p)).cumsum(-1)
        target = uniform(seed, *counters(rows, offset, x))[:, None] * mass[:, -1:]
        ids = (mass <= target).sum(-1)
        log_probs = (d.gather(-1, ids[:, None]).double() - mass[:, -1:].log()).to(x.dtype)[:, 0]
    return ids.masked_fill(bad, -1), log_probs.masked_fill(bad, float("nan"))


def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    seed: int = 0,
    offset: int = 0,
    rows: Tensor | None = None,
    adapter: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """sample_tokens of logit_scale · (hidden Wᵀ + bias), softcapped. hidden (B, H), weight (V, H) -> ids, log_probs."""
    h = _compute(hidden)
    logits = h @ _compute(weight).T
    if adapter is not None:
        a, b, scale = adapter
        logits = logits + scale * (h @ _compute(a).T) @ _compute(b).T
    if bias is not None:
        logits = logits + _compute(bias)
    logits = transform_logits(logits * logit_scale, 1.0, softcap)
    return sample_tokens(logits, temperature, seed=seed, offset=offset, rows=rows)


# The order of csrc/resample.h.
RESAMPLE_METHODS = ("multinomial", "systematic", "stratified", "residual", "gumbel_top_k", "best")
# Sets resample's draws apart from those of sample_tokens, whose offsets are below 2^63: one seed serves both.
RESAMPLE_DOMAIN = -(2**63)
# A share that is whole but for rounding is whole.
SHARE_SLACK = 1 + 1e-12


def shared_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    spans: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Each row's attention over its prompt, the tokens spans[row] of keys (kv heads, tokens, d), and over the first
    lengths[row] + 1 of its own (rows, kv heads, room, d), behind them. q (rows, heads, d) -> (rows, heads, dv).

    window: how many tokens the last one sees, with itself.
    """
    out = []
    for x, k, v, (begin, end), length in zip(_compute(q), own_keys, own_values, spans, lengths, strict=True):
        k = torch.cat([keys[:, begin:end], k[:, : length + 1]], 1)[:, -(window or 0) :]
        v = torch.cat([values[:, begin:end], v[:, : length + 1]], 1)[:, -(window or 0) :]
        scores = x.unflatten(0, (len(k), -1)) @ _compute(k).mT * scaling
        out.append((transform_logits(scores, 1.0, softcap).softmax(-1) @ _compute(v)).flatten(0, 1))
    return torch.stack(out).to(q.dtype)


def resample(log_weights: Tensor, k: int, method: str, mask: Tensor | None = None, seed: int = 0) -> Tensor:
    """Draw k candidates per row. log_weights (P, N), mask (P, N) bool, True = valid -> indices (P, k) int64.

    Multinomial, residual, stratified and systematic resampling as in Douc, Cappé and Moulines (arXiv cs/0507025);
    gumbel_top_k as in Kool, van Hoof and Welling (arXiv 1903.06059).
    """
    x = log_weights.double()
    if mask is not None:
        x = x.masked_fill(~mask, NEG_INF)
    bad = (x.isnan() | (x == -NEG_INF)).any(-1, keepdim=True) | (x == NEG_INF).all(-1, keepdim=True)
    x = x.masked_fill(bad, 0)
    x = x - x.amax(-1, keepdim=True)
    row = torch.arange(len(x), device=x.device)[:, None]

    def draws(count):
        return uniform(seed, row, torch.arange(count, device=x.device) + RESAMPLE_DOMAIN)

    if method in ("best", "gumbel_top_k"):
        keys = x - (-draws(x.shape[1]).log()).log() if method == "gumbel_top_k" else x
        keys, ids = keys.sort(dim=-1, descending=True, stable=True)
        ids = torch.nn.functional.pad(ids.masked_fill(keys == NEG_INF, -1), (0, max(k - x.shape[1], 0)), value=-1)[
            :, :k
        ]
    elif method == "residual":
        shares = x.exp() * (k / x.exp().cumsum(-1)[:, -1:])
        copies = (shares * SHARE_SLACK).floor()
        ids = _search((shares - copies).clamp_min(0), draws(k))
        for p, count in enumerate(copies.long()):
            whole = torch.arange(x.shape[1], device=x.device).repeat_interleave(count)
            ids[p] = torch.cat([whole, ids[p]])[:k]
    else:
        u = draws(k)
        if method != "multinomial":
            u = (torch.arange(k, device=x.device) + (u if method == "stratified" else u[:, :1])) / k
        ids = _search(x.exp(), u)
    return ids.masked_fill(bad, -1)


def _search(weights: Tensor, shares: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds that share of the total. (P, N), (P, k) -> (P, k)."""
    mass = weights.cumsum(-1)
    ids = torch.searchsorted(mass, shares.clamp_max(1 - 2.0**-53) * mass[:, -1:], right=True)
    return ids.clamp_max(weights.shape[1] - 1)


def weighted_sums(tensors: Sequence[Tensor], rows: Sequence[Sequence[float]], dtype: torch.dtype) -> list[Tensor]:
    """Soups Σ rows[k][i] tensors[i] in `dtype` (arXiv 2203.05482), summed in the order of i, rounded once to nearest
    even.

    In float32, or in float64 if a tensor or `dtype` is. float8_e4m3fn has no infinity: numbers beyond its range become
    its largest number.
    """
    wide = torch.float64 if torch.float64 in (dtype, *(tensor.dtype for tensor in tensors)) else torch.float32
    wide_tensors = [tensor.detach().to(wide) for tensor in tensors]
    results = []
    for row in rows:
        total = wide_tensors[0] * torch.tensor(row[0], dtype=wide)
        for tensor, weight in zip(wide_tensors[1:], row[1:], strict=True):
            total += tensor * torch.tensor(weight, dtype=wide)
        if wide == torch.float64 and dtype not in (torch.float64, torch.float32):
            total = _to_odd(total)
        if dtype == torch.float8_e4m3fn:
            total = total.clamp(-448, 448)
        results.append(total.to(dtype).contiguous())
    return results


def _to_odd(x: Tensor) -> Tensor:
    """float64 as float32, rounded to odd if inexact, so that rounding again to fewer bits gives x rounded once."""
    nearest = x.float()
    inexact = (nearest.double() != x) & ~x.isnan() & (nearest.view(torch.int32) & 1 == 0)
    away = torch.where(nearest.double().abs() < x.abs(), 1, -1).int()
    return torch.where(inexact, nearest.view(torch.int32) + away, nearest.view(torch.int32)).view(torch.float32)
