"""What one set of scored candidates allows: fronts, random λ, paths to palettes, and other alignment methods for
comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.former import renamed
from fastalign._base.units import counted
from fastalign.decode.estimates import TRUSTED_ESS, best_of_curve, best_of_n_kl
from fastalign.palette.front import Policies, Region, Tilts, Way, front_of, palette_path, region_of, spread_directions
from fastalign.palette.pareto import hypervolume
from fastalign.report.duals import Dual, both

DIRECTIONS, CURVE, SURFACE, WEIGHTS = 28, 41, 105, 7
L1_MAX = 4.0  # of random λ, in units of 1 / σ


@dataclass(frozen=True)
class Study:
    """The result of `study`. Policies act within each prompt, or with `joint` over all candidates at once."""

    values: list[str]
    rewards: np.ndarray = field(repr=False)  # (P, N, m)
    joint: bool
    before: np.ndarray  # (m,)
    std: np.ndarray  # (m,) standard deviations of the units: within prompts, or of all candidates
    ks: list[int]  # numbers N of best-of-N; each front is at its KL
    directions: np.ndarray  # (K, m)
    fronts: dict[float, Policies]  # by KL
    limit: Policies
    region: Region
    l1_max: float
    beta: float  # of the linear scalarisation, for rewards in units of `std`
    scalarised: Policies
    best_of: dict[int, np.ndarray]  # by N, (K, m)
    palettes: dict[str, Way]
    duals: dict[str, tuple[Dual, Dual]]  # both forms at each palette; empty for a single prompt
    soups: np.ndarray | None  # (S, m)
    soup_names: list[str]  # S

    def __repr__(self) -> str:
        drawn = f"{counted(self.rewards.shape[0], 'prompt')} × {self.rewards.shape[1]}"
        marked = f"{counted(len(self.palettes), 'palette')}, {counted(len(self.soup_names), 'soup')}"
        return f"Study: {', '.join(self.values)} of {drawn}, {marked}"

    @cached_property
    def _tilts(self) -> Tilts:
        return _tilts(self.rewards, self.joint)

    @property
    def samples(self) -> int:
        """The maximum of an effective sample size."""
        return self.rewards.shape[0] * self.rewards.shape[1] if self.joint else self.rewards.shape[1]

    def hypervolumes(self) -> list[tuple[str, int, float]]:
        """(name, number of points, hypervolume in units of the standard deviation above the lowest level of each value
        in any set)."""
        sets = {f"front at KL {kl:.2f}": front.levels for kl, front in self.fronts.items()}
        sets |= {"limit of these candidates": self.limit.levels}
        sets |= {f"best of {n}": levels for n, levels in self.best_of.items()}
        sets |= {f"linear scalarisation, β {self.beta:.3g}": self.scalarised.levels}
        if self.soups is not None:
            sets["merged models"] = self.soups
        unit = np.where(self.std > 0, self.std, 1.0)
        lowest = np.min([x.min(axis=0) for x in sets.values()], axis=0) / unit
        return [(name, len(x), hypervolume(x / unit, lowest)) for name, x in sets.items()]

    def to_json(self) -> dict[str, Any]:
        """Every point, as plain lists."""
        return {
            "kind": "pareto",
            "version": 1,
            "values": self.values,
            "prompts": self.rewards.shape[0],
            "candidates": self.rewards.shape[1],
            "dual": "joint" if self.joint else "per_prompt",
            "before": self.before.tolist(),
            "std": self.std.tolist(),
            "directions": self.directions.tolist(),
            "fronts": [{"at": kl, **_lists(front)} for kl, front in self.fronts.items()],
            "limit": _lists(self.limit),
            "scalarised": {"beta": self.beta, **_lists(self.scalarised)},
            "best_of": [{"n": n, "kl": best_of_n_kl(n), "levels": x.tolist()} for n, x in self.best_of.items()],
            "soups": None if self.soups is None else self.soups.tolist(),
            "soup_names": self.soup_names,
            "palettes": [
                {
                    "name": name,
                    "palette": way.palette.tolist(),
                    "reachable": way.limit,
                    "t": way.t.tolist(),
                    **_lists(way.policies),
                    "duals": [each.to_json() for each in self.duals.get(name, ())],
                }
                for name, way in self.palettes.items()
            ],
            "region": {
                "l1_max": self.l1_max,
                "desirable": self.region.desirable.tolist(),
                **_lists(self.region.policies),
            },
            "hypervolumes": [{"of": name, "points": n, "volume": v} for name, n, v in self.hypervolumes()],
        }

    def figures(self, pairs: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
        """matplotlib figures by name: front, front3d (from three values on), region, ess, path, radar, histograms.

        pairs: which values to draw against each other; default all, or the 15 pairs with the strongest trade-off.
        """
        from fastalign.report import figures as plots

        m, unit = len(self.values), np.where(self.std > 0, self.std, 1.0)
        drawn, cloud = {}, self.region.policies
        ends = {name: _last(way.policies) for name, way in self.palettes.items()}
        targets = np.array([way.palette for way in self.palettes.values()]) if self.palettes else None
        if m > 1:
            shown = plots.pairs(cloud.levels) if pairs is None else list(pairs)
            drawn["front"] = plots.fronts(
                self.values,
                {pair: self._pair(*pair) for pair in shown},
                before=self.before,
                cloud=cloud.levels,
                desirable=self.region.desirable,
                palettes=targets,
                soups=self.soups,
                soup_names=self.soup_names,
            )
        if m > 2:
            drawn["front3d"] = self._in_three(plots, targets)
            series = {name: end.levels for name, end in ends.items()}
            if series:
                drawn["radar"] = plots.radar(
                    self.values, {"before": self.before, **series}, before=self.before, std=unit
                )
        if m > 1:
            drawn["region"] = plots.region(
                self.values,
                cloud.lam * unit,
                self.region.desirable,
                shown=shown,
                chosen={name: end.lam * unit for name, end in ends.items()},
            )
        drawn["ess"] = plots.samples_left(
            cloud.kl,
            cloud.ess,
            self.region.desirable,
            samples=self.samples,
            trusted=TRUSTED_ESS,
            fronts={kl: (x.kl, x.ess) for kl, x in self.fronts.items()},
            chosen=(np.array([end.kl for end in ends.values()]), np.array([end.ess for end in ends.values()]))
            if ends
            else None,
        )
        if self.palettes:
            drawn |= palette_figures(self.values, self.rewards, list(self.palettes.values())[-1], joint=self.joint)
        return drawn

    def _pair(self, i: int, j: int):
        from fastalign.report.figures import Shown

        m = len(self.values)
        around, few = (spread_directions(m, count, columns=(i, j)) for count in (CURVE, WEIGHTS))
        # Not quite to the axes, where ties between candidates would leave the other value undetermined.
        nudged = np.maximum(around, 1e-3 * (spread_directions(m, 3, columns=(i, j))[1] > 0))
        return Shown(
            fronts={kl: front_of(self._tilts, kl, around).levels[:, [i, j]] for kl in self.fronts},
            limit=front_of(self._tilts, np.inf, nudged).levels[:, [i, j]],
            scalarised=self._tilts.at(_simplex(few) / self.beta / self._tilts.scale).levels[:, [i, j]],
            best_of={n: x[:, [i, j]] for n, x in _best_of(self.rewards, few / self._tilts.scale, self.ks).items()}
            if self.best_of
            else {},
        )

    def _in_three(self, plots, targets):
        columns = [0, 1, 2]
        m = len(self.values)
        lattice, few = (spread_directions(m, count, columns=columns) for count in (SURFACE, DIRECTIONS))
        kl = max(self.fronts)
        shown = plots.Shown(
            fronts={kl: front_of(self._tilts, kl, lattice).levels[:, columns]},
            scalarised=self._tilts.at(_simplex(few) / self.beta / self._tilts.scale).levels[:, columns],
            best_of={n: x[:, columns] for n, x in _best_of(self.rewards, few / self._tilts.scale, self.ks[-1:]).items()}
            if self.best_of
            else {},
        )
        return plots.front_in_three(
            self.values[:3],
            lattice[:, columns],
            shown,
            before=self.before[columns],
            palettes=None if targets is None else targets[:, columns],
            soups=None if self.soups is None else self.soups[:, columns],
            soup_names=self.soup_names,
        )


@renamed(n_lambda="n_lam")
def study(
    values: Sequence[str],
    rewards: np.ndarray,
    *,
    palettes: Mapping[str, np.ndarray] | None = None,
    soups: np.ndarray | None = None,
    soup_names: Sequence[str] | None = None,
    joint: bool = False,
    n_lam: int = 1000,
    l1_max: float = L1_MAX,
    seed: int = 0,
) -> Study:
    """Fronts at the KL of best-of-N for a few N, random λ, and the paths to `palettes`, over the same candidates.

    values: m names. rewards: (P, N, m), finite. palettes: levels (m,) to reach, by name. soups: (S, m), levels of other
    models, such as merged ones; soup_names: S, default their indices. joint: over all candidates at once, which also
    reweights the prompts. n_lam, l1_max, seed: for the random λ, see `palette.feasible_region`. Raises UserError if
    shapes do not match or a number is not finite.
    """
    rewards = np.asarray(rewards)
    if rewards.ndim != 3:
        raise UserError(f"rewards must be (prompts, candidates, values), got shape {rewards.shape}")
    n, m = rewards.shape[1:]
    if len(values) != m:
        raise UserError(f"values must name the {m} rewards, got {len(values)}")
    if soups is not None:
        soups = np.atleast_2d(np.asarray(soups, dtype=np.float64))
        if soups.ndim != 2 or soups.shape[1] != m:
            raise UserError(f"soups must have one level for each of the {m} values, got {soups.shape[-1]}")
        if not np.isfinite(soups).all():
            raise UserError(f"soups must be finite, got {soups[~np.isfinite(soups)][0]}")
    points = 0 if soups is None else len(soups)
    soup_names = [str(k) for k in range(points)] if soup_names is None else list(soup_names)
    if len(soup_names) != points:
        raise UserError(f"soup_names must be {points}, one for each of soups, got {len(soup_names)}")
    tilts = _tilts(rewards, joint)
    several = n > 1 and not joint
    # Best-of-N can be estimated from n candidates while N is well below n; each N is 4 times the previous one.
    most = 2 ** max(1, int(np.log2(max(1, n // 4)))) if several else 64
    ks = [k for k in (most // 16, most // 4, most) if k > 1]
    # No front lies beyond the samples' limit: at a larger KL it is the limit again.
    directions = spread_directions(m, DIRECTIONS)
    limit = front_of(tilts, np.inf, np.maximum(directions, 1e-3))
    budgets = [best_of_n_kl(k) for k in ks if best_of_n_kl(k) < limit.kl.max()] or [best_of_n_kl(ks[0])]
    even = front_of(tilts, budgets[(len(budgets) - 1) // 2], np.ones((1, m)))
    strength = float((even.lam * tilts.scale).sum())
    beta = 1.0 / strength if strength > 0 else 1.0
    groups = groups_of(rewards, joint)
    rows = flat(rewards)
    return Study(
        values=list(values), rewards=rewards, joint=joint, before=tilts.mean,
        std=np.where(tilts.constant, 0.0, tilts.scale), ks=ks, directions=directions,
        fronts={kl: front_of(tilts, kl, directions) for kl in budgets}, limit=limit,
        region=region_of(tilts, n_lam, l1_max, seed), l1_max=l1_max, beta=beta,
        scalarised=tilts.at(_simplex(directions) / beta / tilts.scale),
        best_of=_best_of(rewards, directions / tilts.scale, ks) if several else {},
        palettes={name: palette_path(rows, c, groups=groups) for name, c in (palettes or {}).items()},
        duals={name: both(rewards, c) for name, c in (palettes or {}).items()} if len(rewards) > 1 else {}, soups=soups,
        soup_names=soup_names,
    )  # fmt: skip


def palette_figures(values: Sequence[str], rewards: np.ndarray, way: Way, *, joint: bool) -> dict[str, Any]:
    """Figures for one palette: the path to it (λ, KL and effective sample size), and histograms before and after."""
    from fastalign.report import figures as plots

    tilts, end = _tilts(rewards, joint), _last(way.policies)
    scores = rewards.astype(np.float64) @ end.lam
    weights = np.exp(scores - (scores.max() if joint else scores.max(axis=1, keepdims=True)))
    weights /= weights.sum() if joint else weights.sum(axis=1, keepdims=True)
    samples = rewards.shape[0] * rewards.shape[1] if joint else rewards.shape[1]
    return {
        "path": plots.path(
            values,
            way.t,
            way.policies.lam * tilts.scale,
            way.policies.kl,
            way.policies.ess,
            limit=way.limit,
            samples=samples,
        ),
        "histograms": plots.histograms(
            rewards.reshape(-1, len(values)), None, values, weights=weights.ravel(), palette=way.palette
        ),
    }


def _tilts(rewards: np.ndarray, joint: bool) -> Tilts:
    return Tilts(flat(rewards), groups=groups_of(rewards, joint))


def flat(rewards: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rewards.reshape(-1, rewards.shape[2]))


def groups_of(rewards: np.ndarray, joint: bool) -> np.ndarray | None:
    """The prompt of each row of `flat`; None if there is only one group."""
    return None if joint else np.repeat(np.arange(len(rewards)), rewards.shape[1])


def _best_of(rewards: np.ndarray, weights: np.ndarray, ks: Sequence[int]) -> dict[int, np.ndarray]:
    """By N in ks, the levels (K, m) of best-of-N by w·R, for the K rows of weights."""
    curves = [best_of_curve(rewards, w, ks).values for w in weights]
    return {k: np.array([curve[at] for curve in curves]) for at, k in enumerate(ks)}


def _simplex(directions: np.ndarray) -> np.ndarray:
    return directions / directions.sum(axis=1, keepdims=True)


def _last(policies: Policies) -> Policies:
    return Policies(*(x[-1] for x in policies))


def _lists(policies: Policies) -> dict[str, list]:
    return {"lambda": policies.lam.tolist(), **{k: x.tolist() for k, x in policies._asdict().items() if k != "lam"}}
