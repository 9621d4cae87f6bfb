"""The report of the MAP job: for each value its level before, the target, the dual's prediction, and the level of the
chosen texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write
from fastalign._base.units import counted, decimals
from fastalign.report.duals import Dual, both

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Example", "Report", "Value", "build"]

# With fewer effective candidates per prompt, a few texts determine the levels.
LOW_ESS = 2.0


@dataclass(frozen=True)
class Value:
    """One value's row. Levels are means over prompts, in the reward's own units.

    before: mean over all candidates; std: their standard deviation. target: the palette's level. predicted: the level
    of p_λ according to the dual. realised: mean over the chosen texts. rao_blackwell: mean over prompts of the
    softmax(λ·R)-weighted mean of all N candidates, which is the expectation of the realised mean.

    se: the standard error of `realised` given the candidates, sqrt(Σ_x Var_λ,x / k) / P, with Var_λ,x the reward's
    variance under prompt x's weights, P prompts and k draws each. Draws for different prompts are independent but not
    identically distributed: every prompt gets its k draws, so only the variance within prompts counts. This is the
    error relative to the dual's prediction; it does not include the variation due to other candidates or other prompts.
    Exact for "resample"; at most that for the stratified methods in the usual case.

    score: (realised - predicted) / se; None if se is 0 and they differ. agrees: within 3 standard errors.
    sense: ">=", "<=" or "==": at least, at most or exactly `target`; "free": no target.
    verdict: "met", "within error" (the policy reaches it, and the texts miss it by at most 3 SE), or "short" (below the
    target) or "above" (beyond it).
    short_by: how far `realised` is on the wrong side of `target`, else 0. reason: why it is short, "" if met.
    """

    name: str
    lam: float
    before: float
    std: float
    target: float
    predicted: float
    realised: float
    se: float
    rao_blackwell: float
    score: float | None
    agrees: bool
    verdict: str
    short_by: float
    reason: str
    nearest: float | None
    sense: str = ">="

    @property
    def wish(self) -> str:
        """The target, as the report prints it: a level to reach, or "<= 0.20", "== 0.20", "free"."""
        if self.sense == "free":
            return "free"
        return self.show(self.target) if self.sense == ">=" else f"{self.sense} {self.show(self.target)}"

    @property
    def missed(self) -> str:
        """By how much, and on which side, if it is missed."""
        side = {"<=": "above by", "==": "off by"}.get(self.sense, "short by")
        return f"{side} {self.show(self.short_by)}"

    @property
    def decimals(self) -> int:
        return decimals(self.std)

    def show_error(self, report: Report) -> str:
        """ "± 0.030", or why there is none: a single prompt, or a single candidate per prompt."""
        return f"± n/a (1 {report.lone})" if report.lone else f"± {self.show(self.se)}"

    def show(self, level: float, sign: str = "") -> str:
        """A level as the report prints it."""
        text = f"{level:{sign}.{self.decimals}f}"
        return text.lstrip("-") if not text.strip("-0.") else text


@dataclass(frozen=True)
class Example:
    """A prompt, its first candidate, its first chosen text, and the rewards (m,) of both."""

    prompt: str
    before: str
    after: str
    rewards_before: list[float]
    rewards_after: list[float]
    why: str


@dataclass(frozen=True)
class Report:
    """The result of `build`. `to_json()` has every number; the arrays are the data of the figures."""

    values: list[Value]
    kl: float
    ess: float
    ess_per_prompt: np.ndarray = field(repr=False)
    feasible: bool
    dual: str
    method: str
    prompts: int
    candidates: int
    draws: int
    examples: list[Example] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    rewards: np.ndarray = field(repr=False)
    realised_rewards: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    duals: tuple[Dual, Dual] | tuple[()] = field(repr=False)  # per prompt and joint; none of a single prompt

    @property
    def lone(self) -> str:
        """ "prompt" or "candidate" if there is only one, so that errors are unknown; else ""."""
        return "prompt" if self.prompts < 2 else "candidate" if self.candidates < 2 else ""

    @property
    def agrees(self) -> bool | None:
        """Whether every value's realised mean is within 3 standard errors of the prediction; None if the errors are
        unknown."""
        if self.lone:
            return None
        return all(value.agrees for value in self.values)

    @property
    def headline(self) -> str:
        """One sentence: do the texts reach the levels that the dual predicts?"""
        against = "the dual's prediction"
        if not self.is_draw:
            against += f" (texts were picked by {self.method!r}, which are not draws from p_λ)"
        if self.lone:
            return f"A single {self.lone} cannot show whether the values agree with {against}."
        off = [value for value in self.values if not value.agrees]
        if not off:
            every = "All values agree" if len(self.values) > 1 else f"{self.values[0].name} agrees"
            return f"{every} with {against} within 3 standard errors."
        far = [f"{v.name} (off by {v.show(v.realised - v.predicted, '+')}{_errors(v)})" for v in off]
        return f"Not within 3 standard errors of {against}: {', '.join(far)}."

    @property
    def is_draw(self) -> bool:
        """Whether the texts' mean is an unbiased estimate of the policy's (not so for the best, nor without
        replacement)."""
        return self.method != "best" and not (self.method == "gumbel_top_k" and self.draws > 1)

    @property
    def notes(self) -> list[str]:
        """Caveats: infeasible, joint dual, few effective candidates."""
        notes = []
        if not self.feasible:
            notes.append(
                "The palette is infeasible: no reweighting of these candidates reaches it. "
                "λ is for a reachable palette near it, and the prediction is of that."
            )
        if self.dual == "joint":
            notes.append(
                "λ is from the joint dual, which also reweights the prompts. Drawing within each prompt keeps every "
                "prompt, so the realised levels follow the per-prompt mean instead of the prediction."
            )
        if self.candidates > 1 and float(np.median(self.ess_per_prompt)) < LOW_ESS:
            notes.append(
                f"The effective sample size is low, {np.median(self.ess_per_prompt):.1f} of {self.candidates} "
                "candidates for half the prompts or more: the levels are those of these candidates; new ones would "
                "probably reach less."
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Every number of the report as plain data: no NaN, no numpy."""
        names = ("name", "before", "std", "target", "predicted", "realised", "se", "rao_blackwell", "score", "agrees",
                 "verdict", "short_by", "reason", "nearest", "sense")  # fmt: skip
        return _plain({
            "kind": "report",
            "version": 1,
            "headline": self.headline,
            "agrees": self.agrees,
            "notes": self.notes,
            "values": [
                {**{name: getattr(v, name) for name in names}, "lambda": v.lam,
                 **({"se": None} if self.lone else {})} for v in self.values
            ],
            "kl": self.kl,
            "ess": self.ess,
            "ess_per_prompt": {"min": self.ess_per_prompt.min(), "median": np.median(self.ess_per_prompt),
                               "mean": self.ess_per_prompt.mean()},
            "feasible": self.feasible,
            "dual": self.dual,
            "duals": [each.to_json() for each in self.duals],
            "method": self.method,
            "prompts": self.prompts,
            "candidates": self.candidates,
            "draws": self.draws,
            "examples": [vars(example) for example in self.examples],
            "settings": self.settings,
        })  # fmt: skip

    def to_html(self, path: str | Path) -> None:
        """Write the page, one self-contained file, atomically. Raises UserError without matplotlib."""
        from fastalign.report.html import page

        text = page(self)
        with atomic_write(path) as beside:
            beside.write_text(text, encoding="utf-8")

    def print(self, console: Console) -> None:
        """The table and a few texts before and after on a rich console, within 100 columns."""
        from fastalign.report.terminal import show

        show(self, console)

    def figures(self) -> dict[str, Any]:
        """The page's matplotlib figures by name: levels, histograms, radar (from three values on), pareto."""
        from fastalign.report import figures as plots
        from fastalign.report.tradeoff import Tradeoff

        names = [value.name for value in self.values]
        columns = ("before", "std", "target", "predicted", "realised", "se", "lam")
        before, std, target, predicted, realised, se, lam = (
            np.array([getattr(v, c) for v in self.values]) for c in columns
        )
        target[[v.sense == "free" for v in self.values]] = np.nan
        m = len(names)
        figures = {
            "levels": plots.levels(
                names, before=before, std=std, palette=target, predicted=predicted, realised=realised, se=se
            ),
            "histograms": plots.histograms(
                self.rewards.reshape(-1, m),
                self.realised_rewards.reshape(-1, m),
                names,
                weights=self.weights.reshape(-1),
                palette=target,
            ),
        }
        if m > 2:
            series = {"before": before, "target": target, "predicted": predicted, "realised": realised}
            figures["radar"] = plots.radar(names, series, before=before, std=std)
        tradeoff = Tradeoff(self.rewards)
        # The policy's own mean KL over the prompts; with the joint dual, `kl` includes the reweighting of the prompts.
        kl = float(tradeoff.at((lam * tradeoff.std)[None])[1][0])
        reach = 2.5 * float(np.linalg.norm(lam * tradeoff.std)) or 3.0
        cloud = tradeoff.cloud(reach)
        pairs = plots.pairs(cloud[0])
        figures["pareto"] = plots.pareto(
            names,
            before=before,
            cloud=cloud,
            kl=kl,
            palette=target,
            predicted=predicted,
            realised=realised,
            se=se,
            fronts={pair: tradeoff.front(*pair, kl) for pair in pairs} if kl > 0 else None,
            limits={pair: tradeoff.limit(*pair) for pair in pairs},
        )
        return figures


