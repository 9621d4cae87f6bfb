"""The report as one HTML page: style, figures (inline SVG that follows light and dark) and data are all inside."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fastalign._base.units import counted
from fastalign.report import Example, Report, Value, clean, duals
from fastalign.report import figures as plots

# The figures' colours become the page's, so that they turn with it.
_THEME = {
    plots.INK: "ink", plots.MUTED: "muted", plots.GRID: "grid", plots.PAPER: "paper", plots.BEFORE: "before",
    plots.ASKED: "asked", plots.PREDICTED: "predicted", plots.REALISED: "realised",
}  # fmt: skip
_LIGHT = {color: name for name, color in _THEME.items()} | {"card": "#f6f7f9"}
_DARK = {
    "ink": "#e4e8ec", "muted": "#9aa4af", "grid": "#2c333b", "paper": "#14181c", "before": "#8d97a3",
    "asked": "#ff8a3d", "predicted": "#58b0ea", "realised": "#2fc796", "card": "#1b2127",
}  # fmt: skip
_VERDICTS = {"met": "met", "within error": "met within error", "short": "short", "above": "above"}
_CAPTIONS = {
    "levels": "Each value's mean, in units that compare across values. The bar reaches from the candidates' mean to the dual's prediction.",
    "histograms": "All candidates, and the same candidates under the policy p<sub>λ</sub>. {draws}",
    "radar": "The same four levels around a ring. Outward is more; the ring marked 0 is the candidates' mean.",
    "pareto": "What reweighting these candidates can reach, two values at a time. Dots are policies of random λ, the stronger ones with "
              "no more KL than this one; the line is the most that two values alone can reach at this policy's KL. "
              "With more than two values the policy spends part of its KL on the others, and lies inside.",
    "pareto_one": "How far the value can be raised at which distance from the model.",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
@media print { :root { color-scheme: light; %(light)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.4rem 1.5rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.012em; margin: 0 0 .3rem }
h2 { font-size: 1.15rem; font-weight: 650; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--grid) }
p { margin: .4rem 0 }
.sub, figcaption, .note, .why { color: var(--muted); font-size: .9rem }
.headline { margin: 1.3rem 0 1.2rem; padding: .65rem 1rem; background: var(--card); border-left: 4px solid var(--realised); border-radius: 3px; font-weight: 550 }
.headline.off { border-color: var(--asked) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%%; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 550; font-size: .84rem; color: var(--muted); padding: .3rem .7rem; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; white-space: nowrap }
td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
th:first-child, td:first-child { padding-left: 0 }
td:first-child { font-weight: 600 }
.key::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .4em; border-radius: 50%%; background: var(--c) }
.realised { font-weight: 650 } .se { color: var(--muted); font-weight: 400 }
.verdict { display: inline-block; padding: 0 .55em; border-radius: 1em; border: 1.5px solid var(--realised); color: var(--realised); font-size: .84rem; font-weight: 600 }
.verdict.within { border-style: dashed } .verdict.short, .verdict.above { border-color: var(--asked); color: var(--asked) }
ul { margin: .8rem 0 0; padding-left: 1.15rem; font-size: .93rem } li { margin: .2rem 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .9rem 1.5rem; margin: 1.4rem 0 .4rem }
.facts div { font-size: .84rem; color: var(--muted) } .facts b { display: block; font-size: 1.18rem; font-weight: 620; color: var(--ink); font-variant-numeric: tabular-nums }
figure { margin: 1.2rem 0 0 } figure svg { display: block; max-width: 100%%; height: auto; margin: 0 auto }
figure svg text { font-family: inherit !important } figcaption { max-width: 50rem; margin: .5rem auto 0; text-align: center; text-wrap: balance }
.pair { break-inside: avoid; margin: 1.1rem 0 1.7rem } .pair h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere }
.pair h3 .why { font-weight: 400; margin-left: .6em } .two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.text { background: var(--card); border-top: 3px solid var(--before); border-radius: 3px; padding: .7rem .95rem .8rem; font-size: .93rem }
.text.after { border-color: var(--realised) } .text p { white-space: pre-wrap; overflow-wrap: anywhere }
.text .scores { margin-top: .6rem; color: var(--muted); font-size: .82rem; font-variant-numeric: tabular-nums; white-space: normal }
.scores span { display: inline-block; white-space: nowrap; margin-right: 1em } .label { font-size: .78rem; font-weight: 600; color: var(--muted) }
.duals td:last-child, .duals th:last-child { text-align: right; padding-right: 0 } .duals tr:first-child th { border: 0; padding-bottom: 0; color: var(--ink) }
.duals .price td:first-child { font-weight: 400; color: var(--muted) } h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: .9rem; padding: .28rem .7rem } .settings td:first-child { width: 15rem; font-weight: 400; color: var(--muted) }
@media (max-width: 44rem) { .two { grid-template-columns: 1fr } main { padding: 1.4rem 1rem 3rem } }
@media print { html { font-size: 9.5pt } main { padding: 0; max-width: none } .scroll { overflow: visible } th, td { padding-left: .4rem; padding-right: .4rem } body { font-size: 9.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact } figure svg { max-height: 10.5cm } figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""


def page(report: Report) -> str:
    """The whole page as text. Raises UserError where matplotlib is not installed."""
    figures = {name: _svg(figure, name) for name, figure in report.figures().items()}
    m = len(report.values)
    model = report.settings.get("model")
    title = (
        f"Text aligned with a palette of {m} values"
        if m > 1
        else f"Text aligned with a level of {report.values[0].name}"
    )
    source = f" from <b>{escape(clean(str(model)))}</b>" if model else ""
    sub = (f"{counted(report.prompts, 'prompt')} × {counted(report.candidates, 'candidate')}{source}, {report.draws:,} chosen for each prompt"
           f" ({escape(report.method)})")  # fmt: skip
    body = [
        f"<h1>{escape(title)}</h1><p class='sub'>{sub}</p>",
        f"<p class='headline{'' if report.agrees else ' off'}'>{escape(report.headline)}</p>",
        _table(report),
        _reasons(report),
        _facts(report),
        *_duals(report),
        _figure("levels", figures, _CAPTIONS["levels"]),
        "<h2>Distributions before and after</h2>",
        _figure("histograms", figures, _CAPTIONS["histograms"].format(draws=_draws(report))),
    ]
    if "radar" in figures:
        body += ["<h2>The palette at a glance</h2>", _figure("radar", figures, _CAPTIONS["radar"])]
    body += [
        "<h2>Trade-offs</h2>",
        _figure("pareto", figures, _CAPTIONS["pareto" if m > 1 else "pareto_one"]),
        "<h2>Texts before and after</h2>",
        "<p class='sub'>Before is each prompt's first candidate, which is a plain draw from the model; after is the first text chosen.</p>",
        *(_pair(example, report.values) for example in report.examples),
        "<h2>Settings and method</h2>",
        _settings(report),
    ]
    return document(title, body, report.to_json())


def document(title: str, body: list[str], data: Any) -> str:
    """The page of these parts (empty ones left out), with `data` inside it as JSON."""
    style = _STYLE % {"light": _variables(_LIGHT), "dark": _variables(_DARK)}
    # The only script is data, which no browser runs; the policy forbids everything that is not in this file.
    written = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script type='application/json' id='report'>{written}</script>\n</body>\n</html>\n"
    )


def _table(report: Report) -> str:
    head = "".join(
        f"<th><span class='key' style='--c:var(--{colour})'>{label}</span></th>" if colour else f"<th>{label}</th>"
        for label, colour in (("Value", ""), ("λ", ""), ("Before", "before"), ("Asked for", "asked"), ("Predicted", "predicted"),
                              ("Realised ± SE", "realised"), ("All reweighted", ""), ("Verdict", ""))
    )  # fmt: skip
    rows = "".join(
        f"<tr><td>{escape(v.name)}</td><td>{v.lam:.3g}</td><td>{v.show(v.before)}</td><td>{escape(v.wish)}</td>"
        f"<td>{v.show(v.predicted)}</td><td class='realised'>{v.show(v.realised)} <span class='se'>{v.show_error(report)}</span></td>"
        f"<td>{v.show(v.rao_blackwell)}</td><td><span class='verdict {v.verdict.split()[0]}'>{_VERDICTS[v.verdict]}</span></td></tr>"
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
        (f"{report.kl:.3f} nats", "KL to the model, per prompt" if report.dual != "joint" else "KL to the model, joint"),
        (f"{report.ess:,.1f} of {report.candidates * (report.prompts if report.dual == 'joint' else 1):,}",
         "effective sample size, mean" if report.dual != "joint" else "effective sample size, joint"),
        (f"{_median(per):,.1f} / {per.min():,.1f}", "median / minimum by prompt"),
        ("feasible" if report.feasible else "infeasible", "palette, for these candidates"),
    ]  # fmt: skip
    return "<div class='facts'>" + "".join(f"<div><b>{value}</b>{label}</div>" for value, label in facts) + "</div>"


def _duals(report: Report) -> list[str]:
    if not report.duals:
        return []
    columns = zip(*((v.name, v.wish, v.spread) for v in report.values), strict=True)
    return ["<h2>Both duals at this palette</h2>", duals.table(*columns, report.duals), duals.NOTE]


def _figure(name: str, figures: Mapping[str, str], caption: str) -> str:
    return f"<figure>{figures[name]}<figcaption>{caption}</figcaption></figure>"


def _draws(report: Report) -> str:
    count = report.prompts * report.draws
    if count >= 100:
        return f"The {count:,} texts chosen are outlined in green."
    return f"The {counted(count, 'text')} chosen {'are the ticks' if count > 1 else 'is the tick'} below the axis."


def _pair(example: Example, values: list[Value]) -> str:
    def side(kind: str, text: str, rewards: list[float]) -> str:
        scores = "".join(f"<span>{escape(v.name)} {v.show(r)}</span>" for v, r in zip(values, rewards, strict=True))
        shown = escape(text) if text else "<i>(empty)</i>"
        return f"<div class='text {kind}'><div class='label'>{kind}</div><p>{shown}</p><div class='scores'>{scores}</div></div>"

    return (
        f"<div class='pair'><h3>{escape(example.prompt)}<span class='why'>{escape(example.why)}</span></h3><div class='two'>"
        f"{side('before', example.before, example.rewards_before)}{side('after', example.after, example.rewards_after)}</div></div>"
    )


def _settings(report: Report) -> str:
    rows = [(name, value) for name, value in flat(report.settings)]
    cells = "".join(f"<tr><td>{escape(clean(name))}</td><td>{escape(clean(value))}</td></tr>" for name, value in rows)
    method = (
        "<p class='note'>λ ≥ 0 minimises the dual of least KL to the model subject to the palette (MAP, arXiv 2410.19198). "
        "Predicted: the levels of p<sub>λ</sub> by the dual. Realised: the mean over the texts chosen. "
        "All reweighted: the mean of all candidates under the weights, which the realised mean is an estimate of. "
        "SE: the standard error of the realised mean given the candidates, √(Σ<sub>x</sub> Var<sub>λ,x</sub> / k) / P; "
        "it does not include that other candidates or prompts would have come out differently.</p>"
    )
    return (f"<table class='settings'><tbody>{cells}</tbody></table>" if rows else "") + method


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) rows, in order; None and empty ones left out."""
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


def _svg(figure, name: str) -> str:
    """The figure as an <svg> element: themed colours, ids of its own."""
    buffer = io.BytesIO()
    figure.patch.set_alpha(0)
    plots.write(figure, buffer, "svg")
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}: {colour};" for name, colour in colours.items())
