"""Reads a judge's answer: lines "name: mark", and the probabilities of other marks where the server gives them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Marks = Mapping[str, Mapping[str, float]]  # value -> mark, in lower case -> the number that it means


class Unreadable(Exception):
    """An answer that rates not everything; its text is the message."""


def read(choice: Any, values: Marks) -> dict[str, float]:
    """The number for each value, from a choice of /chat/completions.

    It is the expectation over the marks' probabilities at the token that holds the mark (as in G-Eval, arXiv
    2303.16634), where log-probabilities came and all marks have one character; else the mark that was written. Raises
    `Unreadable`.
    """
    message = choice.get("message") if isinstance(choice, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str):
        raise Unreadable(f"holds no text, but {text!r:.60}")
    tokens = _tokens(choice)
    said = "".join(token["token"] for token in tokens)
    result = {}
    for name, marks in values.items():
        found = _find(text, name, marks, alone=len(values) == 1)
        if found is None:
            raise Unreadable(f"has no line {name + ': ' + '|'.join(marks)!r:.80}, it is {text!r:.120}")
        mark = found["mark"].lower()
        result[name] = marks[mark]
        there = _find(said, name, marks, alone=len(values) == 1)
        if there is not None and there["mark"].lower() == mark and all(len(one) == 1 for one in marks):
            expected = _expectation(tokens, there.start("mark"), mark, marks)
            result[name] = marks[mark] if expected is None else expected
    return result


def _find(text: str, name: str, marks: Mapping[str, float], *, alone: bool) -> re.Match[str] | None:
    """The last line that gives the value a mark; for the only value, also an answer that is a mark and nothing else."""
    among = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    mark = rf"(?P<mark>{among})(?!\w|[.,]\d)"
    scale = r"(?:\([^()\n]*\)[^\w\n]*)?"  # some repeat it: helpful (1 to 5): 4
    lines = [*re.finditer(rf"(?im)^[^\w\n]*{re.escape(name)}[^\w\n]*{scale}:[^\w\n]*{mark}", text)]
    return lines[-1] if lines else re.fullmatch(rf"(?i)\W*{mark}\W*", text) if alone else None


def _tokens(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens with their likeliest others; none unless they came in the usual form."""
    logprobs = choice.get("logprobs")
    rows = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    whole = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("token"), str) for row in rows)
    return rows if whole and rows else []


def _expectation(tokens: list[dict[str, Any]], at: int, mark: str, marks: Mapping[str, float]) -> float | None:
    """Over the marks among the likeliest tokens at the character `at`; None if that token is more than the mark."""
    end = 0
    for token in tokens:
        end += len(token["token"])
        if at < end:
            break
    others = token.get("top_logprobs")
    if token["token"].strip().lower() != mark or not isinstance(others, list):
        return None
    weights: dict[str, float] = {}
    for one in [*others, token]:
        value = one.get("logprob") if isinstance(one, dict) else None
        if not isinstance(value, (int, float)) or not value <= 1e-6 or not isinstance(one.get("token"), str):
            return None
        weights[one["token"]] = math.exp(value)
    total = expected = 0.0
    for said, weight in weights.items():
        if (number := marks.get(said.strip().lower())) is not None:
            total += weight
            expected += weight * number
    return expected / total if total > 0 else None
