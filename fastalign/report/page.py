"""The frame of every HTML page, with style, figures (inline SVG for light and dark mode) and data inside."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fastalign.report import figures as plots

# The figures' colours become the page's variables, to follow light and dark mode.
THEME = {
    plots.INK: "ink",
    plots.MUTED: "muted",
    plots.GRID: "grid",
    plots.PAPER: "paper",
    plots.BEFORE: "before",
    plots.TARGET: "target",
    plots.PREDICTED: "predicted",
    plots.REALISED: "realised",
}


LIGHT = {color: name for name, color in THEME.items()} | {"card": "#f6f7f9"}


DARK = {
    "ink": "#e4e8ec",
    "muted": "#9aa4af",
    "grid": "#2c333b",
    "paper": "#14181c",
    "before": "#8d97a3",
    "target": "#ff8a3d",
    "predicted": "#58b0ea",
    "realised": "#2fc796",
    "card": "#1b2127",
}


STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
@media print { :root { color-scheme: light; %(light)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.4rem 1.5rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.012em; margin: 0 0 .3rem }
h2 { font-size: 1.15rem; font-weight: 650; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--grid) }
p { margin: .4rem 0 }
.sub, figcaption, .note, .why { color: var(--muted); font-size: .9rem }
.headline { margin: 1.3rem 0 1.2rem; padding: .65rem 1rem; background: var(--card);
  border-left: 4px solid var(--realised); border-radius: 3px; font-weight: 550 }
.headline.off { border-color: var(--target) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%%; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 550; font-size: .84rem; color: var(--muted); padding: .3rem .7rem;
  border-bottom: 1.5px solid var(--ink); vertical-align: bottom; white-space: nowrap }
td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
th:first-child, td:first-child { padding-left: 0 }
td:first-child { font-weight: 600 }
.key::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .4em; border-radius: 50%%;
  background: var(--c) }
.realised { font-weight: 650 } .se { color: var(--muted); font-weight: 400 }
.verdict { display: inline-block; padding: 0 .55em; border-radius: 1em; border: 1.5px solid var(--realised);
  color: var(--realised); font-size: .84rem; font-weight: 600 }
.verdict.within { border-style: dashed }
.verdict.short, .verdict.above { border-color: var(--target); color: var(--target) }
ul { margin: .8rem 0 0; padding-left: 1.15rem; font-size: .93rem } li { margin: .2rem 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: 1.4rem 0 .4rem }
.facts div { font-size: .84rem; color: var(--muted) }
.facts b { display: block; font-size: 1.18rem; font-weight: 620; color: var(--ink); font-variant-numeric: tabular-nums }
figure { margin: 1.2rem 0 0 } figure svg { display: block; max-width: 100%%; height: auto; margin: 0 auto }
figure svg text { font-family: inherit !important }
figcaption { max-width: 50rem; margin: .5rem auto 0; text-align: center; text-wrap: balance }
.pair { break-inside: avoid; margin: 1.1rem 0 1.7rem }
.pair h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere }
.pair h3 .why { font-weight: 400; margin-left: .6em } .two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.text { background: var(--card); border-top: 3px solid var(--before); border-radius: 3px; padding: .7rem .95rem .8rem;
  font-size: .93rem }
.text.after { border-color: var(--realised) } .text p { white-space: pre-wrap; overflow-wrap: anywhere }
.text .scores { margin-top: .6rem; color: var(--muted); font-size: .82rem; font-variant-numeric: tabular-nums;
  white-space: normal }
.scores span { display: inline-block; white-space: nowrap; margin-right: 1em }
.label { font-size: .78rem; font-weight: 600; color: var(--muted) }
.duals td:last-child, .duals th:last-child { text-align: right; padding-right: 0 }
.duals tr:first-child th { border: 0; padding-bottom: 0; color: var(--ink) }
.duals .price td:first-child { font-weight: 400; color: var(--muted) } h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: .9rem; padding: .28rem .7rem }
.settings td:first-child { width: 15rem; font-weight: 400; color: var(--muted) }
@media (max-width: 44rem) { .two { grid-template-columns: 1fr } main { padding: 1.4rem 1rem 3rem } }
@media print { html { font-size: 9.5pt } main { padding: 0; max-width: none } .scroll { overflow: visible }
  th, td { padding-left: .4rem; padding-right: .4rem }
  body { font-size: 9.5pt; -webkit-print-color-adjust: exact; print-color-adjust: exact }
  figure svg { max-height: 10.5cm } figure, tr { break-inside: avoid } h2 { break-after: avoid } }
"""


def document(title: str, body: list[str], data: Any) -> str:
    """The page with these parts (empty ones omitted), and `data` as JSON inside."""
    style = STYLE % {"light": variables(LIGHT), "dark": variables(DARK)}
    # The only script is data, which no browser runs; the policy forbids everything that is not in this file.
    written = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src data:\">\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script type='application/json' id='report'>{written}</script>\n</body>\n</html>\n"
    )


def figure_of(name: str, figures: Mapping[str, str], caption: str) -> str:
    return f"<figure>{figures[name]}<figcaption>{caption}</figcaption></figure>"


def svg_of(figure: Any, name: str) -> str:
    """The figure as an <svg> element with themed colours and unique ids."""
    buffer = io.BytesIO()
    figure.patch.set_alpha(0)
    plots.write(figure, buffer, "svg")
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}: {colour};" for name, colour in colours.items())
