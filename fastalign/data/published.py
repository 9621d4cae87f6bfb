"""Preference data in the forms in which well-known data sets are published, as pairs of each of their values.

- PKU-SafeRLHF: two responses, of which one is better and one is safer.
- UltraFeedback: an instruction with completions, rated by aspect and overall.
- HelpSteer and HelpSteer2: responses to equal prompts, rated by aspect; HelpSteer3: two responses and a preference.
- SHP: a post with two comments, of which one is preferred. Nectar: a prompt with ranked answers.

Of rated responses a pair is the best against the worst. A ranking of K answers becomes its K(K-1)/2 pairs with a weight
that adds up to 1. The first value of each form is what most people mean by "preferred".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign._base.numbers import number

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("overall", "instruction_following", "honesty", "truthfulness", "helpfulness")
_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")  # between the turns of HelpSteer's prompts
Row = Mapping[str, Any]
Pair = dict[str, Any]
TIES, LONE, UNRATED = "ties", "prompts with one response", "comparisons with fewer than two ratings"


class NoPair(NamedTuple):
    """In place of a pair: why there is none, and of which value; None: of any."""

    reason: str
    value: str | None


class Bad(NamedTuple):
    """In place of a row's pairs: what is wrong with it."""

    row: int
    message: str


Made = Pair | NoPair | Bad


class Form(NamedTuple):
    """columns: by which it is known. values: of its pairs. pairs: those of a data set's rows, with a column "value"."""

    name: str
    columns: frozenset[str]
    values: tuple[str, ...]
    pairs: Callable[[Iterable[Row]], Iterator[Made]]


def form_of(row: Row) -> Form | None:
    """The published form that a data set with such rows has; None: another one."""
    return next((form for form in FORMS if form.columns <= row.keys()), None)


def _by_row(pairs: Callable[[Row], Iterable[Pair | NoPair]]) -> Callable[[Iterable[Row]], Iterator[Made]]:
    def made(rows: Iterable[Row]) -> Iterator[Made]:
        for i, row in enumerate(rows):
            try:
                yield from [*pairs(row)]
            except UserError as error:
                yield Bad(i, str(error))

    return made


def _pku(row: Row) -> Iterator[Pair | NoPair]:
    for value in ("better", "safer"):
        at = _which(f"{value}_response_id", row)
        both = [row["response_0"], row["response_1"]]
        yield _pair(row["prompt"], both[at], both[1 - at], value)


def _ultrafeedback(row: Row) -> Iterator[Pair | NoPair]:
    answers = list(row["completions"])
    if len(answers) < 2:
        yield NoPair(LONE, None)
        return
    for value in ULTRAFEEDBACK:
        ratings = [_ultrafeedback_rating(answer, value) for answer in answers]
        scored = [(x, answer["response"]) for x, answer in zip(ratings, answers, strict=True) if x is not None]
        yield _best_worst(row["instruction"], scored, value)


def _ultrafeedback_rating(answer: Row, value: str) -> float | None:
    if value == "overall":
        x = answer.get("overall_score")
    else:
        x = ((answer.get("annotations") or {}).get(value) or {}).get("Rating")
    try:
        rating = float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # "N/A"
        return None
    return None if math.isnan(rating) else rating


def _helpsteer(rows: Iterable[Row]) -> Iterator[Made]:
    groups: dict[str, list[tuple[str, dict[str, float]]]] = {}  # also of a file whose rows were shuffled
    for i, row in enumerate(rows):
        try:
            ratings = {value: number(value, row[value]) for value in HELPSTEER if not _missing(row.get(value))}
        except UserError as error:
            yield Bad(i, str(error))
        else:
            groups.setdefault(row["prompt"], []).append((row["response"], ratings))
    talks = any(_TURN.search(str(prompt)) for prompt in groups)
    for prompt, several in groups.items():
        if len(several) < 2:
            yield NoPair(LONE, None)
            continue
        for value in HELPSTEER:
            scored = [(ratings[value], response) for response, ratings in several if value in ratings]
            pair = _best_worst(prompt, scored, value)
            yield _as_messages(pair) if talks and isinstance(pair, dict) else pair


def _helpsteer3(row: Row) -> Iterator[Pair | NoPair]:
    preference = number("overall_preference", row["overall_preference"])
    both = [[{"role": "assistant", "content": row[name]}] for name in ("response1", "response2")]
    better = int(preference > 0)
    prompt = [dict(message) for message in row["context"]]
    yield _pair(prompt, both[better], both[1 - better], "overall") if preference else NoPair(TIES, "overall")


def _shp(row: Row) -> Iterator[Pair | NoPair]:
    first = _which("labels", row)
    both = [row["human_ref_B"], row["human_ref_A"]]
    yield _pair(row["history"], both[first], both[1 - first], "preferred")


def _nectar(row: Row) -> Iterator[Pair | NoPair]:
    answers = sorted(row["answers"], key=lambda answer: number("rank", answer["rank"]))
    pairs = [
        _pair(row["prompt"], better["answer"], worse["answer"], "rank")
        for better, worse in itertools.combinations(answers, 2)
        if better["rank"] != worse["rank"]
    ]
    known = [pair for pair in pairs if isinstance(pair, dict)]
    yield from ({**pair, "weight": 1 / len(known)} for pair in known)
    if not known:
        yield NoPair(TIES if len(answers) > 1 else LONE, "rank")


def _missing(x: Any) -> bool:
    """As JSON, CSV and pandas write that nothing is there."""
    return x is None or x == "" or x != x or (isinstance(x, str) and x.strip().lower() == "nan")


def _which(name: str, row: Row) -> int:
    """The index 0 or 1 in a cell, also as pandas writes a column of floats (0.0). Raises UserError."""
    x = row.get(name)
    if x not in (0, 1, "0", "1", "0.0", "1.0"):
        raise UserError(f"{name} must be 0 or 1, got {x!r}")
    return int(float(x))


def _pair(prompt: Any, chosen: Any, rejected: Any, value: str) -> Pair | NoPair:
    if chosen == rejected:
        return NoPair(TIES, value)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "value": value}


def _best_worst(prompt: Any, scored: Sequence[tuple[float, str]], value: str) -> Pair | NoPair:
    if len(scored) < 2:
        return NoPair(UNRATED, value)
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    return NoPair(TIES, value) if best[0] == worst[0] else _pair(prompt, best[1], worst[1], value)


def _as_messages(pair: Pair) -> Pair:
    """HelpSteer's turns as messages."""
    turns = _TURN.split(pair["prompt"])
    roles = ["user", *(role.lower() for role in turns[1::2])]
    prompt = [
        {"role": role, "content": text.strip()} for role, text in zip(roles, turns[::2], strict=True) if text.strip()
    ]
    sides = {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
    return {**pair, "prompt": prompt, **sides}


FORMS = (
    Form("PKU-SafeRLHF", frozenset({"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}),
         ("better", "safer"), _by_row(_pku)),
    Form("UltraFeedback", frozenset({"instruction", "completions"}), ULTRAFEEDBACK, _by_row(_ultrafeedback)),
    Form("HelpSteer3", frozenset({"context", "response1", "response2", "overall_preference"}), ("overall",),
         _by_row(_helpsteer3)),
    Form("HelpSteer", frozenset({"prompt", "response", *HELPSTEER}), HELPSTEER, _helpsteer),
    Form("SHP", frozenset({"history", "human_ref_A", "human_ref_B", "labels"}), ("preferred",), _by_row(_shp)),
    Form("Nectar", frozenset({"prompt", "answers"}), ("rank",), _by_row(_nectar)),
)  # fmt: skip
