"""Candidates made elsewhere: prompts with responses, and perhaps scores, in files and tables of other programs.

One row per response, or one per prompt with lists of responses and scores. Parquet, Arrow, JSONL, JSON and CSV files;
tables of pandas, polars and datasets; the outputs of vLLM ("outputs" with "text") and of OpenAI's batches ("choices").
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastalign._base import outputs, tables
from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign.data import rows as sources
from fastalign.data.conversations import Conversation, as_prompt
from fastalign.decode.candidates import Candidates

PROMPTS = ("prompt", "prompts", "messages", "question", "instruction", "query", "input")  # tried in this order
RESPONSES = (
    "response", "responses", "completion", "completions", "text", "texts", "output", "outputs", "answer", "generation",
    "candidate", "candidates",
)  # fmt: skip
# Numbers that are no scores, of our own files and of others'.
_NO_VALUES = {
    "prompt_id", "candidate_id", "draw", "tokens", "logprob", "log_weight", "is_conversation", "id", "index", "idx",
    "seed", "row", "", "Unnamed: 0", "__index_level_0__",  # the last three: an index of pandas
}  # fmt: skip
_REWARD = "reward:"  # how our own files name them


class Columns(NamedTuple):
    """Names of columns; None: the first of the usual ones that is there. values: the scores; None: every column of
    numbers."""

    prompt: str | None = None
    response: str | None = None
    values: Sequence[str] | None = None

    def named(self) -> dict[str, str]:
        """The columns of texts that a user named, for the record of a job."""
        named = {"prompt_column": self.prompt, "response_column": self.response}
        return {name: column for name, column in named.items() if column is not None}


def read(
    path: str | os.PathLike[str],
    *,
    kind: str | Collection[str],
    columns: Columns = Columns(),  # noqa: B008
) -> Candidates:
    """A file of fastalign's of one of these kinds, or anybody's file of candidates, which needs scores if only "scored"
    fits.

    Raises FileNotFoundError or UserError, one line: the file, the columns that it has, the option that names them.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    path = Path(path)
    check_input(path)
    if tables.has_note(path):
        return Candidates.from_parquet(path, kind=kinds)
    found = from_rows(sources.read(path, what="candidates"), columns, where=str(path))
    if not found.rewards and "candidates" not in kinds:
        raise UserError(
            f"{path}: must have a column of numbers for each value, got none; `fastalign score {path}` adds rewards"
        )
    return found


def from_rows(rows: Any, columns: Columns = Columns(), *, where: str = "rows") -> Candidates:  # noqa: B008
    """Candidates of a table: a list of objects, or a pandas or polars DataFrame, or a datasets.Dataset.

    Prompts with more responses than the others lose the last ones, which is said. where: its name in errors. Raises
    UserError, one line.
    """
    table = _objects(rows, where)
    have = list(dict.fromkeys(name for row in table for name in row))
    prompt = _column(where, have, columns.prompt, PROMPTS, "prompt", "prompts")
    response = _column(
        where, [name for name in have if name != prompt], columns.response, RESPONSES, "response", "responses"
    )
    values = _values(where, table, have, {prompt, response}, columns.values)
    texts: dict[str, list[str]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    for i, row in enumerate(table):
        asked = _prompt(f"{where}: row {i}: {prompt}", row, prompt)
        answers = _texts(f"{where}: row {i}: {response}", row.get(response))
        mine = scores.setdefault(asked, {name: [] for name in values})
        for name in values:
            mine[name] += _numbers(f"{where}: row {i}: {name}", row.get(name), len(answers))
        texts.setdefault(asked, []).extend(answers)
    n = min(map(len, texts.values()))
    most = max(map(len, texts.values()))
    if n < most:
        outputs.say(f"{where}: prompts have {n} to {most} responses; the first {n} of each are used")
    empty: list[list[list[Any]]] = [[[] for _ in range(n)] for _ in texts]
    rewards = {
        name.removeprefix(_REWARD): np.array([scores[asked][name][:n] for asked in texts], dtype=np.float64)
        for name in values
    }
    return Candidates(list(texts), [row[:n] for row in texts.values()], empty, empty, rewards=rewards)


def _objects(rows: Any, where: str) -> list[dict[str, Any]]:
    if hasattr(rows, "to_dicts"):  # polars
        rows = rows.to_dicts()
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        rows = rows.to_dict("records")
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"{where} must be a list of objects or a table, got {type(rows).__name__}")
    table = list(rows)
    for i, row in enumerate(table):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: row {i} must be an object, got {type(row).__name__}")
    if not table:
        raise UserError(f"{where}: contains no candidates")
    return [dict(row) for row in table]


