"""The page of `fastalign align`: what was asked, what holds on held-out prompts, and texts before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.conversations import transcript
from fastalign.report import agreement, clean
from fastalign.report.html import flat
from fastalign.report.page import document, figure_of, svg_of
from fastalign.report.proof import FREE, MET, MISSED, WATCHED, WITHIN, Level

if TYPE_CHECKING:
    from fastalign.decode import Candidates

EXAMPLES = 6
_CLASSES = {MET: "met", WITHIN: "within", FREE: "", WATCHED: ""}
_LEVELS = (
    "Each value's mean over the held-out prompts, in units that compare across values. The bar is three standard "
    "errors each way; predicted is what the weights λ reach on the other prompts."
)
_HISTOGRAMS = "Every answer of the base model (grey), and the aligned ones (green)."
_ROUNDS = (
    "Each value's gain over the base, in standard deviations, by the KL of the round's model; dashed: what is asked."
)
_WEIGHTED = "Blue: the same answers under the policy p<sub>λ</sub>."


def page(
    content: Mapping[str, Any],
    *,
    base: Candidates,
    result: Candidates | None,
    rows: Sequence[Level],
    settings: Mapping[str, Any],
) -> str:
    """The page as text. content: of align.json; base, result: scored texts of the same prompts, from the base model and
    aligned; result is None for a palette that cannot be reached. Without matplotlib the page has no figure."""
    shown = [row for row in rows if row.realised is not None]
    missed = any(row.verdict.startswith(MISSED) for row in rows) or not shown
    prompts, names = counted(content["heldout_prompts"], "held-out prompt"), [row.name for row in rows]
    body = [
        f"<h1>{escape(clean(str(settings['model'])))} aligned with a palette</h1>"
        f"<p class='sub'>{escape(clean(str(settings['palette'])))}: by {content['how']}, on {prompts}, after "
        f"{counted(content['train_prompts'], 'prompt')} to learn from</p>",
        f"<p class='headline{' off' if missed else ''}'>{escape(content['headline'])}</p>",
        _table(rows),
        _notes(content, rows),
        _facts(content),
        *_figures(shown, base, result, content),
        *agreement.section(names, base.reward_array(names), "base model's answers"),
        *_rounds(rows, content),
        *_examples(base, result, rows, content),
        "<h2>Settings</h2>",
        _settings(settings),
    ]
    return document("A model aligned with a palette", body, content)


def _table(rows: Sequence[Level]) -> str:
    heads = (("Value", ""), ("Base", "before"), ("Asked", "target"), ("Predicted", "predicted"),
             ("Realised ± SE", "realised"), ("Verdict", ""))  # fmt: skip
    head = "".join(
        f"<th><span class='key' style='--c:var(--{colour})'>{label}</span></th>" if colour else f"<th>{label}</th>"
        for label, colour in heads
    )
    cells = "".join(
        f"<tr><td>{escape(clean(row.name))}</td><td>{row.show(row.base)}</td><td>{escape(row.wish)}</td>"
        f"<td>{row.show(row.predicted)}</td><td class='realised'>{row.show(row.realised)} "
        f"<span class='se'>{'' if row.realised is None else '± ' + (row.show(row.se) if row.se is not None else 'n/a')}"
        f"</span></td><td><span class='verdict {_CLASSES.get(row.verdict, 'short')}'>{escape(row.verdict)}</span></td>"
        "</tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>"


def _notes(content: Mapping[str, Any], rows: Sequence[Level]) -> str:
    notes = [
        f"{_unasked(row)} fell by more than its error: {row.show(row.base)} → {row.show(row.realised)}."
        for row in rows
        if row.fell
    ]
    if (certificate := content["certificate"]) is not None:
        notes.append(f"Proof: {escape(clean(certificate['text']))}.")
    if (nearest := content["nearest"]) is not None:
        levels = ", ".join(f"{escape(clean(row.name))} {row.show(nearest[row.name])}" for row in rows)
        notes.append(f"The nearest levels that can be reached: {levels}.")
    return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>" if notes else ""


def _unasked(row: Level) -> str:
    name = f"<b>{escape(clean(row.name))}</b>"
    if row.verdict == WATCHED:
        return f"What was asked for may be over-optimised: {name}, which was watched and not optimised,"
    return f"Nobody asked about {name}, and it"


def _facts(content: Mapping[str, Any]) -> str:
    kl, cost = content["kl"], content["cost"]
    facts = [(f"{cost['tokens']:,} tokens, {cost['seconds']:,.0f} s", "what it cost")]
    if kl["measured"] is not None:
        error = "" if kl["se"] is None else f" ± {kl['se']:.2f}"
        facts.insert(
            0, (f"{kl['measured']:.2f}{error} nats", f"KL to the base, measured (predicted {kl['predicted']:.2f})")
        )
    if content["ess"] is not None:
        facts.append((f"{content['ess']:.1f} of {content['n']}", "effective candidates per prompt"))
    if perplexity := content.get("perplexity"):
        if None not in perplexity.values():
            words = f"perplexity of the texts under the base model ({perplexity['base']:.1f} for its own)"
            facts.append((f"{perplexity['result']:.1f}", words))
    return "<div class='facts'>" + "".join(f"<div><b>{value}</b>{label}</div>" for value, label in facts) + "</div>"


def _figures(
    rows: Sequence[Level], base: Candidates, result: Candidates | None, content: Mapping[str, Any]
) -> list[str]:
    if result is None:
        return []
    from fastalign.report import figures as plots

    nan = float("nan")
    names = [row.name for row in rows]
    columns = {
        "before": [row.base for row in rows],
        "std": [row.std for row in rows],
        "palette": [nan if row.asked is None else row.asked for row in rows],
        "predicted": [row.predicted for row in rows],
        "realised": [row.realised for row in rows],
        "se": [row.se or 0.0 for row in rows],
    }
    arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    before, after = (one.reward_array(names).reshape(-1, len(names)).astype(np.float64) for one in (base, result))
    weights = None
    if content["how"] == "decode":
        scores = base.reward_array(names).astype(np.float64) @ np.array(
            [content["lam"].get(name, 0.0) for name in names]
        )
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights = (weights / weights.sum(axis=1, keepdims=True)).ravel()
    shown = [clean(name) for name in names]
    try:
        levels = plots.levels(shown, **arrays)
        histograms = plots.histograms(before, after, shown, weights=weights, palette=arrays["palette"])
    except UserError:  # without matplotlib
        return []
    drawn = {"levels": svg_of(levels, "levels"), "histograms": svg_of(histograms, "histograms")}
    return [
        figure_of("levels", drawn, _LEVELS),
        "<h2>Distributions on held-out prompts</h2>",
        figure_of("histograms", drawn, _HISTOGRAMS if weights is None else f"{_HISTOGRAMS} {_WEIGHTED}"),
    ]


def _rounds(rows: Sequence[Level], content: Mapping[str, Any]) -> list[str]:
    """What each round of training gained, where there were several."""
    rounds = content.get("rounds")
    if not rounds:
        return []

    def cell(row: Level, x: Mapping[str, Any]) -> str:
        error = "" if x["se"] is None else f" <span class='se'>± {row.show(x['se'])}</span>"
        return f"<td>{row.show(x['realised'])}{error}</td>"

    head = "".join(f"<th>{escape(clean(row.name))}</th>" for row in rows)
    base = "".join(f"<td>{row.show(row.base)}</td>" for row in rows)
    lines = [f"<tr><td>base</td>{base}<td>0</td></tr>"]
    for one in rounds:
        cells = "".join(cell(row, one["values"][row.name]) for row in rows)
        lines.append(f"<tr><td>round {one['round']}</td>{cells}<td>{one['kl']['measured']:.2f}</td></tr>")
    table = f"<thead><tr><th></th>{head}<th>KL to the base, nats</th></tr></thead><tbody>{''.join(lines)}</tbody>"
    return [
        "<h2>What each round gained</h2>",
        f"<div class='scroll'><table>{table}</table></div>",
        *_curve(rows, rounds),
    ]


def _curve(rows: Sequence[Level], rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    from fastalign.report import figures as plots

    gains = [
        [0.0, *((one["values"][row.name]["realised"] - row.base) / (row.std or 1.0) for one in rounds)] for row in rows
    ]
    kl = [0.0, *(one["kl"]["measured"] for one in rounds)]
    asked = [None if row.asked is None else (row.asked - row.base) / (row.std or 1.0) for row in rows]
    try:
        figure = plots.rounds([clean(row.name) for row in rows], kl, gains, asked)
    except UserError:  # without matplotlib
        return []
    return [figure_of("rounds", {"rounds": svg_of(figure, "rounds")}, _ROUNDS)]


def _examples(
    base: Candidates, result: Candidates | None, rows: Sequence[Level], content: Mapping[str, Any]
) -> list[str]:
    """The held-out prompts spread evenly, with the base model's first text and the first aligned one."""
    if result is None:
        return []
    count = len(result.prompts)
    chosen = sorted({round(i * (count - 1) / max(1, EXAMPLES - 1)) for i in range(EXAMPLES)}) if count else []

    def side(kind: str, candidates: Candidates, i: int) -> str:
        text = clean(candidates.texts[i][0])
        scores = "".join(
            f"<span>{escape(clean(row.name))} {row.show(float(candidates.rewards[row.name][i, 0]))}</span>"
            for row in rows
        )
        return (
            f"<div class='text {kind}'><div class='label'>{kind}</div><p>{escape(text) or '<i>(empty)</i>'}</p>"
            f"<div class='scores'>{scores}</div></div>"
        )

    pairs = [
        f"<div class='pair'><h3>{escape(clean(transcript(result.prompts[i])))}</h3><div class='two'>"
        f"{side('before', base, i)}{side('after', result, i)}</div></div>"
        for i in chosen
    ]
    return ["<h2>Held-out texts before and after</h2>", *pairs]


def _settings(settings: Mapping[str, Any]) -> str:
    rows = flat({name: value for name, value in settings.items() if name not in ("prompts", "model_content")})
    cells = "".join(f"<tr><td>{escape(clean(name))}</td><td>{escape(clean(value))}</td></tr>" for name, value in rows)
    return f"<table class='settings'><tbody>{cells}</tbody></table>"