def build(
    *,
    values: Sequence[str],
    rewards: np.ndarray,
    selected: np.ndarray,
    palette: Mapping[str, Any],
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Report:
    """Compare the chosen texts with the palette.

    values: m names. rewards: (P, N, m), finite, every candidate's. selected: (P, k) integers in 0..N-1, the candidates
    chosen. palette: the content of `fastalign map`'s file: "palette", "lambda", "levels" (m,), "kl", "ess", "feasible",
    and if known "nearest" (m,) or None, "dual", "sense" and "free" (m,). prompts: P. texts: P x N. settings: rows for
    the table of settings; its "method" is how the texts were chosen (default "resample"). seed: for the examples drawn
    at random.

    Raises UserError, in one line, if shapes do not match, a number is not finite or an index is out of range.
    """
    settings = dict(settings or {})
    rewards, selected, solution = _checked(values, rewards, selected, palette, prompts, texts)
    p, n, m = rewards.shape
    k = selected.shape[1]
    exact = rewards.astype(np.float64)
    lam = solution["lambda"]
    scores = exact @ lam
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    realised_rewards = np.take_along_axis(exact, selected[:, :, None], axis=1)

    flat = exact.reshape(-1, m)
    std = flat.std(axis=0)
    # A constant reward's std is rounding.
    std[std <= 1e-14 * np.abs(flat).max(axis=0)] = 0.0
    tilted = np.einsum("pn,pnm->pm", weights, exact)
    variance = np.einsum("pn,pnm->pm", weights, (exact - tilted[:, None]) ** 2)
    columns = {
        "lam": lam,
        "before": flat.mean(axis=0),
        "std": std,
        "target": solution["palette"],
        "predicted": solution["levels"],
        "realised": realised_rewards.mean(axis=(0, 1)),
        "se": np.sqrt(variance.sum(axis=0) / k) / p,
        "rao_blackwell": tilted.mean(axis=0),
    }
    ess = 1.0 / (weights**2).sum(axis=1)
    frame = {
        "dual": str(palette.get("dual", "per_prompt")),
        "method": clean(settings.get("method", "resample")),
        "feasible": bool(palette["feasible"]),
        "prompts": p,
        "candidates": n,
        "draws": k,
    }
    nearest = solution["nearest"]
    senses = ["free" if free else sense for free, sense in zip(solution["free"], solution["sense"], strict=True)]
    rows = []
    for j, name in enumerate(values):
        row = {column: float(x[j]) for column, x in columns.items()}
        rows.append(_judged(clean(name), senses[j], row, None if nearest is None else float(nearest[j]), ess, frame))
    return Report(
        values=rows,
        kl=solution["kl"],
        ess=solution["ess"],
        ess_per_prompt=ess,
        examples=_examples(prompts, texts, exact, selected, lam, seed),
        settings=settings,
        rewards=rewards,
        realised_rewards=realised_rewards,
        weights=weights,
        duals=both(rewards, solution["palette"], solution["sense"]) if p > 1 else (),
        **frame,
    )


def _short(sense: str, target: float, level: float) -> float:
    """How far a level is on the wrong side of its target, or 0."""
    return {">=": max(0.0, target - level), "<=": max(0.0, level - target), "==": abs(level - target), "free": 0.0}[
        sense
    ]


def _judged(name: str, sense: str, row: dict[str, float], nearest: float | None, ess: np.ndarray, frame: dict) -> Value:
    """The verdict on one value."""
    # The solver's tolerance, and rounding of the rewards.
    slack = 1e-6 * row["std"] + 1e-9 * abs(row["before"])
    gap = row["realised"] - row["predicted"]
    score = gap / row["se"] if row["se"] > 0 else (0.0 if abs(gap) <= slack else None)
    agrees = abs(gap) <= 3 * row["se"] + slack
    short_by, counted_on, within = (
        _short(sense, row["target"], row[level]) for level in ("realised", "predicted", "rao_blackwell")
    )
    verdict, reasons = "met", []
    if short_by <= slack:
        short_by = 0.0
    else:
        drawn = max(counted_on, within) <= slack and short_by <= 3 * row["se"] + slack
        verdict = "within error" if drawn else "above" if row["realised"] > row["target"] else "short"
        if not frame["feasible"]:
            reasons.append(
                "the palette is infeasible"
                + (f", the nearest reachable level is {nearest:.4g}" if nearest is not None else "")
            )
        elif counted_on > slack:
            reasons.append(f"λ reaches only {row['predicted']:.4g} (bounded, or at the edge of what is feasible)")
        elif within > slack:
            if frame["dual"] == "joint":
                why = "the joint dual assumes other weights of the prompts"
            else:
                why = "λ was solved for other candidates"
            reasons.append(f"{why}; within these prompts it reaches {row['rao_blackwell']:.4g}")
        elif frame["method"] == "best":
            reasons.append("texts were picked as the best, not drawn from p_λ")
        elif verdict == "within error":
            count = frame["prompts"] * frame["draws"]
            reasons.append(f"sampling error of {counted(count, 'draw')} ({short_by / row['se']:.1f} standard errors)")
        else:
            reasons.append("the draws miss the policy's mean by more than 3 standard errors")
        if np.median(ess) < LOW_ESS and frame["candidates"] > 1:
            reasons.append(f"effective sample size {np.median(ess):.1f} of {frame['candidates']}")
    return Value(
        name=name,
        score=score,
        agrees=agrees,
        verdict=verdict,
        short_by=short_by,
        reason="; ".join(reasons),
        nearest=nearest,
        sense=sense,
        **row,
    )


def _examples(prompts, texts, rewards, selected, lam, seed: int, rose: int = 3, random: int = 3) -> list[Example]:
    """The prompts for which λ·R rose the most from the first candidate to the first chosen text, and others at
    random."""
    rows = np.arange(len(rewards))
    gain = (rewards[rows, selected[:, 0]] - rewards[:, 0]) @ lam
    order = np.argsort(-gain, kind="stable")
    largest = [i for i in order[:rose] if gain[i] > 0]
    rest = np.setdiff1d(rows, largest)
    drawn = np.random.default_rng(seed).permutation(rest)[:random]
    examples = []
    for why, chosen in (("largest rise of λ·R", largest), ("drawn at random", drawn)):
        for i in chosen:
            j = selected[i, 0]
            examples.append(
                Example(
                    clean(prompts[i]),
                    clean(texts[i][0]),
                    clean(texts[i][j]),
                    rewards[i, 0].tolist(),
                    rewards[i, j].tolist(),
                    why,
                )
            )
    return examples


def clean(text: str) -> str:
    """Removes control characters (terminals execute them, HTML forbids them) and halves of surrogate pairs."""
    text = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160)).strip()


