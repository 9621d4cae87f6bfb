"""The one table of pairwise preference losses: each a formula of two log-ratios and a margin, with its source.

c = log pi(y+|x)/pi0(y+|x) and r = log pi(y-|x)/pi0(y-|x) are the log-ratios of the chosen and the rejected completion,
`margin` is their difference as defined by `Margin`. Formulas work elementwise on tensors of any shape, are
written to stay finite wherever their limit is, and are differentiated by autograd: value and gradient have one source.
The Triton kernel's formulas are traced from this table too (tools/generate_pairwise.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops import checks

# Beyond this a sigmoid is exactly 0 or 1, and x · sigmoid(-x) exactly 0, in float32 and in float64.
SATURATED = 1e4


class Margin(Enum):
    """How the third argument of a formula is made from the two completions, before beta."""

    DIFFERENCE = "f'(c) - f'(r), f' the f-divergence's derivative (the identity for the reverse KL)"
    PER_TOKEN = "f'(c) / chosen length - f'(r) / rejected length"
    SORTED_PAIRS = "sort(log pi(y+) - log pi(y-)) - sort(log pi0(y+) - log pi0(y-)), each over the batch"
    SORTED_SIDES = "sort(c) - sort(r), each over the batch"


@dataclass(frozen=True)
class Options:
    """The numbers that formulas read."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    @property
    def smooths(self) -> bool:
        """Formulas check this, because 0 · inf is not 0."""
        return self.label_smoothing != 0

    @property
    def log_kept(self) -> float:
        return math.log1p(-self.label_smoothing)

    @property
    def log_flipped(self) -> float:
        return math.log(self.label_smoothing)


@dataclass(frozen=True)
class PairwiseLoss:
    """One row of the table. formula(c, r, margin, options) -> loss, elementwise."""

    formula: Callable[[Tensor, Tensor, Tensor, Options], Tensor]
    source: str
    margin: Margin = Margin.DIFFERENCE
    margin_only: bool = True  # the formula depends only on the margin

    @property
    def takes_f_divergence(self) -> bool:
        """f-DPO leaves a term of the prompt that cancels only in the difference of one pair's two rewards."""
        return self.margin_only and not self.sorts

    @property
    def sorts(self) -> bool:
        """Whether it reads the whole batch rather than pair by pair."""
        return self.margin in (Margin.SORTED_PAIRS, Margin.SORTED_SIDES)


def logistic(x: Tensor) -> Tensor:
    """-log sigmoid(x)."""
    return -F.logsigmoid(x)


def _sigmoid(c, r, margin, o):
    """(1 - e) l(x) + e l(-x) with the logistic l."""
    x, e = o.beta * margin, o.label_smoothing
    return (1 - e) * logistic(x) + e * logistic(-x) if o.smooths else logistic(x)


def _hinge(c, r, margin, o):
    return torch.relu(1 - o.beta * margin)


def _ipo(c, r, margin, o):
    return (margin - 1 / (2 * o.beta)).square()


def _exo_pair(c, r, margin, o):
    """KL(softmax over the pair of beta · log-ratio || (1 - e, e))."""
    x = (o.beta * margin).clamp(-SATURATED, SATURATED)
    chosen = x.sigmoid() * (F.logsigmoid(x) - o.log_kept)
    rejected = (-x).sigmoid() * (F.logsigmoid(-x) - o.log_flipped)
    return chosen + rejected


def _nca_pair(c, r, margin, o):
    return -F.logsigmoid(o.beta * c) - 0.5 * F.logsigmoid(-o.beta * c) - 0.5 * F.logsigmoid(-o.beta * r)


def _robust(c, r, margin, o):
    """((1 - e) l(x) - e l(-x)) / (1 - 2 e) with the logistic l."""
    x, e = o.beta * margin, o.label_smoothing
    return ((1 - e) * logistic(x) - e * logistic(-x)) / (1 - 2 * e) if o.smooths else logistic(x)


def _bco_pair(c, r, margin, o):
    return -F.logsigmoid(o.beta * c) - F.logsigmoid(-o.beta * r)


def _sppo_hard(c, r, margin, o):
    return (c - 0.5 / o.beta).square() + (r + 0.5 / o.beta).square()


def _apo_zero(c, r, margin, o):
    return (-o.beta * c).sigmoid() + (o.beta * r).sigmoid()


def _apo_down(c, r, margin, o):
    return (o.beta * c).sigmoid() + (-o.beta * (c - r)).sigmoid()


def _discopop(c, r, margin, o):
    """(1 - s) · logistic(x) + s · exp(-x) with s = sigmoid(x / tau); s · exp(-x) is one exponential, not 0 · inf."""
    x = o.beta * margin
    bounded = x.clamp(min=-1e30)  # -inf minus -inf is NaN
    s = bounded / o.discopop_tau
    return (-s).sigmoid() * logistic(x) + torch.exp(F.logsigmoid(s) - bounded)


