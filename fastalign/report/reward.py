"""The report of a reward model on held-out pairs: accuracy, calibration, and the distribution of scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastalign._base.error_bars import wilson
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Pairs whose confidence is in [low, high): the model's confidence and its accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Head:
    """One value's row.

    pairs: the number of pairs with a preference in it. accuracy: the share whose better text scores higher, ties count
    half; low, high: its 95 % Wilson interval with one trial per prompt, because a prompt's pairs may be correlated.
    margin: the mean of better minus worse. calibration_error: the expected calibration error of sigmoid(margin) (arXiv
    1706.04599, eq. 3), Σ_b n_b / n · |accuracy_b - confidence_b| over ten equal bins of the confidence max(p, 1 - p) in
    [0.5, 1].
    log_loss: the mean of -log sigmoid(margin), nats. All of them 0 if there are no pairs.
    """

    name: str
    pairs: int
    prompts: int
    accuracy: float
    low: float
    high: float
    margin: float
    calibration_error: float
    log_loss: float
    reliability: list[Reliability]
    better: np.ndarray = field(repr=False)
    worse: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class RewardReport:
    heads: list[Head]
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        names = ("name", "pairs", "prompts", "accuracy", "low", "high", "margin", "calibration_error", "log_loss")
        rows = [
            {
                **{n: getattr(head, n) if head.pairs or n in names[:3] else None for n in names},
                "reliability": [vars(row) for row in head.reliability],
            }
            for head in self.heads
        ]
        return {"kind": "reward_report", "version": 1, "values": rows, "settings": self.settings}

    def figures(self) -> dict[str, Any]:
        """matplotlib figures by name: "scores", each value's scores of better and worse texts, and "reliability"."""
        return {"scores": _scores(self.heads), "reliability": _reliability(self.heads)}

    def write(self, path: str | Path) -> None:
        """Write the page, one self-contained .html, or the two figures as one .png or .svg each
        (<stem>-<name>.<suffix>)."""
        files = written(path)
        if len(files) == 1:
            text = self._page()
            with atomic_write(files[0]) as beside:
                beside.write_text(text, encoding="utf-8")
            return
        from fastalign.report import figures as plots

        for file, figure in zip(files, self.figures().values(), strict=True):
            plots.save(figure, file)

    def _page(self) -> str:
        from fastalign.report import html, page

        drawn = {name: page.svg_of(figure, name) for name, figure in self.figures().items()}
        names = ("Value", "Pairs", "Accuracy (95 %)", "Calibration error", "Log loss", "Mean margin")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(
            f"<tr><td>{escape(h.name)}</td><td>{h.pairs:,}</td>"
            + (
                f"<td class='realised'>{h.accuracy:.3f} <span class='se'>({h.low:.3f}–{h.high:.3f})</span></td>"
                f"<td>{h.calibration_error:.3f}</td><td>{h.log_loss:.3f}</td><td>{h.margin:.3f}</td></tr>"
                if h.pairs
                else "<td colspan='4'>n/a (0 pairs)</td></tr>"
            )
            for h in self.heads
        )
        tables = "".join(_bins_table(h) for h in self.heads)
        settings = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in html.flat(self.settings)
        )
        title = "Reward model on held-out pairs"
        sure = (
            "On the line, a text that the model prefers with probability p is the better one in a share p of the "
            "pairs. Below it the model is overconfident. Larger circles have more pairs."
        )
        body = [
            f"<h1>{title}</h1>",
            f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
            "<h2>Scores of the better and the worse text</h2>",
            page.figure_of("scores", drawn, "Score of each text, better and worse ones apart."),
            "<h2>Calibration</h2>",
            page.figure_of("reliability", drawn, sure),
            tables,
            f"<h2>Settings</h2>\n<table class='settings'><tbody>{settings}</tbody></table>",
        ]
        return page.document(title, body, self.to_json())


