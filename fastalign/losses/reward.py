"""Losses of reward models on comparisons and rankings, and the Bradley–Terry scores of many items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign._base.errors import UserError
from fastalign.losses.tokens import wide
from fastalign.ops import checks


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coefficient: float = 0.0,
) -> Tensor:
    """The mean of -log sigmoid(chosen - rejected - margin) (arXiv 2203.02155, eq. 1; margin: arXiv 2307.09288, eq. 2).

    Args:
        chosen_scores, rejected_scores: of one shape, one score per completion.
        margin: the desired difference, one number or one per pair; None: 0.
        center_coefficient: adds this times the mean of (chosen + rejected)², which keeps the scores near 0 (arXiv
            2312.09244, section 2), as TRL's RewardTrainer does.

    Returns:
        () float32, float64 for float64 scores; 0 for no pairs.

    Raises:
        UserError, TypeError: shapes that differ, or scores that are not floating-point tensors.

    >>> import torch
    >>> from fastalign import losses
    >>> losses.bradley_terry_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    tensor(0.5032)
    """
    chosen, rejected = _scores("chosen_scores", chosen_scores), _scores("rejected_scores", rejected_scores)
    if chosen.shape != rejected.shape:
        raise UserError(
            "rejected_scores.shape must equal chosen_scores.shape, "
            f"got {tuple(rejected.shape)} and {tuple(chosen.shape)}"
        )
    if isinstance(margin, Tensor) and margin.ndim and margin.shape != chosen.shape:
        raise UserError(f"margin must have shape {tuple(chosen.shape)}, got {tuple(margin.shape)}")
    checks.numbers(center_coefficient=center_coefficient)
    if margin is not None and not isinstance(margin, Tensor):
        checks.numbers(margin=margin)
    count = max(chosen.numel(), 1)
    apart = chosen - rejected
    if margin is not None:
        apart = apart - (margin.to(apart.dtype) if isinstance(margin, Tensor) else margin)
    loss = -logsigmoid(apart).sum() / count
    if center_coefficient != 0:
        loss = loss + center_coefficient * (chosen + rejected).square().sum() / count
    return loss


def plackett_luce_loss(scores: Tensor, ranking: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log P(ranking), the mean over rankings: the item at each place is preferred to all that follow it.

    P = Π_k exp(s_{π(k)}) / Σ_{j >= k} exp(s_{π(j)}) (Plackett 1975; Luce 1959; as a reward loss arXiv 2305.18290,
    appendix A.3). For two items it is Bradley–Terry's.

    Args:
        scores: (..., n) one score per item.
        ranking: (..., k) int64, k <= n: the items from best to worst. Items not listed are ignored.
        mask: (..., k) bool or 0/1, 0 on the padding of a shorter ranking; None: no padding. A ranking of fewer than two
        items contributes 0 and no gradient.

    Returns:
        () float32, float64 for float64 scores; 0 for no rankings.

    Raises:
        UserError, TypeError: a shape or dtype that breaks these rules.

    >>> import torch
    >>> from fastalign import losses
    >>> losses.plackett_luce_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0, 1, 2]]))
    tensor(0.7209)
    """
    scores = _scores("scores", scores)
    checks.tensor("ranking", ranking, "an int64 tensor", torch.int64)
    if mask is not None:
        checks.tensor("mask", mask)
    if scores.ndim == 0 or ranking.shape[:-1] != scores.shape[:-1] or ranking.shape[-1] > scores.shape[-1]:
        raise UserError(
            "ranking must have shape (..., k) for scores (..., n) with k <= n, "
            f"got {tuple(ranking.shape)} and {tuple(scores.shape)}"
        )
    if mask is None:
        mask = torch.ones_like(ranking, dtype=torch.bool)
    elif mask.shape != ranking.shape:
        raise UserError(f"mask.shape must equal ranking.shape, got {tuple(mask.shape)} and {tuple(ranking.shape)}")
    mask, k = mask != 0, ranking.shape[-1]
    placed = scores.gather(-1, ranking.masked_fill(~mask, 0))
    # (..., k, k): row i holds the places from i on, minus its own score, so that no digits cancel. Excluded places have
    # no weight in the sums; they get a finite number, because -inf would put NaN in the gradient. (logcumsumexp needs
    # no k², but its gradient overflows.)
    stays = mask.unsqueeze(-2) & torch.ones(k, k, dtype=torch.bool, device=mask.device).triu()
    apart = (placed.unsqueeze(-2) - placed.unsqueeze(-1)).masked_fill(~stays, torch.finfo(placed.dtype).min / 4)
    return apart.logsumexp(-1).masked_fill(~mask, 0).sum() / max(math.prod(ranking.shape[:-1]), 1)


