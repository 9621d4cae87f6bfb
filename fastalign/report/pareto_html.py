"""A study of fronts as one HTML page, in the report's style."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from fastalign._base.units import counted, decimals
from fastalign.decode.worth import TRUSTED_ESS, words, worth
from fastalign.report import agreement, duals
from fastalign.report.page import document, figure_of, svg_of

if TYPE_CHECKING:
    from fastalign.report.study import Study

_TITLES = {
    "front": "Fronts, for pairs of values",
    "front3d": "The front of three values",
    "region": "Which λ are desirable",
    "radar": "The palettes at a glance",
    "path": "The path to {palette}",
    "histograms": "Distributions before and under {palette}",
    "ess": "Effective sample size",
}
_CAPTIONS = {
    "front": "Lines are exact: no policy within that KL of the model lies beyond them; λ is on these two values alone. "
    "{best}Linear scalarisation is RLHF's solution p<sub>0</sub> exp(w·R / β) for evenly spaced weights w at one β: "
    "the same policies, at KLs that depend on w. Green dots leave no value below the model's mean.",
    "front3d": "Everything reachable at KL {kl:.2f} in the first three values lies below this surface.",
    "region": "Uniform draws of λ ≥ 0 with Σ λ·σ ≤ {l1:g}, for pairs of values.",
    "radar": "The levels that each palette's policy reaches; an infeasible one's are at the end of the path to it.",
    "path": "λ and its cost along the straight path from the model's mean to the palette.",
    "histograms": "All candidates, and the same candidates under the policy at the end of the path.",
    "ess": "Below an effective sample size of {trusted:g}, a few texts determine the levels.",
}


def page(study: Study, figures: Mapping[str, Any]) -> str:
    """The whole page as text; figures: `study.figures()`."""
    prompts, n, _ = study.rewards.shape
    palette = list(study.palettes)[-1] if study.palettes else ""
    best = (
        "Best of N by w·R moves no further than the front at its KL bound, log N − (N−1)/N. " if study.best_of else ""
    )
    facts = {
        "palette": f"the palette {palette}",
        "best": best,
        "kl": max(study.fronts),
        "l1": study.l1_max,
        "trusted": TRUSTED_ESS,
    }
    title = f"What these candidates allow: {', '.join(study.values)}"
    how = "all at once, prompts reweighted too" if study.joint else "within each prompt"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='sub'>{counted(prompts, 'prompt')} × {counted(n, 'candidate')}, reweighted {how}</p>",
        _palettes(study),
        *_duals(study),
        "<h2>Volumes</h2>",
        _volumes(study),
    ]
    for name, figure in figures.items():
        fill = {key: escape(x) if isinstance(x, str) and key == "palette" else x for key, x in facts.items()}
        body += [
            f"<h2>{_TITLES[name].format(**fill)}</h2>",
            figure_of(name, {name: svg_of(figure, name)}, _CAPTIONS[name].format(**fill)),
        ]
    body += agreement.section(study.values, study.rewards)
    return document(title, body, study.to_json())


def _palettes(study: Study) -> str:
    if not study.palettes:
        return ""
    rows = []
    for name, way in study.palettes.items():
        end = way.policies
        verdict = (
            "<span class='verdict met'>in reach</span>"
            if way.limit >= 1
            else f"<span class='verdict short'>up to {way.limit:.0%} of the way</span>"
        )
        lam = ", ".join("0" if x == 0 else f"{x:.3g}" for x in end.lam[-1])
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{verdict}</td><td>{lam}</td><td>{end.kl[-1]:.2f}</td>"
            f"<td>{end.ess[-1]:,.1f}</td><td>{words(*worth(study.rewards, end.lam[-1]).needed())}</td></tr>"
        )
    head = "".join(
        f"<th>{x}</th>" for x in ("Palette", "Verdict", "λ", "KL, nats", "ESS", f"N for ESS {TRUSTED_ESS:g}")
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _duals(study: Study) -> list[str]:
    if not study.duals:
        return []
    parts = ["<h2>Both duals at each palette</h2>"]
    for name, pair in study.duals.items():
        targets = [f"{c:.{decimals(s)}f}" for c, s in zip(study.palettes[name].palette, study.std, strict=True)]
        table = duals.table(study.values, targets, study.std.tolist(), pair)
        parts += [f"<h3>{escape(name)}</h3>", table]
    return [*parts, duals.NOTE]


def _volumes(study: Study) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{points:,}</td><td>{volume:.4g}</td><td></td></tr>"
        for name, points, volume in study.hypervolumes()
    )
    note = (
        "<p class='note'>Hypervolume above the lowest level of each value in any of these sets, in units of the "
        f"values' standard deviations, from {len(study.directions)} weights w for each front; more weights would "
        "increase each a little.</p>"
    )
    head = "<th>Points</th><th>Number</th><th>Volume</th><th></th>"
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