def written(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `RewardReport.write` writes. Raises UserError for any other suffix."""
    path = Path(path)
    if path.suffix.lower() == ".html":
        return [path]
    if path.suffix.lower() in (".png", ".svg"):
        return [path.with_name(f"{path.stem}-{name}{path.suffix}") for name in ("scores", "reliability")]
    raise UserError(f"report must end in .html, .png or .svg, got {str(path)!r}")


def build(
    chosen: np.ndarray,
    rejected: np.ndarray,
    values: Sequence[str],
    *,
    preference: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RewardReport:
    """Evaluate a reward model with m heads on n pairs.

    chosen, rejected: (n, m) scores of the two texts. preference: (n, m), above 0 if chosen is better in that value,
    below 0 if rejected is, 0 for no preference; None: always chosen. prompts: n, each pair's; None: every pair has its
    own. Raises UserError for shapes that do not match and scores that are not finite.
    """
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    preference = np.ones_like(chosen) if preference is None else np.asarray(preference)
    shape = (len(chosen), len(values))
    for name, x in (("chosen", chosen), ("rejected", rejected), ("preference", preference)):
        if x.shape != shape:
            raise UserError(f"{name} must have shape {shape}, pairs by values, got {x.shape}")
        if not np.isfinite(x).all():
            raise UserError(f"{name} must be finite, got {x[~np.isfinite(x)][0]}")
    own = (
        np.arange(len(chosen))
        if prompts is None
        else np.unique(np.asarray(prompts, dtype=object), return_inverse=True)[1]
    )
    if len(own) != len(chosen):
        raise UserError(f"prompts must be one for each of the {len(chosen)} pairs, got {len(own)}")
    heads = []
    for j, name in enumerate(values):
        said = preference[:, j] != 0
        up = preference[said, j] > 0
        first, second = chosen[said, j], rejected[said, j]
        heads.append(
            _measure(str(name), np.where(up, first, second), np.where(up, second, first), len(np.unique(own[said])))
        )
    return RewardReport(heads, dict(settings or {}))


def _measure(name: str, better: np.ndarray, worse: np.ndarray, prompts: int) -> Head:
    n = len(better)
    if not n:
        return Head(name, 0, 0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, [], better, worse)
    margin = better - worse
    right = np.where(margin == 0, 0.5, margin > 0)
    confidence = np.exp(-np.logaddexp(0, -np.abs(margin)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    rows = []
    for b in range(BINS):
        inside = place == b
        if inside.any():
            low, high = 0.5 + b / (2 * BINS), 0.5 + (b + 1) / (2 * BINS)
            mean = float(confidence[inside].mean()), float(right[inside].mean())
            rows.append(Reliability(round(low, 10), round(high, 10), int(inside.sum()), *mean))
    accuracy = float(right.mean())
    low, high = wilson(accuracy, prompts)
    return Head(
        name=name,
        pairs=n,
        prompts=prompts,
        accuracy=accuracy,
        low=low,
        high=high,
        margin=float(margin.mean()),
        calibration_error=sum(row.count * abs(row.accuracy - row.confidence) for row in rows) / n,
        log_loss=float(np.logaddexp(0, -margin).mean()),
        reliability=rows,
        better=better,
        worse=worse,
    )


def _bins_table(head: Head) -> str:
    rows = "".join(
        f"<tr><td>{r.low:.2f}–{r.high:.2f}</td><td>{r.count:,}</td><td>{r.confidence:.3f}</td>"
        f"<td>{r.accuracy:.3f}</td></tr>"
        for r in head.reliability
    )
    names = (escape(head.name), "Pairs", "Confidence", "Accuracy")
    columns = "".join(f"<th>{name}</th>" for name in names)
    return f"<div class='scroll'><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"


def _scores(heads: Sequence[Head]):
    from fastalign.report import figures as plots
    from fastalign.report.figures import style

    columns = min(3, len(heads))
    rows = -(-len(heads) // columns)
    with style.figure(max(4.6, 3.2 * columns), 0.6 + 2.45 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(grid.flat, heads, strict=False):
            axes.set_title(style.short(head.name, 30))
            axes.set_xlabel("score")
            if not head.pairs:
                continue
            edges = style.bins(np.concatenate([head.better, head.worse]))
            share = np.full(head.pairs, 100 / head.pairs)
            axes.hist(head.worse, edges, weights=share, color=plots.BEFORE, alpha=0.32, linewidth=0)
            axes.hist(head.better, edges, weights=share, histtype="step", color=plots.REALISED, linewidth=1.6)
            axes.grid(axis="y")
        grid[0, 0].set_ylabel("texts, %")
        style.legend(
            figure,
            [style.patch("worse text", plots.BEFORE), style.line("better text", plots.REALISED, linewidth=1.6)],
        )
    return figure


def _reliability(heads: Sequence[Head]):
    from fastalign.report import figures as plots
    from fastalign.report.figures import style

    columns = min(3, len(heads))
    rows = -(-len(heads) // columns)
    with style.figure(max(4.2, 3.0 * columns), 0.5 + 3.0 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(grid.flat, heads, strict=False):
            axes.plot([0.5, 1], [0.5, 1], color=plots.MUTED, linewidth=1.1)
            if head.pairs:
                share = np.array([row.count for row in head.reliability]) / head.pairs
                x = [row.confidence for row in head.reliability]
                y = [row.accuracy for row in head.reliability]
                axes.plot(x, y, color=plots.PREDICTED, linewidth=1.2)
                axes.scatter(x, y, s=18 + 260 * share, color=plots.PREDICTED, alpha=0.85, linewidth=0, zorder=3)
            axes.set_title(f"{style.short(head.name)}  (error {head.calibration_error:.3f})")
            axes.set_xlabel("confidence")
            axes.set_xlim(0.48, 1.02)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(True)
        grid[0, 0].set_ylabel("accuracy")
    return figure
