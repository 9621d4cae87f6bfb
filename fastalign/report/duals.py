"""Both forms of the dual for one palette, side by side: see docs/mathematics/duals.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fastalign._base.units import decimals
from fastalign.palette.solve import solve

NOTE = (
    "<p class='note'>Within each prompt: every prompt keeps its weight, as in any decoder. All at once: "
    "the policy also reweights the prompts, which no decoder can do: its KL is a lower bound of the other's, "
    "and it reaches more. Decoded: the levels if each prompt's candidates are drawn with that λ.</p>"
)


@dataclass(frozen=True)
class Dual:
    """One form's result for a palette. If it is infeasible, all but the first four are None.

    form: "per_prompt" or "joint". scaling: the reachable share of the way from the mean to the palette, 1 for all of
    it. samples: the maximum of `ess`. lam, levels (m,): λ and E[R] under the form's own distribution. decoded (m,):
    mean over prompts of E[R] if each prompt's candidates are drawn with λ. kl: nats, of which prompts_kl are due to
    reweighting the prompts.
    """

    form: str
    feasible: bool
    scaling: float
    samples: int
    lam: np.ndarray | None = None
    levels: np.ndarray | None = None
    decoded: np.ndarray | None = None
    kl: float | None = None
    prompts_kl: float | None = None
    ess: float | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}
        return {"lambda" if name == "lam" else name: x for name, x in plain.items()}


def both(rewards: np.ndarray, palette: np.ndarray, sense: Sequence[str] | str = ">=") -> tuple[Dual, Dual]:
    """The per-prompt and the joint form. rewards: (P, N, m), finite. palette: (m,). sense: as in `palette.solve`."""
    p, n, m = rewards.shape
    flat = np.ascontiguousarray(rewards.reshape(-1, m))
    duals = []
    for form, groups, samples in (("per_prompt", np.repeat(np.arange(p), n), n), ("joint", None, p * n)):
        solution = solve(flat, palette, groups=groups, sense=sense)
        if solution.scaling is not None:  # infeasible
            duals.append(Dual(form, False, float(solution.scaling), samples))
            continue
        scores = rewards.astype(np.float64) @ solution.lam
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        # log of each prompt's share of Z, which is its probability under the joint policy.
        shares = np.log(weights.sum(axis=1)) + scores.max(axis=1)
        shares -= np.logaddexp.reduce(shares)
        weights /= weights.sum(axis=1, keepdims=True)
        moved = float(np.exp(shares) @ (shares + np.log(p))) if form == "joint" else 0.0
        duals.append(
            Dual(
                form,
                True,
                1.0,
                samples,
                lam=solution.lam,
                levels=solution.levels,
                decoded=np.einsum("pn,pnm->m", weights, rewards) / p,
                kl=float(solution.kl),
                prompts_kl=max(0.0, moved),
                ess=float(solution.ess),
            )
        )
    return duals[0], duals[1]


def table(values: Sequence[str], targets: Sequence[str], std: Sequence[float], duals: tuple[Dual, Dual]) -> str:
    """An HTML table: one row per value with its target, then the cost."""
    within, at_once = duals

    def cells(dual: Dual, j: int, *columns: str) -> str:
        if dual.lam is None:
            return "<td>–</td>" * (1 + len(columns))
        shown = (f"{getattr(dual, name)[j]:.{decimals(std[j])}f}" for name in columns)
        return f"<td>{dual.lam[j]:.3g}</td>" + "".join(f"<td>{x}</td>" for x in shown)

    def price(dual: Dual) -> tuple[str, str, str]:
        if not dual.feasible:
            return "–", "–", f"<span class='verdict short'>up to {dual.scaling:.0%} of the way</span>"
        kl = f"{dual.kl:.3f}" + (f", of which {dual.prompts_kl:.3f} on prompts" if dual.form == "joint" else "")
        return kl, f"{dual.ess:,.1f} of {dual.samples:,}", "<span class='verdict met'>in reach</span>"

    rows = [
        f"<tr><td>{escape(name)}</td><td>{escape(targets[j])}</td>{cells(within, j, 'levels')}"
        f"{cells(at_once, j, 'levels', 'decoded')}</tr>"
        for j, name in enumerate(values)
    ]
    for name, a, b in zip(("KL, nats", "effective samples", "verdict"), price(within), price(at_once), strict=True):
        rows.append(
            f"<tr class='price'><td colspan='2'>{name}</td><td colspan='2'>{a}</td><td colspan='3'>{b}</td></tr>"
        )
    return (
        "<div class='scroll'><table class='duals'><thead><tr><th colspan='2'></th><th colspan='2'>Within each "
        "prompt</th><th colspan='3'>All at once</th></tr><tr><th>Value</th>"
        "<th>Target</th><th>λ</th><th>Reached</th>"
        f"<th>λ</th><th>Reached</th><th>Decoded</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
