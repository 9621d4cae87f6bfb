"""What one set of scored candidates allows: fronts, random λ, ways to palettes, and other ways of aligning beside them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.data import outputs
from fastalign.data import palettes as palette_files
from fastalign.data.files import atomic_write
from fastalign.decode.candidates import Candidates
from fastalign.decode.estimates import TRUSTED_ESS, best_of_curve, best_of_n_kl
from fastalign.errors import UserError
from fastalign.palette.front import Policies, Region, Tilts, Way, front_of, palette_path, region_of, spread_directions
from fastalign.palette.pareto import hypervolume
from fastalign.report.duals import Dual, both

DIRECTIONS, CURVE, SURFACE, WEIGHTS = 28, 41, 105, 7
L1_MAX = 4.0  # of random λ, in units of 1 / σ


@dataclass(frozen=True)
class Study:
    """What `study` found. Policies act within each prompt, or with `joint` over all candidates at once."""

    values: list[str]
    rewards: np.ndarray = field(repr=False)  # (P, N, m)
    joint: bool
    before: np.ndarray  # (m,)
    spread: np.ndarray  # (m,) standard deviations of the units: within prompts, or of all candidates
    ks: list[int]  # numbers N of best-of-N; each front is at that one's KL
    directions: np.ndarray  # (K, m)
    fronts: dict[float, Policies]  # by KL
    limit: Policies
    region: Region
    l1_max: float
    beta: float  # of the linear scalarisation, for rewards in units of `spread`
    scalarised: Policies
    best_of: dict[int, np.ndarray]  # by N, (K, m)
    palettes: dict[str, Way]
    duals: dict[str, tuple[Dual, Dual]]  # both forms at each of the palettes; none of a single prompt
    soups: np.ndarray | None  # (S, m)
    soup_names: list[str]  # S

    @cached_property
    def _tilts(self) -> Tilts:
        return _tilts(self.rewards, self.joint)

    @property
    def samples(self) -> int:
        """How many an effective sample size is out of."""
        return self.rewards.shape[0] * self.rewards.shape[1] if self.joint else self.rewards.shape[1]

    def hypervolumes(self) -> list[tuple[str, int, float]]:
        """(what, how many points, their volume in units of the spread, above the lowest level of each value in any)."""
        sets = {f"front at KL {kl:.2f}": found.levels for kl, found in self.fronts.items()}
        sets |= {"limit of these candidates": self.limit.levels}
        sets |= {f"best of {n}": levels for n, levels in self.best_of.items()}
        sets |= {f"linear scalarisation, β {self.beta:.3g}": self.scalarised.levels}
        if self.soups is not None:
            sets["merged models"] = self.soups
        unit = np.where(self.spread > 0, self.spread, 1.0)
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
            "spread": self.spread.tolist(),
            "directions": self.directions.tolist(),
            "fronts": [{"at": kl, **_lists(found)} for kl, found in self.fronts.items()],
            "limit": _lists(self.limit),
            "scalarised": {"beta": self.beta, **_lists(self.scalarised)},
            "best_of": [{"n": n, "kl": best_of_n_kl(n), "levels": x.tolist()} for n, x in self.best_of.items()],
            "soups": None if self.soups is None else self.soups.tolist(),
            "soup_names": self.soup_names,
            "palettes": [
                {
                    "name": name, "palette": way.palette.tolist(),
                    "reachable": way.limit, "t": way.t.tolist(), **_lists(way.policies),
                    "duals": [each.to_json() for each in self.duals.get(name, ())],
                }
                for name, way in self.palettes.items()
            ],
            "region": {
                "l1_max": self.l1_max, "desirable": self.region.desirable.tolist(), **_lists(self.region.policies),
            },
            "hypervolumes": [{"of": name, "points": n, "volume": v} for name, n, v in self.hypervolumes()],
        }  # fmt: skip

    def figures(self, pairs: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
        """matplotlib figures by name: front, front3d (from three values on), region, ess, path, radar, histograms.

        pairs: which values to draw against each other; default all, of many the 15 that trade off most.
        """
        from fastalign.palette import plots

        m, unit = len(self.values), np.where(self.spread > 0, self.spread, 1.0)
        found, cloud = {}, self.region.policies
        ends = {name: _last(way.policies) for name, way in self.palettes.items()}
        asked = np.array([way.palette for way in self.palettes.values()]) if self.palettes else None
        if m > 1:
            shown = plots.pairs(cloud.levels) if pairs is None else list(pairs)
            found["front"] = plots.fronts(
                self.values, {pair: self._pair(*pair) for pair in shown}, before=self.before, cloud=cloud.levels,
                desirable=self.region.desirable, palettes=asked, soups=self.soups,
                soup_names=self.soup_names,
            )  # fmt: skip
        if m > 2:
            found["front3d"] = self._in_three(plots, asked)
            series = {name: end.levels for name, end in ends.items()}
            if series:
                found["radar"] = plots.radar(
                    self.values, {"before": self.before, **series}, before=self.before, spread=unit
                )
        if m > 1:
            found["region"] = plots.region(
                self.values, cloud.lam * unit, self.region.desirable, shown=shown,
                chosen={name: end.lam * unit for name, end in ends.items()},
            )  # fmt: skip
        found["ess"] = plots.samples_left(
            cloud.kl, cloud.ess, self.region.desirable, samples=self.samples, trusted=TRUSTED_ESS,
            fronts={kl: (x.kl, x.ess) for kl, x in self.fronts.items()},
            chosen=tuple(np.array([getattr(end, name) for end in ends.values()]) for name in ("kl", "ess")) if ends else None,
        )  # fmt: skip
        if self.palettes:
            found |= palette_figures(self.values, self.rewards, list(self.palettes.values())[-1], joint=self.joint)
        return found

    def _pair(self, i: int, j: int):
        from fastalign.palette.plots import Shown

        m = len(self.values)
        around, few = (spread_directions(m, count, columns=(i, j)) for count in (CURVE, WEIGHTS))
        # Not quite to the axes: there ties between candidates would leave the other value undecided.
        nudged = np.maximum(around, 1e-3 * (spread_directions(m, 3, columns=(i, j))[1] > 0))
        return Shown(
            fronts={kl: front_of(self._tilts, kl, around).levels[:, [i, j]] for kl in self.fronts},
            limit=front_of(self._tilts, np.inf, nudged).levels[:, [i, j]],
            scalarised=self._tilts.at(_simplex(few) / self.beta / self._tilts.scale).levels[:, [i, j]],
            best_of={n: x[:, [i, j]] for n, x in _best_of(self.rewards, few / self._tilts.scale, self.ks).items()}
            if self.best_of
            else {},
        )

    def _in_three(self, plots, asked):
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
            self.values[:3], lattice[:, columns], shown, before=self.before[columns],
            palettes=None if asked is None else asked[:, columns],
            soups=None if self.soups is None else self.soups[:, columns], soup_names=self.soup_names,
        )  # fmt: skip


def study(
    values: Sequence[str], rewards: np.ndarray, *, palettes: Mapping[str, np.ndarray] | None = None,
    soups: np.ndarray | None = None, soup_names: Sequence[str] | None = None, joint: bool = False, n_lambda: int = 1000,
    l1_max: float = L1_MAX, seed: int = 0,
) -> Study:  # fmt: skip
    """Fronts at the KL of best-of-N for a few N, random λ, and the ways to `palettes`, over the same candidates.

    values: m names. rewards: (P, N, m), finite. palettes: levels (m,) by name, reached as at least. soups: (S, m),
    levels that other models reach, such as merged ones; soup_names: S, default their numbers. joint: over all candidates
    at once, which also tilts the prompts. n_lambda, l1_max, seed: of the random λ, see `palette.feasible_region`.
    Raises UserError where shapes do not match or a number is not finite.
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
    # Best of N is an estimate from n candidates while N is well below n; each is 4 times the one before.
    most = 2 ** max(1, int(np.log2(max(1, n // 4)))) if several else 64
    ks = [k for k in (most // 16, most // 4, most) if k > 1]
    # Samples can move no further than to their limit; a front beyond that is the limit again.
    directions = spread_directions(m, DIRECTIONS)
    limit = front_of(tilts, np.inf, np.maximum(directions, 1e-3))
    budgets = [best_of_n_kl(k) for k in ks if best_of_n_kl(k) < limit.kl.max()] or [best_of_n_kl(ks[0])]
    even = front_of(tilts, budgets[(len(budgets) - 1) // 2], np.ones((1, m)))
    strength = float((even.lam * tilts.scale).sum())
    beta = 1.0 / strength if strength > 0 else 1.0
    groups = _groups(rewards, joint)
    flat = _flat(rewards)
    return Study(
        values=list(values), rewards=rewards, joint=joint, before=tilts.mean, spread=np.where(tilts.constant, 0.0, tilts.scale),
        ks=ks, directions=directions, fronts={kl: front_of(tilts, kl, directions) for kl in budgets}, limit=limit,
        region=region_of(tilts, n_lambda, l1_max, seed), l1_max=l1_max, beta=beta,
        scalarised=tilts.at(_simplex(directions) / beta / tilts.scale),
        best_of=_best_of(rewards, directions / tilts.scale, ks) if several else {},
        palettes={name: palette_path(flat, c, groups=groups) for name, c in (palettes or {}).items()},
        duals={name: both(rewards, c) for name, c in (palettes or {}).items()} if len(rewards) > 1 else {}, soups=soups,
        soup_names=soup_names,
    )  # fmt: skip


def palette_figures(values: Sequence[str], rewards: np.ndarray, way: Way, *, joint: bool) -> dict[str, Any]:
    """Figures of the way to one palette: path (λ, KL and effective sample size) and histograms before and after."""
    from fastalign.palette import plots

    tilts, end = _tilts(rewards, joint), _last(way.policies)
    scores = rewards.astype(np.float64) @ end.lam
    weights = np.exp(scores - (scores.max() if joint else scores.max(axis=1, keepdims=True)))
    weights /= weights.sum() if joint else weights.sum(axis=1, keepdims=True)
    samples = rewards.shape[0] * rewards.shape[1] if joint else rewards.shape[1]
    return {
        "path": plots.path(
            values, way.t, way.policies.lam * tilts.scale, way.policies.kl, way.policies.ess, limit=way.limit, samples=samples
        ),
        "histograms": plots.histograms(
            rewards.reshape(-1, len(values)), None, values, weights=weights.ravel(),
            palette=way.palette,
        ),
    }  # fmt: skip


def write(
    scored: str | Path, out: str | Path, *, palettes: Sequence[str | Path] = (), quantiles: Sequence[float] = (),
    soups: Sequence[str | Path] = (), values: Sequence[str] | None = None, joint: bool = False, lambdas: int = 1000,
    l1_max: float = L1_MAX, seed: int = 0, overwrite: bool = False,
) -> Study | None:  # fmt: skip
    """The study of a scored file into the folder `out`: pareto.json, pareto.html, and each figure as SVG and PNG.

    palettes: palette files of these values and maybe others. quantiles: palettes that ask for this quantile of each value. soups:
    scored files of other models' candidates, each a point at its mean rewards, or soups.json files of `soup.walk`.
    values: which rewards; default all. None where the folder holds this very study; else it raises UserError where it holds one,
    unless `overwrite` is given.
    """
    from fastalign.palette.quantile import check_quantile, quantile_palette
    from fastalign.report.pareto_html import page

    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    if lambdas < 1:
        raise UserError(f"lambdas must be at least 1, got {lambdas}")
    for q in quantiles:
        check_quantile("quantile", q)
    out = Path(out)
    inputs = {"scored": scored, **{f"palette {i}": path for i, path in enumerate(palettes)}}
    inputs |= {f"soup {i}": path for i, path in enumerate(soups)}
    settings = {"quantiles": list(quantiles), "values": None if values is None else list(values), "joint": joint}
    job = outputs.Job("pareto", inputs, settings | {"lambdas": lambdas, "l1_max": l1_max, "seed": seed})
    written = {"files": [out / "pareto.html"], "figures": out}
    if (record := outputs.claim(out / "pareto.json", job, overwrite=overwrite, **written)) is None:
        return None
    whole = Candidates.from_parquet(scored, kind="scored")
    names = list(values or whole.rewards)
    rewards = whole.reward_array(names)
    asked = {f"q{100 * q:g}": quantile_palette(rewards.reshape(-1, len(names)), q) for q in quantiles}
    for path in palettes:
        solution = palette_files.read(path, "palette", "sense")
        at = palette_files.of_values(path, solution, names)
        senses, levels = ([solution[row][j] for j in at] for row in ("sense", "palette"))
        if set(senses) != {">="} or None in levels:
            came = ", ".join(
                sense if level is not None else "free" for sense, level in zip(senses, levels, strict=True)
            )
            raise UserError(f"{path}: must ask for at least its levels in every value, got {came}")
        asked[_unlike(asked, path)] = np.array(levels)
    merged: dict[str, np.ndarray] = {}
    for path in soups:
        for name, row in _soup_levels(path, names).items():
            merged[_unlike(merged, path, name)] = row
    found = study(
        names, rewards, palettes=asked, soups=np.array(list(merged.values())) if merged else None, soup_names=list(merged),
        joint=joint, n_lambda=lambdas, l1_max=l1_max, seed=seed,
    )  # fmt: skip
    figures = found.figures()
    with outputs.making(out / "pareto.json", found.to_json(), record, **written):
        save_figures(figures, out)
        text = page(found, figures)
        with atomic_write(out / "pareto.html") as beside:
            beside.write_text(text, encoding="utf-8")
    return found


def _soup_levels(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean rewards (m,) by name: of one model's scored candidates, or of all soups of a walk, "0.3 a + 0.7 b"."""
    if Path(path).suffix != ".json":
        return {"": Candidates.from_parquet(path, kind="scored").reward_array(names).mean(axis=(0, 1))}
    from fastalign.soup.front import SoupFront

    found = SoupFront.read(path)
    lacking = [name for name in names if name not in found.values]
    if lacking:
        raise UserError(f"{path}: its values are {', '.join(found.values)}, it has no {lacking[0]}")
    models = [Path(model).name or model for model in found.models]
    recipes = [
        " + ".join(f"{r:.3g} {model}" for r, model in zip(row, models, strict=True) if r) for row in found.rho.tolist()
    ]
    levels = found.levels[:, [found.values.index(name) for name in names]]
    return {recipe.removeprefix("1 "): row for recipe, row in zip(recipes, levels, strict=True)}


def _unlike(taken: Mapping[str, Any], path: str | Path, name: str = "") -> str:
    """A name for what comes from a file, its own or the file's, that is none of those taken."""
    plain = name or Path(path).stem
    longer = f"{name} of {path}" if name else str(path)
    numbered = (f"{longer} ({k})" for k in itertools.count(2))
    return next(x for x in itertools.chain((plain, longer), numbered) if x not in taken)


def plot_palette(scored: str | Path, solution: Mapping[str, Any], folder: str | Path) -> None:
    """Figures of a palette file's content, see `palette_figures`, into a folder; as its own dual has it."""
    names, joint = solution["values"], solution["dual"] == "joint"
    rewards = Candidates.from_parquet(scored, kind="scored").reward_array(names)
    groups = _groups(rewards, joint)
    flat = _flat(rewards)
    way = palette_path(flat, solution["palette"], groups=groups, sense=solution["sense"])
    asked = np.where(solution["free"], np.nan, way.palette) if solution.get("free") else way.palette
    save_figures(palette_figures(names, rewards, way._replace(palette=asked), joint=joint), folder)


def save_figures(figures: Mapping[str, Any], folder: str | Path) -> None:
    """Each figure as SVG and PNG into a folder."""
    from fastalign.palette import plots

    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            plots.save(figure, Path(folder) / f"{name}.{suffix}")


def _tilts(rewards: np.ndarray, joint: bool) -> Tilts:
    return Tilts(_flat(rewards), groups=_groups(rewards, joint))


def _flat(rewards: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rewards.reshape(-1, rewards.shape[2]))


def _groups(rewards: np.ndarray, joint: bool) -> np.ndarray | None:
    """The prompt of each row of `_flat`; None where all are one."""
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
