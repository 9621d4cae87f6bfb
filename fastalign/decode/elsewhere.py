"""Candidates made elsewhere: prompts with responses, and perhaps scores, in files and tables of other programs.

One row per response, or one per prompt with lists of responses and scores. Parquet, Arrow, JSONL, JSON and CSV files;
tables of pandas, polars and datasets; the outputs of vLLM ("outputs" with "text") and of OpenAI's batches ("choices").
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastalign._base import outputs, tables
from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign.data import rows as sources
from fastalign.data.conversations import Conversation, as_prompt
from fastalign.data.rows import PROMPTS, RESPONSES
from fastalign.decode.candidates import Candidates

# Numbers that are no scores, of our own files and of others'.
_NO_VALUES = {
    "prompt_id", "candidate_id", "draw", "tokens", "logprob", "log_weight", "is_conversation", "id", "index", "idx",
    "seed", "row", "", "Unnamed: 0", "__index_level_0__",  # the last three: an index of pandas
    "token_ids", "logprobs", "prompt_token_ids", "num_cached_tokens", "finished",  # of vLLM
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
    found = from_rows(sources.stream(path, what="candidates"), columns, where=str(path))
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
    table = _again(rows, where)
    seen = _survey(table, where)
    have = list(seen)
    prompt = _column(where, have, columns.prompt, PROMPTS, "prompt", "prompts")
    others = [name for name in RESPONSES if name != prompt]
    response = _column(where, have, columns.response, others, "response", "responses")
    values = _values(where, seen, {prompt, response}, columns.values)
    texts: dict[str, list[str]] = {}
    scores: dict[str, dict[str, array[float]]] = {}
    for i, row in enumerate(table):
        asked = _prompt(f"{where}: row {i}: {prompt}", row, prompt)
        answers = _texts(f"{where}: row {i}: {response}", row.get(response))
        if (mine := scores.get(asked)) is None:
            mine = scores[asked] = {name: array("d") for name in values}
        for name in [*values]:
            try:
                mine[name].extend(_numbers(f"{where}: row {i}: {name}", row.get(name), len(answers)))
            except UserError as error:  # an embedding, a number of the prompt, NaN
                if columns.values is not None:
                    raise
                outputs.say(f"{error}: the column is not read as a value")
                values.remove(name)
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


def _again(rows: Any, where: str) -> Iterable[Any]:
    """The rows of a list or table, which can be looped over again."""
    if hasattr(rows, "to_dicts"):  # polars
        return rows.to_dicts()
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        return rows.to_dict("records")
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"{where} must be a list of objects or a table, got {type(rows).__name__}")
    return list(rows) if isinstance(rows, Iterator) else rows


class _Column:
    """What is known of a column's cells after the rows so far."""

    def __init__(self) -> None:
        self.rows = 0  # up to the last that has it
        self.numbers = True  # and nothing else
        self.some = False  # is any there
        self.hole: int | None = None  # the first row without a number

    def see(self, i: int, x: Any) -> None:
        if not self.numbers:
            return
        self.end(i)
        self.rows = i + 1
        for cell in _listed(x):
            if cell is None or cell == "":
                self.hole = i if self.hole is None else self.hole
            elif _is_number(cell):
                self.some = True
            else:
                self.numbers = False

    def end(self, rows: int) -> None:
        """No row has it between the last and this one."""
        if self.rows < rows and self.hole is None:
            self.hole = self.rows


def _survey(table: Iterable[Any], where: str) -> dict[str, _Column]:
    """The columns of a table, in the order in which they come."""
    seen: dict[str, _Column] = {}
    count = 0
    for i, row in enumerate(table):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: row {i} must be an object, got {type(row).__name__}")
        for name, x in row.items():
            (seen.get(name) or seen.setdefault(name, _Column())).see(i, x)
        count = i + 1
    if not count:
        raise UserError(f"{where}: contains no candidates")
    for column in seen.values():
        column.end(count)
    return seen


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


def _values(where: str, seen: Mapping[str, _Column], taken: set[str], given: Sequence[str] | None) -> list[str]:
    """The columns of scores. One that lacks some of its numbers is an error if it was asked for; else it is named."""
    own = {name: x for name, x in seen.items() if not (name in taken | _NO_VALUES or name.endswith("_id"))}
    numbers = [name for name, x in own.items() if x.numbers and x.some and x.hole is None]
    holes = {
        name.removeprefix(_REWARD): f"{where}: row {x.hole}: {name} has no number"
        for name, x in own.items()
        if x.numbers and x.some and x.hole is not None
    }
    if given is None:
        for hole in holes.values():
            outputs.say(f"{hole}: the column is not read as a value")
        return numbers
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
