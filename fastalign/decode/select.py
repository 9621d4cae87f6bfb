"""Choose among candidates under p_λ(y|x), proportional to p0(y|x) exp(λ·R(x, y)).

The candidates are draws from p0, so their self-normalised importance weights are exp(λ·R) alone
(MAP, arXiv 2410.19198, section 3; sampling-importance-resampling, Rubin 1987).
"""

from __future__ import annotations

import numpy as np
import torch

from fastalign._base.errors import UserError


def select(rewards: np.ndarray, lam: np.ndarray, *, k: int = 1, method: str = "resample", seed: int) -> np.ndarray:
    """Select k of the N candidates of each of P prompts -> (P, k) int64 indices.

    rewards: (P, N, m) finite; lam: (m,). method: "resample" (exact draws with replacement: soft best-of-N; for
    temperature t use lam / t), "best" (the k largest λ·R, each once), or any method of `ops.resample`, of which
    gumbel_top_k draws from the weights without replacement. Raises UserError on wrong shapes and on NaN.

    >>> import numpy as np
    >>> from fastalign import decode
    >>> rewards = np.array([[[0.0], [1.0], [5.0]]])  # one prompt, three candidates, one value
    >>> decode.select(rewards, [1.0], method="best", k=2, seed=0)
    array([[2, 1]])
    >>> decode.select(rewards, [50.0], seed=0)
    array([[2]])
    """
    from fastalign import ops
    from fastalign.ops import checks

    checks.integer("k", k, 1)
    weights = torch.from_numpy(np.atleast_2d(log_weights_of(rewards, lam)))
    if method in ("best", "gumbel_top_k") and k > weights.shape[1]:
        rule = f"k must be at most {weights.shape[1]}, the candidates per prompt"
        raise UserError(f"{rule}, for method {method!r}, which selects each candidate at most once; got {k}")
    method = "multinomial" if method == "resample" else method
    return ops.resample(weights, k, method=method, seed=seed).numpy()


def effective_sample_size(rewards: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """(sum w)^2 / sum w^2 with w = exp(λ·R), in 1..N (Kong 1992).

    rewards (P, N, m) -> (P,) float64; (N, m) -> a scalar.

    >>> import numpy as np
    >>> from fastalign import decode
    >>> rewards = np.array([[[0.0], [1.0], [5.0]]])
    >>> decode.effective_sample_size(rewards, [0.0]), decode.effective_sample_size(rewards, [5.0]).round(3)
    (array([3.]), array([1.]))
    """
    scores = log_weights_of(rewards, lam)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights.sum(axis=-1) ** 2 / (weights**2).sum(axis=-1)


def log_weights_of(rewards: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """λ·R in float64: (P, N, m) -> (P, N), (N, m) -> (N,)."""
    from fastalign.ops import checks

    checks.arrays(rewards=rewards, lam=lam)
    rewards, lam = np.asarray(rewards, dtype=np.float64), np.asarray(lam, dtype=np.float64)
    if rewards.ndim not in (2, 3) or 0 in rewards.shape:
        raise UserError(f"rewards must be (prompts, candidates, values), no dimension 0, got shape {rewards.shape}")
    if lam.shape != rewards.shape[-1:]:
        raise UserError(f"lam must have one weight per value, {rewards.shape[-1]}, got shape {lam.shape}")
    if not np.isfinite(lam).all():
        raise UserError(f"lam must be finite, got {lam.tolist()}")
    if not np.isfinite(rewards).all():
        at = tuple(np.argwhere(~np.isfinite(rewards))[0].tolist())
        *prompt, candidate, value = at
        where = (f"prompt {prompt[0]}, " if prompt else "") + f"candidate {candidate}, value {value}"
        raise UserError(f"rewards must be finite, got {rewards[at]} at {where}")
    with np.errstate(over="ignore", invalid="ignore"):
        scores = rewards @ lam
    if not np.isfinite(scores).all():
        raise UserError(f"lam must leave λ·R finite, got {lam.tolist()}")
    return scores