def _errors(value: Value) -> str:
    return "" if value.score is None else f", {abs(value.score):.1f} SE"


def _checked(values, rewards, selected, palette, prompts, texts):
    rewards, selected = np.asarray(rewards), np.asarray(selected)
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise UserError(f"rewards must be (prompts, candidates, values), no dimension 0, got shape {rewards.shape}")
    p, n, m = rewards.shape
    if rewards.dtype.kind not in "fiub":
        raise TypeError(f"rewards must be real numbers, got {rewards.dtype}")
    if rewards.dtype not in (np.float32, np.float64):
        rewards = rewards.astype(np.float64)
    if not np.isfinite(rewards).all():
        prompt, candidate, value = np.argwhere(~np.isfinite(rewards))[0].tolist()
        raise UserError(
            f"rewards must be finite, got {rewards[prompt, candidate, value]} at prompt {prompt}, candidate "
            f"{candidate}, value {value}"
        )
    if len(values) != m:
        raise UserError(f"values must name the {m} rewards, got {len(values)}")
    if len(prompts) != p:
        raise UserError(f"prompts must be {p}, one for each row of rewards, got {len(prompts)}")
    if len(texts) != p or any(len(row) != n for row in texts):
        raise UserError(f"texts must be {p} x {n}, one for each candidate")
    if selected.ndim != 2 or len(selected) != p or selected.shape[1] == 0 or selected.dtype.kind not in "iu":
        raise UserError(
            f"selected must be integers ({p}, k), k at least 1, got {selected.dtype} of shape {selected.shape}"
        )
    if selected.min() < 0 or selected.max() >= n:
        wrong = selected[(selected < 0) | (selected >= n)][0]
        raise UserError(f"selected must lie in 0..{n - 1}, got {wrong}")
    missing = [name for name in ("palette", "lambda", "levels", "kl", "ess", "feasible") if palette.get(name) is None]
    if missing:
        raise UserError(f"palette must have {', '.join(missing)}, got {', '.join(palette) or 'nothing'}")
    solution = _wishes(palette, rewards)
    for name in ("palette", "lambda", "levels", "nearest"):
        x = solution["palette"] if name == "palette" else palette.get(name)
        if x is None and name == "nearest":
            solution[name] = None
            continue
        x = np.asarray(x, dtype=np.float64)
        if x.shape != (m,):
            raise UserError(f"palette's {name!r} must have {m} numbers, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise UserError(
                f"palette's {name!r} must be finite, got {x.tolist()}: solve for a palette that can be reached"
            )
        solution[name] = x
    for name in ("kl", "ess"):
        solution[name] = float(palette[name])
        if not math.isfinite(solution[name]):
            raise UserError(f"palette's {name!r} must be finite, got {solution[name]}")
    return rewards, selected.astype(np.int64), solution