class BradleyTerryScores(NamedTuple):
    """What `bradley_terry_scores` returns, float64."""

    scores: np.ndarray  # (n,) natural log-odds: P(i beats j) = 1 / (1 + exp(scores[j] - scores[i]))
    standard_errors: np.ndarray  # (n,)
    covariance: np.ndarray  # (n, n): the variance of a difference is c[i, i] + c[j, j] - 2 c[i, j]
    items: tuple[Hashable, ...]  # (n,) the items' names
    log_likelihood: float
    iterations: int


def bradley_terry_scores(
    comparisons: Any, *, prior: float = 0.0, tol: float = 1e-10, max_iterations: int = 100
) -> BradleyTerryScores:
    """The scores of many items from pairwise comparisons, by maximum likelihood (Bradley and Terry 1952; Hunter 2004).

    For example, the strengths of chess players from their games, or of models from votes on their answers. Scores are
    log-odds; times 400 / ln 10 they are Elo points. Uses Newton's method; the problem is concave if the comparisons
    connect the items.

    Args:
        comparisons: a square table (n, n), wins[i, j] = how often i beat j; or a list of (winner, loser) or (winner,
        loser, count), by names or by indices. Counts may be fractions: a draw is half a win for each side. prior: adds
        this many wins and losses of every item against an imaginary item of score 0. Any value above 0 makes scores
        finite even if some items never won, never lost or never met.
        tol: stop when no score changes by more than this.
        max_iterations: of Newton's method.

    Returns:
        BradleyTerryScores. Without a prior the scores' mean is 0 and the errors are those of a score against the mean
        (inverse Fisher information on Σ score = 0); with one, both are relative to the imaginary item.

    Raises:
        UserError: comparisons of another form; items without finite scores (Hunter's
            assumption 1: in every split of the items in two, some item of each side has beaten one of the other).
    """
    if not (isinstance(prior, int | float) and 0 <= prior < math.inf):
        raise UserError(f"prior must be a finite number, at least 0, got {checks.shown(prior)}")
    checks.numbers(tol=tol)
    checks.integer("max_iterations", max_iterations)
    wins, items = _wins_table(comparisons)
    n = len(wins)
    if prior == 0:
        _check_connected(wins, items)
    games = wins + wins.T

    def value(s):
        ahead = s[:, None] - s[None, :]
        return -(wins * np.logaddexp(0, -ahead)).sum() - prior * (np.logaddexp(0, -s) + np.logaddexp(0, s)).sum()

    def chances(s):
        """P(i beats j), and the second derivative of log(1 + e^x) at their difference."""
        e = np.exp(-np.abs(s))
        upper = 1 / (1 + e)
        return np.where(s >= 0, upper, e * upper), e * upper * upper

    def information(s):
        p, variance = chances(s[:, None] - s[None, :])
        p0, variance0 = chances(s)
        weight = games * variance
        # p.T is 1 - p to the last digit, so the gradient, a difference of products, is accurate at any odds.
        gradient = (wins * p.T).sum(1) - (wins.T * p).sum(1) + prior * (1 - 2 * p0)
        hessian = np.diag(weight.sum(1) + 2 * prior * variance0) - weight
        # Without a prior all scores may shift together; a constant in that direction fixes their mean.
        return gradient, hessian + (weight.sum() / n**2 if prior == 0 else 0.0)

    scores, iterations = np.zeros(n), 0
    current = value(scores)
    for _ in range(max_iterations):
        iterations += 1
        gradient, hessian = information(scores)
        step = np.linalg.solve(hessian, gradient)
        # Far from the optimum a full step may overshoot; near it the rounding of the value must not stop a good one.
        while (trial := value(scores + step)) < current - 1e-12 * (1 + abs(current)):
            step = step / 2
        scores, current = scores + step, trial
        if np.abs(step).max() <= tol:
            break
    else:
        raise UserError(f"max_iterations must be larger: no convergence to tol {tol:g} in {max_iterations} iterations")
    if prior == 0:
        scores = scores - scores.mean()
    _, hessian = information(scores)
    covariance = np.linalg.inv(hessian)
    if prior == 0:
        covariance = covariance - covariance.sum() / n**2
    return BradleyTerryScores(
        scores, np.sqrt(np.maximum(np.diag(covariance), 0)), covariance, items, float(value(scores)), iterations
    )


