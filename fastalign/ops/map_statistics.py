"""map_statistics: the moments of the rewards under a tilted distribution, all that a solver for λ needs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import log
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign import backend, empty, reference
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.ops import checks
from fastalign.ops.library import Op, define


class MapStatistics(NamedTuple):
    """What `map_statistics` returns; every field float64, with a leading K where lam is (K, m)."""

    log_z: Tensor  # () log Σ w e^s / Σ w
    mean: Tensor  # (m,) of R - center under the tilted distribution
    cov: Tensor  # (m, m)
    ess: Tensor  # () (Σ w e^s)² / Σ (w e^s)²
    max_score: Tensor  # () the largest s of a row with positive weight


class ArrayStatistics(NamedTuple):
    """The same in numpy arrays, with a leading K."""

    log_z: np.ndarray
    mean: np.ndarray
    cov: np.ndarray
    ess: np.ndarray
    max_score: np.ndarray


def map_statistics(
    rewards: Tensor,
    lam: Tensor,
    *,
    center: Tensor | None = None,
    log_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> MapStatistics:
    """Moments of R - center under p_i ∝ w_i exp(s_i), s_i = lam·(R_i - center), from one read of the rewards.

    log_z is the value of MAP's dual, mean its gradient and cov its Hessian (arXiv 2410.19198). Sums are float64
    relative to a running maximum, so no score overflows, and they do not depend on the number of threads.

    Args:
        rewards: (n, m) float32 or float64, n, m >= 1; read in place where its rows are contiguous.
        lam: (m,), or (K, m): K distributions from the same read.
        center: (m,), subtracted from the rewards; a center among them preserves the moments' digits. None: 0.
        log_weights: (n,), log w_i; -inf leaves a row out. None: 0. On a GPU, +inf, NaN or no positive weight (in some
        group) give NaN, because raising would force a synchronisation.
        groups: (n,) integers. Each field is then the mean over the groups of that group's own.

    Returns:
        MapStatistics of float64 tensors, without gradients. A NaN in rewards or lam gives NaN.

    Raises:
        UserError, TypeError: a shape or dtype that breaks these rules; no row with positive weight in some group.

    >>> import torch
    >>> from fastalign import ops
    >>> found = ops.map_statistics(torch.tensor([[1.0], [0.0]]), torch.tensor([0.0]))
    >>> found.mean, found.cov
    (tensor([0.5000], dtype=torch.float64), tensor([[0.2500]], dtype=torch.float64))
    """
    _check(rewards, lam, center, log_weights, groups)
    if backend.choose(rewards.device) == "reference":
        return MapStatistics(**reference.map_statistics(rewards, lam, center, log_weights, groups))
    rewards, lam, center, log_weights = (x if x is None else x.detach() for x in (rewards, lam, center, log_weights))
    return MapStatistics(*statistics_op(rewards, lam, center, log_weights, groups))


class MapPass:
    """The same pass for numpy arrays, set up once and called at many λ: `run(lam (K, m)) -> ArrayStatistics`.

    rewards: (n, m) float32 or float64, rows contiguous. center (m,) and log_weights (n,) float64; groups (n,) integers.
    """

    rewards: np.ndarray
    log_weights: np.ndarray | None
    groups: np.ndarray | None
    order: np.ndarray | None
    offsets: np.ndarray | None

    def __init__(
        self,
        rewards: np.ndarray,
        *,
        center: np.ndarray | None = None,
        log_weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ):
        _, m = rewards.shape
        self.rewards, self.log_weights, self.groups = rewards, log_weights, groups
        self.center: np.ndarray = np.zeros(m) if center is None else np.ascontiguousarray(center, dtype=np.float64)
        self.order, self.offsets = (None, None) if groups is None else rows_by_group(groups)
        if log_weights is not None:
            _ = self.log_norm  # raises if no weight is positive
        self.is_native: bool = backend.choose(torch.device("cpu")) == "cpu"
        count = 0 if self.offsets is None else len(self.offsets) - 1
        self.description: tuple[Any, ...] = (rewards, self.center, log_weights, self.order, self.offsets, count)

    def __call__(self, lam: np.ndarray) -> ArrayStatistics:
        if not self.is_native:
            return self._reference(lam)
        lam = np.ascontiguousarray(lam, dtype=np.float64)
        count, m = lam.shape
        out = np.empty((count, 3 + m + m * m))
        backend.native.map_statistics(out, self.description, lam, threads())
        mean, cov = out[:, 3 : 3 + m], out[:, 3 + m :].reshape(count, m, m)
        return ArrayStatistics(out[:, 0] - self.log_norm, mean, cov, out[:, 1], out[:, 2])

    def _reference(self, lam: np.ndarray) -> ArrayStatistics:
        given = (self.rewards, lam, self.center, self.log_weights, self.groups)
        tensors: Iterator[Any] = (None if x is None else torch.as_tensor(np.ascontiguousarray(x)) for x in given)
        moments = reference.map_statistics(*tensors)
        return ArrayStatistics(**{name: x.numpy() for name, x in moments.items()})

    @cached_property
    def log_norm(self) -> float:
        """log Σ w, with groups its mean over them."""
        n = len(self.rewards)
        if self.log_weights is None:
            return log(n) if self.offsets is None else float(np.log(np.diff(self.offsets)).mean())
        starts = [0] if self.offsets is None else self.offsets[:-1]
        ordered = self.log_weights if self.order is None else self.log_weights[self.order]
        largest = np.maximum.reduceat(ordered, starts)
        if not (largest > -np.inf).all():
            what = "" if self.groups is None else " in every group"
            raise UserError(f"weights must be positive in at least one row{what}, got none")
        apart = np.exp(ordered - np.repeat(largest, np.diff(np.append(starts, n))))
        return float((largest + np.log(np.add.reduceat(apart, starts))).mean())


def rows_by_group(groups: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Row numbers sorted by group, None if they already are; and the offset of each group in them, then n."""
    order = None
    if (groups[1:] < groups[:-1]).any():
        order = np.argsort(groups, kind="stable").astype(np.int64, copy=False)
        groups = groups[order]
    bounds = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    return order, np.concatenate(([0], bounds, [len(groups)])).astype(np.int64)