def _wishes(palette: Mapping[str, Any], rewards: np.ndarray) -> dict[str, list]:
    """Each value's target: "palette", its level; "sense", as in `palette.solve`; "free", whether there is no target.

    A value without a level (None) has no target: it gets the level that all candidates have.
    """
    m = rewards.shape[2]
    given = palette.get("sense") or ">="
    senses = [given] * m if isinstance(given, str) else list(given)
    if len(senses) != m or not set(senses) <= {">=", "<=", "=="}:
        raise UserError(f"palette's 'sense' must have {m} of >=, <=, ==, got {senses}")
    free = list(palette.get("free") or [False] * m)
    if len(free) != m:
        raise UserError(f"palette's 'free' must have {m} of true and false, got {free}")
    levels = list(palette["palette"])
    for j, level in enumerate(levels):
        if level is None and j < m:
            levels[j], senses[j], free[j] = float(rewards[..., j].min()), ">=", True
    return {"palette": levels, "sense": senses, "free": free}


def _plain(x: Any) -> Any:
    """x as JSON values: numpy to Python, NaN and infinities to None, anything else to its text."""
    if isinstance(x, Mapping):
        return {clean(str(key)): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, set)):
        return [_plain(value) for value in x]
    if isinstance(x, np.ndarray):
        return _plain(x.tolist())
    if isinstance(x, np.generic):
        return _plain(x.item())
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return clean(x) if isinstance(x, str) else x if x is None or isinstance(x, (bool, int)) else clean(str(x))