def _column(where: str, have: Sequence[str], given: str | None, usual: Sequence[str], what: str, several: str) -> str:
    if given is not None:
        if given not in have:
            raise UserError(f"{where}: has no column {given!r}, it has {', '.join(have)}: {what}_column names another")
        return given
    if (name := next((name for name in usual if name in have), None)) is None:
        raise UserError(
            f"{where}: must have a column with the {several} ({usual[0]}, {usual[2]} ...), it has {', '.join(have)}: "
            f"{what}_column names one"
        )
    return name


def _values(
    where: str, table: Sequence[Mapping[str, Any]], have: Sequence[str], taken: set[str], given: Sequence[str] | None
) -> list[str]:
    """The columns of scores. One that lacks some of its numbers is an error if it was asked for, else told."""
    numbers: list[str] = []
    holes: dict[str, str] = {}
    for name in have:
        if name in taken | _NO_VALUES or name.endswith("_id"):
            continue
        cells = [(i, x) for i, row in enumerate(table) for x in _listed(row.get(name))]
        there = [(i, x) for i, x in cells if x is not None and x != ""]
        if not all(_is_number(x) for _, x in there):
            continue
        if len(there) == len(cells):
            numbers.append(name)
        elif there:
            at = next(i for i, x in cells if x is None or x == "")
            holes[name.removeprefix(_REWARD)] = f"{where}: row {at}: {name} has no number"
    if given is None:
        for hole in holes.values():
            outputs.say(f"{hole}: the column is not read as a value")
        return [name for name in numbers if name not in ("token_ids", "logprobs")]
    known = {name.removeprefix(_REWARD): name for name in numbers}
    for name in given:
        if name in holes:
            raise UserError(holes[name])
        if name not in known:
            raise UserError(f"{where}: values must be columns of numbers ({', '.join(known) or 'none'}), got {name}")
    return [known[name] for name in given]


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple | np.ndarray) else [x]


def _is_number(x: Any) -> bool:
    if isinstance(x, bool) or x is None or x == "":
        return x is not None and x != ""
    try:
        float(x)
    except (TypeError, ValueError):
        return False
    return not isinstance(x, list | Mapping)


def _numbers(where: str, x: Any, count: int) -> list[float]:
    several = [float(one) for one in _listed(x)]
    if len(several) != count:
        raise UserError(f"{where} must have one number per response, {count}, got {len(several)}")
    if not all(map(math.isfinite, several)):
        raise UserError(f"{where} must be finite, got {next(one for one in several if not math.isfinite(one))}")
    return several


def _prompt(where: str, row: Mapping[str, Any], column: str) -> str:
    x = row.get(column)
    if isinstance(x, np.ndarray):
        x = x.tolist()
    if isinstance(x, str) and row.get("is_conversation") in (True, "True", "true"):
        return Conversation.parse(x)
    return as_prompt(x, where)


def _texts(where: str, x: Any) -> list[str]:
    """The responses of a cell: a text, messages, an output of vLLM or OpenAI, or several of these."""
    if isinstance(x, np.ndarray):
        x = x.tolist()
    if isinstance(x, Mapping):
        inner = x.get("body", x)
        if isinstance(inner, Mapping) and isinstance(inner.get("choices"), list):
            return [text for one in inner["choices"] for text in _texts(where, one)]
        message = inner.get("message", inner) if isinstance(inner, Mapping) else inner
        text = message.get("text", message.get("content")) if isinstance(message, Mapping) else message
        if isinstance(text, str):
            return [text]
    if isinstance(x, str):
        return [x]
    if isinstance(x, list | tuple) and x:
        if all(isinstance(one, Mapping) and "role" in one for one in x):  # messages: the last is the response
            return _texts(where, x[-1])
        return [text for one in x for text in _texts(where, one)]
    raise UserError(f"{where} must be a text, messages or a list of them, got {x!r:.60}")
