"""One pass over the rewards, wherever they are: in an array, on a GPU, in chunks on disk, or in shards on many ranks.

The solver accesses the data only through a `Pass`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fastalign._base.errors import UserError
from fastalign.ops.map_statistics import ArrayStatistics, MapPass, map_statistics
from fastalign.palette.inputs import reject_nonfinite

if TYPE_CHECKING:
    from fastalign.palette.sources import ParquetRewards


class Pass(Protocol):
    """Called at λ (K, m) it returns `ArrayStatistics` of numpy arrays."""

    @property
    def center(self) -> np.ndarray:
        """(m,) a point amid the data, so that an offset costs no digits; moments are relative to it."""

    @property
    def size(self) -> np.ndarray:
        """(m,) the rewards' root mean square on some of the rows."""

    @property
    def eps(self) -> float:
        """The rounding of the rewards' own dtype."""

    @property
    def rows(self) -> int: ...

    @property
    def group_count(self) -> int:
        """0 in the joint form."""

    @property
    def total(self) -> float:
        """log Σ weights, or with groups the log of their number: the weight of this pass in a merge."""

    def __call__(self, lam: np.ndarray) -> ArrayStatistics: ...

    def part(self, rows: int) -> Pass | None:
        """A pass over about that many of the rows; None if they may not be representative: with groups or weights."""

    def reject_nonfinite(self) -> None:
        """Raises UserError on the first NaN or infinite reward."""