def _scores(name: str, x: Tensor) -> Tensor:
    checks.tensor(name, x, "a floating tensor", "floating")
    return wide(x)


def _wins_table(comparisons: Any) -> tuple[np.ndarray, tuple[Hashable, ...]]:
    """wins (n, n) float64 with an empty diagonal, and the items' names."""
    if isinstance(comparisons, np.ndarray | Tensor):
        checks.arrays(comparisons=comparisons)
        comparisons = comparisons.detach().cpu() if isinstance(comparisons, Tensor) else comparisons
        wins = np.array(comparisons, dtype=np.float64)
        if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
            raise UserError(f"comparisons must be a square table (n, n) with n >= 2, or a list, got shape {wins.shape}")
        items: tuple[Hashable, ...] = tuple(range(len(wins)))
    else:
        wins, items = _from_list(comparisons)
    if not (np.isfinite(wins).all() and (wins >= 0).all()):
        raise UserError("comparisons must count wins by finite numbers, at least 0")
    if wins.diagonal().any():
        raise UserError(
            f"comparisons must be between two items, got {items[int(wins.diagonal().argmax())]!r} with itself"
        )
    return wins, items


def _from_list(comparisons: Sequence) -> tuple[np.ndarray, tuple[Hashable, ...]]:
    rule = "comparisons must be (winner, loser) or (winner, loser, count)"
    if isinstance(comparisons, str) or not isinstance(comparisons, Iterable):
        raise UserError(f"{rule}, got {checks.shown(comparisons)}")
    rows = [tuple(row) if isinstance(row, Iterable) and not isinstance(row, str) else (row,) for row in comparisons]
    bad = next((row for row in rows if len(row) not in (2, 3)), None)
    if bad is not None or not rows:
        got = "an empty list" if bad is None else repr(bad)
        raise UserError(f"{rule}, got {got}")
    names = list(dict.fromkeys(name for row in rows for name in row[:2]))
    if all(isinstance(name, int | np.integer) and name >= 0 for name in names):
        names = list(range(max(names) + 1))
    place = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for winner, loser, *count in rows:
        try:
            wins[place[winner], place[loser]] += float(count[0]) if count else 1.0
        except (TypeError, ValueError):
            raise UserError(f"comparisons must count wins by numbers, got {checks.shown(count[0])}") from None
    return wins, tuple(names)


def _check_connected(wins: np.ndarray, items: tuple[Hashable, ...]) -> None:
    from scipy.sparse.csgraph import connected_components

    count, component = connected_components(wins > 0, connection="strong")
    if count == 1:
        return
    # A part that never lost to another has no finite score relative to the rest.
    beaten = {int(component[j]) for i, j in zip(*np.nonzero(wins), strict=True) if component[i] != component[j]}
    part = next(c for c in range(count) if c not in beaten)
    members = [repr(items[i]) for i in np.flatnonzero(component == part)]
    listed = ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")
    raise UserError(
        "comparisons must connect every two items by wins in both directions; no other item beat "
        f"{listed} (give prior=0.1, say, for finite scores)"
    )
