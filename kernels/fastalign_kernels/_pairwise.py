"""Every pairwise preference loss of one pair, and its gradient.

Written by tools/generate_pairwise.py from the table in fastalign/ops/pairwise.py: change that and run it again.

A formula takes the pair's log-ratios, its margin and the options as scalars, and returns the loss and its derivatives
by c, by r and by the margin. SMOOTHS: label_smoothing is not 0.
"""

# ruff: noqa: I001, E501
# fmt: off
import triton
import triton.language as tl

from fastalign.kernels._elementary import exp, log_sigmoid


@triton.jit
def sigmoid(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    if SMOOTHS:
        x1 = beta * margin
        x2 = 1.0 - label_smoothing
        x3 = -x1
        loss = -log_sigmoid(x1) * x2 - log_sigmoid(x3) * label_smoothing
        by_margin = (label_smoothing * tl.sigmoid(x1) - x2 * tl.sigmoid(x3)) * beta
        return loss, 0.0, 0.0, by_margin
    else:
        x1 = beta * margin
        loss = -log_sigmoid(x1)
        by_margin = -tl.sigmoid(-x1) * beta
        return loss, 0.0, 0.0, by_margin


@triton.jit
def hinge(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = 1.0 - beta * margin
    x2 = tl.where(x1 < 0.0, 0.0, x1)
    loss = x2
    by_margin = -tl.where(x2 <= 0.0, 0.0, 1.0) * beta
    return loss, 0.0, 0.0, by_margin


@triton.jit
def ipo(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = margin - 1 / (2.0 * beta)
    loss = x1 * x1
    by_margin = 2.0 * x1
    return loss, 0.0, 0.0, by_margin


@triton.jit
def exo_pair(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = beta * margin
    x2 = tl.where(x1 > 10000.0, 10000.0, x1)
    x3 = tl.where(x2 < -10000.0, -10000.0, x2)
    x4 = tl.sigmoid(x3)
    x5 = log_sigmoid(x3) - log_kept
    x6 = -x3
    x7 = tl.sigmoid(x6)
    x8 = log_sigmoid(x6) - log_flipped
    loss = x4 * x5 + x7 * x8
    by_margin = tl.where((x1 >= (-10000.0)) & (x1 <= 10000.0), -x7 * x4 - x8 * (x7 * (1 - x7)) + x4 * x7 + x5 * (x4 * (1 - x4)), 0.0) * beta
    return loss, 0.0, 0.0, by_margin


@triton.jit
def nca_pair(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = beta * c
    x2 = -x1
    x3 = beta * r
    loss = -log_sigmoid(x1) - 0.5 * log_sigmoid(x2) - 0.5 * log_sigmoid(-x3)
    by_c = 0.5 * (beta * tl.sigmoid(x1)) - tl.sigmoid(x2) * beta
    by_r = 0.5 * (beta * tl.sigmoid(x3))
    return loss, by_c, by_r, 0.0


@triton.jit
def robust(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    if SMOOTHS:
        x1 = beta * margin
        x2 = 1.0 - label_smoothing
        x3 = -x1
        x4 = 1.0 - 2.0 * label_smoothing
        loss = (-log_sigmoid(x1) * x2 + log_sigmoid(x3) * label_smoothing) / x4
        by_margin = (-label_smoothing / x4 * tl.sigmoid(x1) - x2 / x4 * tl.sigmoid(x3)) * beta
        return loss, 0.0, 0.0, by_margin
    else:
        x1 = beta * margin
        loss = -log_sigmoid(x1)
        by_margin = -tl.sigmoid(-x1) * beta
        return loss, 0.0, 0.0, by_margin


@triton.jit
def bco_pair(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = beta * c
    x2 = beta * r
    loss = -log_sigmoid(x1) - log_sigmoid(-x2)
    by_c = -tl.sigmoid(-x1) * beta
    by_r = beta * tl.sigmoid(x2)
    return loss, by_c, by_r, 0.0


@triton.jit
def sppo_hard(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = 0.5 / beta
    x2 = c - x1
    x3 = r + x1
    loss = x2 * x2 + x3 * x3
    by_c = 2.0 * x2
    by_r = 2.0 * x3
    return loss, by_c, by_r, 0.0


@triton.jit
def apo_zero(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = tl.sigmoid(-beta * c)
    x2 = tl.sigmoid(beta * r)
    loss = x1 + x2
    by_c = -beta * (x1 * (1 - x1))
    by_r = x2 * (1 - x2) * beta
    return loss, by_c, by_r, 0.0


@triton.jit
def apo_down(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = tl.sigmoid(beta * c)
    x2 = tl.sigmoid(-beta * (c - r))
    loss = x1 + x2
    x3 = beta * (x2 * (1 - x2))
    by_c = -x3 + x1 * (1 - x1) * beta
    by_r = x3
    return loss, by_c, by_r, 0.0


@triton.jit
def discopop(c, r, margin, beta, label_smoothing, log_kept, log_flipped, discopop_tau, SMOOTHS: tl.constexpr):
    x1 = beta * margin
    x2 = log_sigmoid(x1)
    x3 = tl.where(x1 < -1e+30, -1e+30, x1)
    x4 = x3 / discopop_tau
    x5 = tl.sigmoid(-x4)
    x6 = exp(log_sigmoid(x4) - x3)
    loss = -x2 * x5 + x6
    by_margin = (-x5 * tl.sigmoid(-x1) + tl.where(x1 >= (-1e+30), -x6 + (x6 * x5 + x2 * (x5 * (1 - x5))) / discopop_tau, 0.0)) * beta
    return loss, 0.0, 0.0, by_margin


FORMULAS = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid,
}
PER_TOKEN = ("ipo", "sigmoid_norm")