class ArrayPass(MapPass):
    """A pass over an array in memory, or memory-mapped; read in place."""

    rows: int
    group_count: int

    def __init__(
        self,
        rewards: np.ndarray,
        *,
        center: np.ndarray | None = None,
        log_weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ):
        self.some: np.ndarray = rewards[:: max(1, len(rewards) // 256)].astype(np.float64)
        if center is None:
            with np.errstate(all="ignore"):  # the first pass detects NaN and infinity
                # In the rewards' own precision, so that float32 subtracts exactly what float64 adds back.
                center = (self.some.sum(axis=0) / len(self.some)).astype(rewards.dtype)
        super().__init__(rewards, center=center, log_weights=log_weights, groups=groups)
        self.rows, self.group_count = len(rewards), 0 if self.offsets is None else len(self.offsets) - 1

    @property
    def eps(self) -> float:
        return float(np.finfo(self.rewards.dtype).eps)

    @property
    def size(self) -> np.ndarray:
        return np.sqrt((self.some * self.some).mean(axis=0))

    @property
    def total(self) -> float:
        return float(np.log(self.group_count)) if self.group_count else self.log_norm

    def part(self, rows: int) -> ArrayPass | None:
        if self.groups is not None or self.log_weights is not None:
            return None
        return ArrayPass(self.rewards[:: self.rows // rows], center=self.center)

    def reject_nonfinite(self) -> None:
        reject_nonfinite(self.rewards)


class DevicePass:
    """A pass over a tensor on a GPU, which stays there."""

    center: np.ndarray
    size: np.ndarray
    eps: float
    log_weights: np.ndarray | None
    groups: np.ndarray | None
    total: float
    group_count: int

    def __init__(
        self, rewards: torch.Tensor, *, log_weights: np.ndarray | None = None, groups: np.ndarray | None = None
    ):
        self.rewards = rewards
        self.sample: ArrayPass = ArrayPass(self._fetch(rewards))
        self.center, self.size, self.eps = self.sample.center, self.sample.size, self.sample.eps
        self.rows: int = len(rewards)
        self.log_weights, self.groups = log_weights, groups
        move = lambda x: None if x is None else torch.as_tensor(x, device=rewards.device)  # noqa: E731
        self.options: dict[str, torch.Tensor | None] = {
            "center": move(self.center),
            "log_weights": move(log_weights),
            "groups": move(groups),
        }
        # The weights are on the host: they are summed and checked there.
        whole = np.zeros((self.rows, 1), dtype=np.float32)
        alike = ArrayPass(whole, log_weights=log_weights, groups=groups)
        self.total, self.group_count = alike.total, alike.group_count

    @staticmethod
    def _fetch(rows: torch.Tensor) -> np.ndarray:
        stride = max(1, len(rows) // 4096)
        return rows[::stride].contiguous().cpu().numpy()

    def __call__(self, lam: np.ndarray) -> ArrayStatistics:
        lam = torch.as_tensor(lam, dtype=torch.float64, device=self.rewards.device)
        return ArrayStatistics(*(x.cpu().numpy() for x in map_statistics(self.rewards, lam, **self.options)))

    def part(self, rows: int) -> ArrayPass | None:
        if self.groups is not None or self.log_weights is not None:
            return None
        return ArrayPass(self.rewards[:: self.rows // rows].contiguous().cpu().numpy(), center=self.center)

    def reject_nonfinite(self) -> None:
        reject_nonfinite(self.rewards.cpu().numpy())


def merge(parts: list[ArrayStatistics], totals: list[float], grouped: bool) -> tuple[ArrayStatistics, float]:
    """The statistics of all rows from those of disjoint parts relative to one center, and the parts' total.

    totals: each part's log Σ weights, or with groups, the log of its number of groups (no group may be split).
    """
    share = np.array(totals)
    total = float(np.logaddexp.reduce(share))
    log_share = (share - total)[:, None]
    stack = ArrayStatistics(*(np.stack(each) for each in zip(*parts, strict=True)))
    if grouped:
        p = np.exp(log_share)
        wide, square = p[:, :, None], p[:, :, None, None]
        return ArrayStatistics(
            (p * stack.log_z).sum(0),
            (wide * stack.mean).sum(0),
            (square * stack.cov).sum(0),
            (p * stack.ess).sum(0),
            (p * stack.max_score).sum(0),
        ), total
    mass = stack.log_z + log_share
    log_z = np.logaddexp.reduce(mass, axis=0)
    p = np.exp(mass - log_z)
    p /= p.sum(0)  # logarithms of huge scores have no digits after the point
    mean = (p[:, :, None] * stack.mean).sum(0)
    apart = stack.mean - mean
    between = apart[:, :, :, None] * apart[:, :, None, :]
    cov = (p[:, :, None, None] * (stack.cov + between)).sum(0)
    return ArrayStatistics(log_z, mean, cov, 1.0 / (p * p / stack.ess).sum(0), stack.max_score.max(0)), total


class ChunkedPass:
    """A pass over chunks of rows that are read again in every pass; see `sources`. One more read takes a sample of
    them."""

    source: ParquetRewards
    grouped: bool
    rows: int
    center: np.ndarray
    size: np.ndarray
    eps: float
    total: float

    def __init__(self, source: ParquetRewards):
        self.source, self.grouped = source, source.grouped
        kept, self.rows = [], 0
        stride = max(1, source.rows // source.sample_rows)
        for rewards, _, _ in source:
            kept.append(np.array(rewards[-self.rows % stride :: stride]))
            self.rows += len(rewards)
        if not self.rows:
            raise UserError("rewards must hold at least one sample and one reward, got no rows")
        self.sample: ArrayPass = ArrayPass(np.concatenate(kept))
        self.center, self.size, self.eps, self.total = self.sample.center, self.sample.size, self.sample.eps, np.nan

    def __call__(self, lam: np.ndarray) -> ArrayStatistics:
        merged: tuple[ArrayStatistics, float] | None = None
        for rewards, log_weights, groups in self.source:
            if log_weights is not None and not self.grouped and not (log_weights > -np.inf).any():
                continue
            run = ArrayPass(rewards, center=self.center, log_weights=log_weights, groups=groups)
            mine = run(lam)
            if merged is None:
                merged = mine, run.total
            else:
                merged = merge([merged[0], mine], [merged[1], run.total], self.grouped)
        if merged is None:
            raise UserError("weights must be positive in at least one row, got none")
        moments, self.total = merged
        return moments

    @property
    def group_count(self) -> int:
        return round(np.exp(self.total)) if self.grouped else 0

    def part(self, rows: int) -> ArrayPass | None:
        if self.grouped or self.source.weighted:
            return None
        return ArrayPass(self.sample.rewards[:: max(1, self.sample.rows // rows)], center=self.center)

    def reject_nonfinite(self) -> None:
        for rewards, _, _ in self.source:
            if not np.isfinite(rewards).all():
                reject_nonfinite(rewards)
        reject_nonfinite(self.sample.rewards)


class ShardedPass:
    """A pass over the rows of all ranks of a torch.distributed group: each rank has its own rows and gets the same
    answer."""

    own: Pass
    group: Any
    grouped: bool
    rows: int
    eps: float
    center: np.ndarray
    shift: np.ndarray
    total: float

    def __init__(self, own: Pass, process_group: Any, grouped: bool):
        import torch.distributed as dist

        self.own, self.group, self.grouped = own, process_group, grouped
        device = "cuda" if dist.get_backend(process_group) == "nccl" else "cpu"
        self.device: torch.device = torch.device(device)
        m = len(own.center)
        gathered = self._gather(np.concatenate(([own.rows, own.eps], own.center, own.size)))
        weight = gathered[:, 0] / gathered[:, 0].sum()
        self.rows, self.eps = int(gathered[:, 0].sum()), float(gathered[:, 1].max())
        self.size: np.ndarray = np.sqrt(weight @ gathered[:, 2 + m :] ** 2)
        self._recenter(weight @ gathered[:, 2 : 2 + m])

    def _recenter(self, center: np.ndarray) -> None:
        """Moves the statistics of all ranks from their own centers to a common one."""
        self.center, self.shift = center, self.own.center - center

    def _gather(self, values: np.ndarray) -> np.ndarray:
        import torch.distributed as dist

        mine = torch.as_tensor(np.ascontiguousarray(values), device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone).cpu().numpy()

    def __call__(self, lam: np.ndarray) -> ArrayStatistics:
        moments = self.own(lam)
        count, m = lam.shape
        score = lam @ self.shift
        packed = np.concatenate(
            [
                np.full((count, 1), self.own.total),
                (moments.log_z + score)[:, None],
                moments.ess[:, None],
                (moments.max_score + score)[:, None],
                moments.mean + self.shift,
                moments.cov.reshape(count, m * m),
            ],
            axis=1,
        )
        gathered = self._gather(packed)
        parts = [
            ArrayStatistics(x[:, 1], x[:, 4 : 4 + m], x[:, 4 + m :].reshape(count, m, m), x[:, 2], x[:, 3])
            for x in gathered
        ]
        merged, self.total = merge(parts, list(gathered[:, 0, 0]), self.grouped)
        return merged

    def part(self, rows: int) -> ShardedPass | None:
        import torch.distributed as dist

        share = max(1, rows // dist.get_world_size(self.group))
        own = self.own.part(share) if self.own.rows >= share else None
        if not self._gather(np.array([own is not None])).all() or own is None:  # every rank takes the same branch
            return None
        return ShardedPass(own, self.group, self.grouped)

    @property
    def group_count(self) -> int:
        return round(np.exp(self.total)) if self.grouped else 0

    def reject_nonfinite(self) -> None:
        failed = ""
        if not np.isfinite(self.own(np.zeros((1, len(self.center)))).cov).all():
            try:
                self.own.reject_nonfinite()
            except UserError as error:
                failed = str(error)
        together(failed, self.group)


def together(failed: str, process_group: Any) -> None:
    """Raises on every rank an error that occurred on any, so that no rank waits for one that failed."""
    import torch.distributed as dist

    failures: list = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(failures, failed, group=process_group)
    for rank, message in enumerate(failures):
        if message:
            raise UserError(f"{message} (on rank {rank})")
