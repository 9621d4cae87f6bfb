"""Rewards that do not fit in memory: read from disk in chunks of rows, once per pass of the solver.

A memory-mapped array (`numpy.load(path, mmap_mode="r")`) needs none of this: the solver reads it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign._base.tables import readable

CHUNK_ROWS = 1 << 18
SAMPLE_ROWS = 1 << 17  # kept in memory, for the starting point


class ParquetRewards:
    """The columns `values` of one or several Parquet files, as rewards that `solve` reads without loading them into
    memory.

    path: a file, a folder of .parquet files, or a list of files. values: the columns' names, one for each reward.
    groups, weights: the names of the columns with the prompt's index (rows sorted by it) and with the rows' weights.
    Raises UserError on a missing or non-numeric column and, while reading, on missing values and unsorted groups.
    """

    paths: list[Path]
    values: list[str]
    groups: str | None
    weights: str | None
    grouped: bool
    weighted: bool
    chunk_rows: int
    sample_rows: int
    rows: int

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        values: Sequence[str],
        *,
        groups: str | None = None,
        weights: str | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ):
        import pyarrow.parquet as pq

        paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
        paths = [file for p in paths for file in (sorted(p.glob("*.parquet")) if p.is_dir() else [p])]
        if not paths:
            raise UserError(f"rewards must come from at least one Parquet file, found none in {path}")
        self.paths, self.values, self.groups, self.weights = paths, list(values), groups, weights
        self.grouped, self.weighted = groups is not None, weights is not None
        self.chunk_rows, self.sample_rows, self.rows = chunk_rows, SAMPLE_ROWS, 0
        self.columns: list[str] = [*self.values, *(name for name in (groups, weights) if name is not None)]
        wide = False
        for file in paths:
            check_input(file)
            with readable(file, "a Parquet"):
                known, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
            for name in self.columns:
                if name not in known.names:
                    raise UserError(f"{file}: has no column {name!r}, only {', '.join(known.names)}")
                kind = known.field(name).type.to_pandas_dtype()
                if np.dtype(kind).kind not in ("iu" if name == groups else "fiub"):
                    wanted = "integers" if name == groups else "numbers"
                    raise UserError(f"{file}: column {name!r} must hold {wanted}, got {known.field(name).type}")
                wide = wide or (name in self.values and np.dtype(kind) not in (np.float32, np.float16))
            self.rows += rows
        if not self.rows or not self.values:
            raise UserError(
                f"rewards must hold at least one sample and one reward, got {self.rows} rows of {self.values}"
            )
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
        """(rewards (k, m), log weights or None, groups or None), chunk by chunk; no group is split."""
        if not self.grouped:
            yield from self._chunks()
            return
        kept: list[tuple] = []
        last = None
        for chunk in self._chunks():
            ids = chunk[2]
            if (ids[1:] < ids[:-1]).any() or (last is not None and ids[0] < last):
                raise UserError(f"rows must be sorted by {self.groups!r} to be read in chunks")
            last = ids[-1]
            cut = int(np.searchsorted(ids, last))  # the last group may continue
            if cut or (kept and kept[0][2][0] != last):
                kept.append(tuple(None if x is None else x[:cut] for x in chunk))
                yield _joined(kept)
                kept = []
            kept.append(tuple(None if x is None else x[cut:] for x in chunk))
        yield _joined(kept)

    def _chunks(self):
        import pyarrow.parquet as pq

        for path in self.paths:
            with readable(path, "a Parquet"), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(self.chunk_rows, columns=self.columns):
                    if not batch.num_rows:
                        continue
                    rewards = np.empty((batch.num_rows, len(self.values)), dtype=self.dtype)
                    for j, name in enumerate(self.values):
                        rewards[:, j] = self._column(batch, name, path)
                    groups = None if self.groups is None else self._column(batch, self.groups, path)
                    yield rewards, self._log_weights(batch, path), groups

    def _log_weights(self, batch, path) -> np.ndarray | None:
        if self.weights is None:
            return None
        weights = self._column(batch, self.weights, path).astype(np.float64)
        bad = ~((weights >= 0) & (weights < np.inf))
        if bad.any():
            raise UserError(f"{path}: weights must be finite and not negative, got {weights[bad.argmax()]}")
        with np.errstate(divide="ignore"):
            return np.log(weights)

    @staticmethod
    def _column(batch, name: str, path) -> np.ndarray:
        column = batch.column(name)
        if column.null_count:
            raise UserError(f"{path}: column {name!r} must have no missing values, got {column.null_count}")
        return column.to_numpy(zero_copy_only=False)


def _joined(parts: list[tuple]) -> tuple:
    return tuple(None if each[0] is None else np.concatenate(each) for each in zip(*parts, strict=True))
