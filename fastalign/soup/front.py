"""Measured values of soups along ρ, without writing soups, and the best ρ for a palette."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastalign._base.error_bars import standard_error
from fastalign._base.errors import UserError
from fastalign._base.files import read_json, write_json
from fastalign._base.units import counted
from fastalign.data.palettes import LARGEST


@dataclass(frozen=True)
class SoupFront:
    """K soups of m models, measured by d values on the same P prompts with n candidates each.

    means: each prompt's mean over its candidates. std: standard deviation of each value over all candidates.
    """

    values: list[str]
    models: list[str]
    rho: np.ndarray  # (K, m)
    means: np.ndarray = field(repr=False)  # (K, P, d)
    std: np.ndarray  # (d,)
    candidates: int
    chosen: dict[str, Any] | None = None

    def __repr__(self) -> str:
        drawn = f"{counted(self.means.shape[1], 'prompt')} × {self.candidates}"
        soups = f"{counted(len(self.rho), 'soup')} of {', '.join(self.models)}"
        return f"SoupFront: {soups} by {', '.join(self.values)}, {drawn}"

    @property
    def levels(self) -> np.ndarray:
        """(K, d): each soup's mean values."""
        return self.means.mean(axis=1)

    @property
    def stderr(self) -> np.ndarray:
        """(K, d): standard errors over prompts, including the draw of candidates; NaN for a single prompt."""
        return standard_error(self.means, axis=1)

    def write(self, path: str | Path) -> None:
        write_json(path, {
            "kind": "soup_front", "version": 1, "values": self.values, "models": self.models, "rho": self.rho.tolist(),
            "levels": self.levels.tolist(),
            "stderr": [[None if np.isnan(x) else x for x in row] for row in self.stderr.tolist()],
            "std": self.std.tolist(), "prompts": self.means.shape[1], "candidates": self.candidates,
            "means": self.means.tolist(), "chosen": self.chosen,
        })  # fmt: skip

    @classmethod
    def read(cls, path: str | Path) -> SoupFront:
        """Raises FileNotFoundError or UserError, one line that names the file."""
        record = read_json(path, kind="soup_front")
        try:
            values, models, chosen = (record[name] for name in ("values", "models", "chosen"))
            means, rho, std = (np.array(record[name], dtype=np.float64) for name in ("means", "rho", "std"))
            for names in (values, models):
                if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
                    raise ValueError(f"values and models must be lists of names, got {names!r:.60}")
            shapes = (len(rho), means.shape[1], len(values)), (len(rho), len(models)), (len(values),)
            if (means.shape, rho.shape, std.shape) != shapes or 0 in means.shape:
                raise ValueError(f"means of shape {means.shape} do not fit {len(rho)} soups of {len(values)} values")
            palette = np.zeros(len(values)) if chosen is None else np.array(chosen["palette"], dtype=np.float64)
            if palette.shape != (len(values),):
                raise ValueError(f"chosen for other values than {', '.join(values)}")
            palette = palette[np.isfinite(palette)]  # the others are free
            if not all((np.abs(numbers) <= LARGEST).all() for numbers in (means, rho, std, palette)):
                raise ValueError(f"means, rho, std and the chosen palette must be finite, at most {LARGEST:g}")
            return cls(values, models, rho, means, std, int(record["candidates"]), chosen)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: not a whole soup_front file ({error})") from None


class Choice(NamedTuple):
    """A ρ for a palette. levels, stderr: interpolated between the measured soups, prompt by prompt; margin: the
    smallest (level - palette) / std of any value, at least 0 if the palette is reached; between: the soups' indices."""

    rho: np.ndarray  # (m,)
    levels: np.ndarray  # (d,)
    stderr: np.ndarray  # (d,)
    margin: float
    between: list[int]


def choose(front: SoupFront, palette: ArrayLike) -> Choice:
    """The ρ that maximises the smallest margin (level - palette) / std over all values, on the measured soups' surface.

    palette: (d,), levels to reach; a value of -inf is free. Between neighbouring ρ (the cells of a Delaunay
    triangulation) levels are assumed to be linear, so each cell is a small linear programme. The standard error is that
    of the interpolated prompts' means. It ignores that values are not linear between the measured ρ, and that the best
    of noisy points looks better than it is: measure the chosen ρ with another seed.
    """
    wanted = np.asarray(palette, dtype=np.float64)
    if wanted.shape != (len(front.values),) or np.isnan(wanted).any() or (wanted == np.inf).any():
        raise UserError(f"palette must have one level for each of {', '.join(front.values)}, got {palette!r}")
    kept = np.isfinite(wanted)
    if not kept.any():
        raise UserError("palette must ask for a level of one value at least")
    unit = np.where(front.std > 0, front.std, 1.0)
    margins = ((front.levels - wanted) / unit)[:, kept]
    best, at, shares = -np.inf, [0], np.ones(1)
    for cell in _cells(front.rho):
        corners = margins[cell]
        if corners.max(axis=0).min() <= best:
            continue
        value, mixture = _best_within(corners)
        if value > best:
            best, at, shares = value, cell, mixture
    used = [k for k, share in zip(at, shares, strict=True) if share > 1e-9]
    shares = shares[shares > 1e-9] / shares[shares > 1e-9].sum()
    means = np.tensordot(shares, front.means[used], 1)
    return Choice(shares @ front.rho[used], means.mean(axis=0), standard_error(means), float(best), used)


def _cells(rho: np.ndarray) -> Iterator[list[int]]:
    """Sets of neighbouring rows: in more than one dimension those of a Delaunay triangulation, or single rows if there
    is none."""
    flat = rho - rho.mean(axis=0)
    _, s, v = np.linalg.svd(flat, full_matrices=False)
    dimensions = int((s > 1e-9 * max(1.0, s[0])).sum())
    places = flat @ v[:dimensions].T
    if dimensions == 0:
        yield from ([k] for k in range(len(rho)))
    elif dimensions == 1:
        order = np.argsort(places[:, 0]).tolist()
        yield from (list(pair) for pair in itertools.pairwise(order))
    else:
        from scipy.spatial import Delaunay, QhullError

        try:
            yield from (cell.tolist() for cell in Delaunay(places).simplices)
        except QhullError:
            yield from ([k] for k in range(len(rho)))


def _best_within(corners: np.ndarray) -> tuple[float, np.ndarray]:
    """max over shares β ≥ 0, Σ β = 1 of the least of β · corners: the value and β. corners: (corners, values)."""
    from scipy.optimize import linprog

    count, d = corners.shape
    solved = linprog(
        np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-corners.T, np.ones(d)],
        b_ub=np.zeros(d),
        A_eq=np.r_[np.ones(count), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    if not solved.success:  # only rounding can cause this: take the best corner
        k = int(corners.min(axis=1).argmax())
        return float(corners[k].min()), np.eye(count)[k]
    return float(solved.x[-1]), np.maximum(solved.x[:-1], 0.0)