def _statistics_cpu(rewards, lam, center, log_weights, groups):
    if rewards.stride(1) != 1:
        rewards = rewards.contiguous()
    run = MapPass(
        rewards.numpy(),
        center=None if center is None else center.double().numpy(),
        log_weights=None if log_weights is None else log_weights.double().contiguous().numpy(),
        groups=None if groups is None else groups.numpy(),
    )
    moments = run(lam.double().reshape(-1, rewards.shape[1]).numpy())
    leading = lam.shape[:-1]
    return tuple(torch.from_numpy(np.array(x)).reshape((*leading, *x.shape[1:])) for x in moments)


statistics_op: Op = define(
    "map_statistics(Tensor rewards, Tensor lam, Tensor? center, Tensor? log_weights, Tensor? groups) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _statistics_cpu,
    lambda rewards, lam, *_: empty.map_statistics(rewards, lam),
    triton="map_statistics.statistics",
)


def _check(rewards, lam, center, log_weights, groups) -> None:
    named = {"rewards": rewards, "lam": lam, "center": center, "log_weights": log_weights, "groups": groups}
    for name, x in named.items():
        if x is None and name not in ("rewards", "lam"):
            continue
        checks.tensor(name, x)
        if name == "groups":
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
                raise checks.WrongType(f"groups must be integers, got {x.dtype}")
        elif x.dtype not in (torch.float32, torch.float64):
            raise checks.WrongType(f"{name} must be float32 or float64, got {x.dtype}")
        if x.device != rewards.device:
            raise UserError(f"{name} must be on rewards' device, got {x.device} and {rewards.device}")
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise UserError(f"rewards must have shape (n, m) with n, m >= 1, got {tuple(rewards.shape)}")
    n, m = rewards.shape
    if lam.ndim not in (1, 2) or lam.shape[-1] != m or lam.numel() == 0:
        raise UserError(f"lam must have shape ({m},) or (K, {m}), got {tuple(lam.shape)}")
    for name, size in (("center", m), ("log_weights", n), ("groups", n)):
        if named[name] is not None and named[name].shape != (size,):
            raise UserError(f"{name} must have shape ({size},), got {tuple(named[name].shape)}")
    # Elsewhere the comparison would wait for the device, and they give NaN.
    if log_weights is not None and log_weights.device.type == "cpu" and not bool((log_weights < float("inf")).all()):
        raise UserError("log_weights must be below infinity and not NaN")