TABLE: dict[str, PairwiseLoss] = {
    "sigmoid": PairwiseLoss(_sigmoid, "DPO, arXiv 2305.18290, eq. 7; smoothed: cDPO, Mitchell 2023"),
    "hinge": PairwiseLoss(_hinge, "SLiC-HF, arXiv 2305.10425, section 2, on log-ratios as in RSO, arXiv 2309.06657"),
    "ipo": PairwiseLoss(
        _ipo, "IPO, arXiv 2310.12036, eq. 17, beta its tau, log-ratios per token", margin=Margin.PER_TOKEN
    ),
    "exo_pair": PairwiseLoss(_exo_pair, "EXO, arXiv 2402.00856, eq. 16"),
    "nca_pair": PairwiseLoss(_nca_pair, "NCA, arXiv 2402.05369, section 4.1", margin_only=False),
    "robust": PairwiseLoss(_robust, "Robust DPO, arXiv 2403.00409, section 3.1"),
    "bco_pair": PairwiseLoss(_bco_pair, "BCO, arXiv 2404.04656, section 4, without reward shift", margin_only=False),
    "sppo_hard": PairwiseLoss(_sppo_hard, "SPPO, arXiv 2405.00675, eq. 4.7 with P = 1 and 0", margin_only=False),
    "aot": PairwiseLoss(_sigmoid, "AOT, arXiv 2406.05882, section 3, paired", margin=Margin.SORTED_PAIRS),
    "aot_unpaired": PairwiseLoss(_sigmoid, "AOT, arXiv 2406.05882, section 3, unpaired", margin=Margin.SORTED_SIDES),
    "apo_zero": PairwiseLoss(_apo_zero, "APO, arXiv 2408.06266, eq. 7", margin_only=False),
    "apo_down": PairwiseLoss(_apo_down, "APO, arXiv 2408.06266, eq. 8", margin_only=False),
    "discopop": PairwiseLoss(_discopop, "DiscoPOP, arXiv 2406.08414, eq. 5"),
    "sigmoid_norm": PairwiseLoss(
        _sigmoid, "length-normalised DPO, Tulu 3, arXiv 2411.15124, section 5", margin=Margin.PER_TOKEN
    ),
}


# Computed from one pair alone, so in one launch.
FUSED = tuple(kind for kind, row in TABLE.items() if not row.sorts)


def check_options(kinds: Iterable[str], options: Options) -> None:
    """Raises UserError if a loss among `kinds` is not defined for these options."""
    checks.positive("beta", options.beta)
    checks.positive("discopop_tau", options.discopop_tau)
    e = options.label_smoothing
    check_smoothing(e)
    if "robust" in kinds and e >= 0.5:
        raise UserError(f"label_smoothing must be below 0.5 for loss_type 'robust', got {e!r}")
    if "exo_pair" in kinds and e == 0:
        raise UserError("label_smoothing must be above 0 for loss_type 'exo_pair' (its paper uses 1e-3), got 0")


def check_smoothing(value: float) -> None:
    checks.numbers(label_smoothing=value)
    if not 0 <= value < 1:
        raise UserError(f"label_smoothing must be in [0, 1), got {value!r}")


class _Expm1(torch.autograd.Function):
    """expm1 whose gradient is 0 if the incoming gradient is 0: a saturated loss of an overflowed score is flat, so 0 ·
    inf is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.expm1(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = x.exp()
        return grad * slope.masked_fill((grad == 0) & slope.isinf(), 0)


def power_score(x: Tensor, k: float, bound: float = math.inf) -> Tensor:
    """(exp(k x) - 1) / k with k x cut at `bound`; x itself in the limit k -> 0.

    With x a log-ratio this is f' of the alpha-divergence (k = alpha - 1) and of the forward KL (k = -1); with x a
    log-probability it is AlphaPO's reward (k = -alpha).
    """
    return x if abs(k) < 1e-6 else _Expm1.apply((k * x).clamp(max=bound)) / k


def power_margin(
    c: Tensor, r: Tensor, k: float, chosen_length: Tensor | float = 1.0, rejected_length: Tensor | float = 1.0
) -> Tensor:
    """power_score(c, k) / chosen_length - power_score(r, k) / rejected_length; if both overflow, only the larger."""
    top = math.log(torch.finfo(c.dtype).max)
    both = (k * c > top) & (k * r > top)
    apart = k * c - _log(chosen_length) - (k * r - _log(rejected_length))
    chosen = power_score(c.masked_fill(both & (apart <= 0), 0), k)
    rejected = power_score(r.masked_fill(both & (apart >= 0), 0), k)
    return chosen / chosen_length - rejected / rejected_length


def _log(length: Tensor | float) -> Tensor | float:
    return length.log() if isinstance(length, Tensor) else math.log(length)


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_margin(
    c: Tensor,
    r: Tensor,
    kind: str = "reverse_kl",
    alpha: float = 0.5,
    chosen_length: Tensor | float = 1.0,
    rejected_length: Tensor | float = 1.0,
) -> Tensor:
    """f'(u+) / chosen_length - f'(u-) / rejected_length with u = exp(log-ratio): f-DPO, arXiv 2309.16240.

    kind, one of F_DIVERGENCES: f'(u) is log u; 1 - 1/u; log 2u/(1 + u); (u^(alpha-1) - 1) / (alpha - 1). The last is
    clipped before its exponential overflows, as in TRL: at an exponent of 80 in float32, 700 in float64.
    """
    if kind == "forward_kl":
        return power_margin(c, r, -1.0, chosen_length, rejected_length)
    if kind == "js_divergence":
        c, r = (math.log(2) + F.logsigmoid(x) for x in (c, r))
    elif kind == "alpha_divergence":
        bound = 80.0 if c.dtype == torch.float32 else 700.0
        c, r = (power_score(x, alpha - 1, bound) for x in (c, r))
    return c / chosen_length - r / rejected_length
