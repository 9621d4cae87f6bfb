"""The report as one HTML page, with style, figures (inline SVG for light and dark mode) and data inside."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fastalign._base.units import counted
from fastalign.report import Example, Report, Value, agreement, clean, duals
from fastalign.report.page import document, figure_of, svg_of

_VERDICTS = {"met": "met", "within error": "met within error", "short": "short", "above": "above"}
_CAPTIONS = {
    "levels": "Each value's mean, in units that compare across values. The bar reaches from the candidates' mean to "
    "the dual's prediction.",
    "histograms": "All candidates, and the same candidates under the policy p<sub>λ</sub>. {draws}",
    "radar": "The same four levels as a radar plot. Further out is higher; the ring marked 0 is the candidates' mean.",
    "pareto": "What reweighting these candidates can reach, for pairs of values. Dots are policies of random λ, the "
    "stronger ones with at most this policy's KL; the line is the front of two values alone at "
    "this policy's KL. With more than two values the policy spends part of its KL on the others, and lies "
    "inside.",
    "pareto_one": "How far the value can be raised at each KL from the model.",
}


def page(report: Report) -> str:
    """The whole page as text. Raises UserError if matplotlib is not installed."""
    figures = {name: svg_of(figure, name) for name, figure in report.figures().items()}
    m = len(report.values)
    model = report.settings.get("model")
    title = (
        f"Text aligned with a palette of {m} values"
        if m > 1
        else f"Text aligned with a level of {report.values[0].name}"
    )
    source = f" from <b>{escape(clean(str(model)))}</b>" if model else ""
    sub = (
        f"{counted(report.prompts, 'prompt')} × {counted(report.candidates, 'candidate')}{source}, {report.draws:,} "
        f"chosen for each prompt ({escape(report.method)})"
    )
    body = [
        f"<h1>{escape(title)}</h1><p class='sub'>{sub}</p>",
        f"<p class='headline{'' if report.agrees else ' off'}'>{escape(report.headline)}</p>",
        _table(report),
        _reasons(report),
        _facts(report),
        *_duals(report),
        figure_of("levels", figures, _CAPTIONS["levels"]),
        "<h2>Distributions before and after</h2>",
        figure_of("histograms", figures, _CAPTIONS["histograms"].format(draws=_draws(report))),
    ]
    if "radar" in figures:
        body += ["<h2>The palette at a glance</h2>", figure_of("radar", figures, _CAPTIONS["radar"])]
    body += [
        "<h2>Trade-offs</h2>",
        figure_of("pareto", figures, _CAPTIONS["pareto" if m > 1 else "pareto_one"]),
        *agreement.section([value.name for value in report.values], report.rewards),
        "<h2>Texts before and after</h2>",
        "<p class='sub'>Before: each prompt's first candidate, a plain draw from the model. After: the first chosen "
        "text.</p>",
        *(_pair(example, report.values) for example in report.examples),
        "<h2>Settings and method</h2>",
        _settings(report),
    ]
    return document(title, body, report.to_json())


def _table(report: Report) -> str:
    head = "".join(
        f"<th><span class='key' style='--c:var(--{colour})'>{label}</span></th>" if colour else f"<th>{label}</th>"
        for label, colour in (
            ("Value", ""),
            ("λ", ""),
            ("Before", "before"),
            ("Target", "target"),
            ("Predicted", "predicted"),
            ("Realised ± SE", "realised"),
            ("All reweighted", ""),
            ("Verdict", ""),
        )
    )
    rows = "".join(
        f"<tr><td>{escape(v.name)}</td><td>{v.lam:.3g}</td><td>{v.show(v.before)}</td><td>{escape(v.wish)}</td>"
        f"<td>{v.show(v.predicted)}</td><td class='realised'>{v.show(v.realised)} <span "
        f"class='se'>{v.show_error(report)}</span></td><td>{v.show(v.rao_blackwell)}</td><td><span class='verdict "
        f"{v.verdict.split()[0]}'>{_VERDICTS[v.verdict]}</span></td></tr>"
        for v in report.values
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _reasons(report: Report) -> str:
    items = [f"<b>{escape(v.name)}</b> {v.missed}: {escape(v.reason)}." for v in report.values if v.reason] + [
        escape(note) for note in report.notes
    ]
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _facts(report: Report) -> str:
    per = report.ess_per_prompt
    facts = [
        (
            f"{report.kl:.3f} nats",
            "KL to the model, per prompt" if report.dual != "joint" else "KL to the model, joint",
        ),
        (
            f"{report.ess:,.1f} of {report.candidates * (report.prompts if report.dual == 'joint' else 1):,}",
            "effective sample size, mean" if report.dual != "joint" else "effective sample size, joint",
        ),
        (f"{_median(per):,.1f} / {per.min():,.1f}", "median / minimum by prompt"),
        ("feasible" if report.feasible else "infeasible", "palette, for these candidates"),
    ]
    return "<div class='facts'>" + "".join(f"<div><b>{value}</b>{label}</div>" for value, label in facts) + "</div>"


def _duals(report: Report) -> list[str]:
    if not report.duals:
        return []
    names, wishes = [v.name for v in report.values], [v.wish for v in report.values]
    table = duals.table(names, wishes, [v.std for v in report.values], report.duals)
    return ["<h2>Both duals at this palette</h2>", table, duals.NOTE]


def _draws(report: Report) -> str:
    count = report.prompts * report.draws
    if count >= 100:
        return f"The {count:,} texts chosen are outlined in green."
    return f"The {counted(count, 'text')} chosen {'are the ticks' if count > 1 else 'is the tick'} below the axis."


def _pair(example: Example, values: list[Value]) -> str:
    def side(kind: str, text: str, rewards: list[float]) -> str:
        scores = "".join(f"<span>{escape(v.name)} {v.show(r)}</span>" for v, r in zip(values, rewards, strict=True))
        shown = escape(text) if text else "<i>(empty)</i>"
        return (
            f"<div class='text {kind}'><div class='label'>{kind}</div><p>{shown}</p>"
            f"<div class='scores'>{scores}</div></div>"
        )

    return (
        f"<div class='pair'><h3>{escape(example.prompt)}<span class='why'>{escape(example.why)}</span></h3>"
        f"<div class='two'>{side('before', example.before, example.rewards_before)}"
        f"{side('after', example.after, example.rewards_after)}</div></div>"
    )


def _settings(report: Report) -> str:
    rows = [(name, value) for name, value in flat(report.settings)]
    cells = "".join(f"<tr><td>{escape(clean(name))}</td><td>{escape(clean(value))}</td></tr>" for name, value in rows)
    method = (
        "<p class='note'>λ ≥ 0 minimises the dual of least KL to the model subject to the palette (MAP, arXiv "
        "2410.19198). Predicted: the levels of p<sub>λ</sub> by the dual. Realised: the mean over the texts chosen. "
        "All reweighted: the weighted mean of all candidates, which the realised mean estimates. SE: "
        "the standard error of the realised mean given the candidates, √(Σ<sub>x</sub> Var<sub>λ,x</sub> / k) / P; it "
        "does not include the variation due to other candidates or prompts.</p>"
    )
    return (f"<table class='settings'><tbody>{cells}</tbody></table>" if rows else "") + method


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) rows, in order; without None and empty ones."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name} · ")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{name}", ", ".join(_brief(x) for x in value)))
        elif value is not None and value != "":
            rows.append((f"{prefix}{name}", _brief(value)))
    return [row for row in rows if row[1]]


def _brief(x: Any) -> str:
    return f"{x:.6g}" if isinstance(x, float) else ("yes" if x else "no") if isinstance(x, bool) else str(x)


def _median(x) -> float:
    return float(sorted(x)[len(x) // 2] + sorted(x)[(len(x) - 1) // 2]) / 2
