"""The MAP dual: the weights λ whose policy p_λ ∝ p0 exp(λ·R) reaches a value palette at the least KL.

min over λ of g(λ) = log Z(λ) − λ·c, which is the entropy-projection dual of MAP (arXiv 2410.19198, eqs. 5-7): λ_j ≥ 0
if a palette asks for at least c_j, ≤ 0 for at most, free for exactly. Its gradient is E_λ[R] − c, its Hessian the
covariance of R under p_λ. One pass over the rewards gives both, so we use the method that needs the fewest passes:
projected Newton with a safeguarded line search. All computations are in units of each reward's standard deviation.

There are two forms of the dual. The joint one, log Z of all samples, gives the least KL over distributions of (prompt,
answer): it also changes the frequency of prompts, which no decoder can do. The per-prompt one, mean_x log Z(x, λ),
gives the least mean KL over conditional distributions p(y|x), whose Lagrangian splits by prompt; a decoder realises
this one. They agree if the rewards' distribution does not depend on the prompt; otherwise the joint form reaches more,
by favouring prompts that score high.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.lazy import pandas
from fastalign._base.units import counted
from fastalign.ops import checks
from fastalign.palette.inputs import Array, Rewards, Sense, as_palettes, check_sense
from fastalign.palette.problem import Problem
from fastalign.palette.setup import set_up
from fastalign.palette.sources import ParquetRewards


@dataclass(frozen=True, repr=False)
class PaletteSolution:
    """The result of `solve`. Each field has a leading K if the palette was (K, m).

    lam: (m,) float64, the weights; exactly 0 for a value whose constraint is slack. NaN if the palette is infeasible
        and no `lam_max` was given, because the dual then has no minimum.
    levels: (m,) E_λ[R], the levels that the policy reaches. kl: KL(p_λ ‖ p0) in nats (with groups: its mean over the
        groups). ess: effective sample size (Σ w)² / Σ w² of the reweighted samples (with groups: mean per group).
    feasible: whether the palette can be reached at all by reweighting these samples.
    kkt_residual: max_j |μ_j − clip(μ_j − γ_j, bounds)| with μ_j = λ_j σ_j, γ_j = (E_λ[R_j] − c_j) / σ_j and σ_j the
        standard deviation of reward j under p0 (with groups: within them, in the root mean square); that is, by how
        many standard deviations the levels miss. For a constant reward the unit is its own size; if the deviation is
        lost in rounding, as with weights of very different magnitude, it is the range.
    iterations: number of passes over all rewards. nearest: (m,) the reachable palette closest to an infeasible one
        (Euclidean distance in units of σ); None if the palette is feasible (in the (K, m) form NaN rows, or None if all
        are).
    certificate: (m,) d with max_i d·R_i < d·c over the samples of positive weight (with groups: their mean), a verified
        proof that the palette is infeasible (d_j ≥ 0 for at least, ≤ 0 for at most); NaN if it is unreachable by more
        than tol but by too little to prove in float64; else as `nearest`.
    scaling: for an infeasible palette the largest t for which mean + t (palette − mean) can be reached; None (NaN in
        the (K, m) form) if it is feasible.
    duality_gap: KL(p_λ ‖ p0) + g(λ) = λ·(levels − palette) in nats. If the levels reach the palette, no policy that
        reaches it has a KL smaller than `kl` by more than this.
    nearly_infeasible: feasible, but λ depends on fewer than ten effective samples per binding value plus one (with
        groups: or on fewer than two in the mean prompt), so other samples of the same model may not reach the palette.
    unique: False if duplicated or collinear rewards leave λ undetermined; `lam` is then the one of least norm Σ (λ_j
        σ_j)².
    palette: the requested palette, (m,) or (K, m). values: the rewards' names.
    """

    lam: np.ndarray
    levels: np.ndarray
    kl: np.float64 | np.ndarray
    ess: np.float64 | np.ndarray
    feasible: np.bool_ | np.ndarray
    kkt_residual: np.float64 | np.ndarray
    iterations: np.int64 | np.ndarray
    nearest: np.ndarray | None
    certificate: np.ndarray | None
    scaling: np.float64 | np.ndarray | None
    duality_gap: np.float64 | np.ndarray
    nearly_infeasible: np.bool_ | np.ndarray
    unique: np.bool_ | np.ndarray
    palette: ClassVar[np.ndarray | None] = None
    values: ClassVar[tuple[str, ...]] = ()

    def shown_with(self, palette: np.ndarray, values: tuple[str, ...]) -> PaletteSolution:
        """The same solution, with the additional data that its table shows."""
        object.__setattr__(self, "palette", palette)
        object.__setattr__(self, "values", values)
        return self

    def __repr__(self) -> str:
        header, *rows = self._table()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(x.ljust(w) if j == 0 else x.rjust(w) for j, (x, w) in enumerate(zip(row, widths, strict=True)))
            for row in (header, *rows)
        ]
        return "\n".join([self._verdict(), *lines])

    def _repr_html_(self) -> str:
        """For notebooks."""
        header, *rows = self._table()
        cells = [
            "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"
            for tag, row in [("th", header), *(("td", row) for row in rows)]
        ]
        return f"<p>{html.escape(self._verdict())}</p><table>{''.join(cells)}</table>"

    def to_pandas(self) -> Any:
        """A pandas DataFrame: a row for each value, or for each palette where there are many. Raises UserError if
        pandas is not installed."""
        pd = pandas()
        if np.ndim(self.lam) == 2:
            rows = {f"λ {name}": np.asarray(self.lam)[:, j] for j, name in enumerate(self._names())}
            return pd.DataFrame({**rows, "KL": self.kl, "feasible": self.feasible})
        return pd.DataFrame(self._columns(), index=list(self._names()))

    def _names(self) -> tuple[str, ...]:
        return self.values or tuple(map(str, range(np.shape(self.lam)[-1])))

    def _columns(self) -> dict[str, np.ndarray]:
        columns = {"λ": self.lam, "target": self.palette, "reached": self.levels, "nearest": self.nearest}
        return {name: column for name, column in columns.items() if column is not None}

    def _verdict(self) -> str:
        if np.ndim(self.lam) == 2:
            palettes, values = np.shape(self.lam)
            feasible = int(np.sum(self.feasible))
            return f"PaletteSolution: {counted(palettes, 'palette')} of {counted(values, 'value')}, {feasible} feasible"
        if self.scaling is not None:
            return f"PaletteSolution: infeasible, {float(self.scaling):.1%} of the way can be reached"
        near = ", nearly infeasible" if self.nearly_infeasible else ""
        kl, ess = float(self.kl), float(self.ess)
        return f"PaletteSolution: feasible{near}, KL {kl:.3f} nats, effective sample size {ess:.1f}"

    def _table(self) -> list[list[str]]:
        """A header and one row per value; of many palettes, for the first ten."""
        lam, names = np.asarray(self.lam), self._names()
        if lam.ndim == 2:
            kl = np.asarray(self.kl)
            rows = [[str(k), *(f"{x:.4g}" for x in row), f"{kl[k]:.3f}"] for k, row in enumerate(lam[:10])]
            return [["", *(f"λ {name}" for name in names), "KL"], *rows]
        columns = self._columns()
        return [
            ["", *columns],
            *([name, *(f"{column[j]:.4g}" for column in columns.values())] for j, name in enumerate(names)),
        ]


def solve(
    rewards: Rewards,
    palette: Array,
    *,
    groups: Array | None = None,
    weights: Array | None = None,
    sense: Sense = ">=",
    tol: float = 1e-9,
    lam_max: float | None = None,
    process_group: Any = None,
    values: Sequence[str] | None = None,
) -> PaletteSolution:
    """Weights λ of the policy p_λ ∝ p0 exp(λ·R) with E_λ[R] ≥ palette at the least KL from p0.

    rewards: (n, m), rewards of n samples of p0; numpy array (memory-mapped too) or torch tensor on any device; float32
        and float64 are read in place, on the CPU and on CUDA. Or a pandas DataFrame; or a `ParquetRewards`, read in
        chunks, with its own groups and weights.
    palette: (m,), or (K, m) for K palettes solved together, with shared passes.
    groups: (n,) integers, the prompt of each sample: the per-prompt dual mean_x log Z(x, λ) − λ·c, whose policy
        keeps the prompts' distribution (every group has equal weight). None: the joint dual, log Z over all samples.
    weights: (n,) ≥ 0, weights of the samples under p0 (default 1).
    sense: ">=", "<=" (λ_j ≤ 0) or "==" (λ_j of either sign), for all values or one for each.
    tol: bound on the KKT residual. lam_max: upper bound on each |λ_j|. The levels may then miss a feasible palette;
        `feasible` still says whether it can be reached without the bound.
    values: the rewards' names for display; default: the columns of a DataFrame or a ParquetRewards.
    process_group: a torch.distributed group over whose ranks the rows are distributed (`dist.group.WORLD` for all):
        each rank passes its own rows and the same palette, and gets the same answer. No prompt may be on two ranks.

    A palette is feasible if some mixture of the samples reaches it to within tol standard deviations. At the boundary
    of what is reachable λ diverges; the returned λ is then the first within tol or, if none is at finite precision, the
    last one tried, and kkt_residual says how far off it is.

    Raises UserError or TypeError, in one line, on NaN or infinite rewards, empty or mismatched shapes, weights that are
    negative or sum to zero (in any group).

    >>> import numpy as np
    >>> from fastalign import palette
    >>> coin = np.array([[1.0], [0.0], [0.0], [0.0]])  # one good answer of four
    >>> solution = palette.solve(coin, [0.5])
    >>> solution.lam.round(4)  # log 3
    array([1.0986])
    >>> bool(solution.feasible), round(float(solution.kl), 4)
    (True, 0.1438)
    >>> palette.solve(coin, [1.2]).nearest
    array([1.])
    """
    own = (rewards, weights) if process_group is None else ((), None)  # a single rank must not stop
    check_arguments(own[0], palette, own[1], sense, tol=tol, lam_max=lam_max)
    if values is None:
        values = rewards.values if isinstance(rewards, ParquetRewards) else getattr(rewards, "columns", ())
    run, palettes, sign = set_up(rewards, palette, groups, weights, sense, tol, lam_max, process_group)
    result = Problem(run, palettes, sign, tol, np.inf if lam_max is None else lam_max).conclude()
    names, m = () if isinstance(values, str) else tuple(map(str, values)), palettes.shape[1]
    if isinstance(values, str) or (names and len(names) != m):
        raise UserError(f"values must name each of the {counted(m, 'reward')} once, got {values!r}")
    if np.ndim(palette) == 1:
        result = {name: None if x is None else x[0] for name, x in result.items()}
    return PaletteSolution(**result).shown_with(np.array(palette, dtype=np.float64), names)


def check_arguments(rewards: Any, palette: Any, weights: Any, sense: Any = ">=", **options: Any) -> None:
    """Checks that arrays hold numbers and options are numbers or None; shapes and ranges are checked elsewhere."""
    weights = {} if weights is None else {"weights": weights}
    if not isinstance(rewards, ParquetRewards):
        checks.arrays(rewards=rewards)
    checks.arrays(palette=palette, **weights)
    check_sense(sense)
    checks.numbers(**{name: x for name, x in options.items() if not (name == "lam_max" and x is None)})


def one_palette(palette: Array, m: int) -> np.ndarray:
    """palette as (m,) float64; raises UserError for K of them."""
    palettes = as_palettes(palette, m)
    if np.ndim(palette) != 1:
        raise UserError(f"palette must be one palette, of shape ({m},), got {len(palettes)} palettes")
    return palettes[0]
