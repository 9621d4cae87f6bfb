"""Rows of distillation: prompts with weighted candidates, checked, and as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.numbers import number
from fastalign.data.conversations import check_messages
from fastalign.train.encoding import continued, encode

COLUMNS = ("prompt", "prompt_ids", "completions", "completion_ids", "weights", "ref_logprobs")


@dataclass(frozen=True)
class Row:
    """A prompt and its candidates, as token ids.

    Without refs, candidates of weight 0 are left out, and equal ones are one.
    weights: they sum to 1. ess: the effective sample size 1 / Σ w² of the candidates as given. refs: the candidates'
    log-probabilities under the model that drew them.
    """

    prompt: list[int]
    completions: list[list[int]]
    weights: list[float]
    ess: float
    refs: list[float] | None = None


def weights_of(row: Mapping[str, Any], where: str) -> np.ndarray:
    """(N,) float64, the candidates' weights, which sum to 1; equal without a column weights.

    Checks all of the row that can be checked without a tokenizer. where: its name in errors, "train_dataset row 3".
    Raises UserError.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: must be an object with the columns {', '.join(COLUMNS)}, got {row!r:.60}")
    given = {name: row[name] for name in COLUMNS if row.get(name) is not None}  # data sets pad with None
    candidates = [name for name in ("completions", "completion_ids") if name in given]
    if len({"prompt", "prompt_ids"} & given.keys()) != 1 or len(candidates) != 1:
        have = ", ".join(given) or "none of them"
        raise UserError(f"{where}: must have a prompt or prompt_ids, and completions or completion_ids, got {have}")
    name = candidates[0]
    if "prompt_ids" in given:
        if name == "completions":
            raise UserError(f"{where}: prompt_ids need completion_ids, got completions")
        _check_ids(f"{where}: prompt_ids", given["prompt_ids"])
    elif not isinstance(given["prompt"], str):
        try:
            check_messages(given["prompt"])
        except UserError as error:
            raise UserError(f"{where}: prompt {error}") from None
    several = given[name]
    if isinstance(several, str) or not isinstance(several, Sequence | np.ndarray) or not len(several):
        raise UserError(f"{where}: {name} must be a list of at least one candidate, got {several!r:.60}")
    for j, one in enumerate(several):
        if name == "completion_ids":
            _check_ids(f"{where}: completion_ids[{j}]", one)
        elif not isinstance(one, str):
            raise UserError(f"{where}: completions[{j}] must be text, got {one!r:.60}")
    weights = given.get("weights", [1.0] * len(several))
    if isinstance(weights, str) or not hasattr(weights, "__len__") or len(weights) != len(several):
        came = len(weights) if hasattr(weights, "__len__") else repr(weights)
        raise UserError(f"{where}: weights must be one per candidate, {len(several)}, got {came}")
    checked = np.array([number(f"{where}: weights[{j}]", w, least=0.0) for j, w in enumerate(weights)])
    if not checked.any():
        raise UserError(f"{where}: weights must not all be 0")
    checked /= checked.max()  # whose sum is finite
    return checked / checked.sum()


def refs_of(row: Mapping[str, Any], weights: np.ndarray, where: str) -> list[float] | None:
    """The column ref_logprobs of a row whose `weights_of` are these. Raises UserError."""
    if (given := row.get("ref_logprobs")) is None:
        return None
    count = len(weights)
    if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != count:
        came = len(given) if hasattr(given, "__len__") else repr(given)
        raise UserError(f"{where}: ref_logprobs must be one per candidate, {count}, got {came}")
    if count < 2:
        raise UserError(f"{where}: ref_logprobs need at least two candidates to compare, got {count}")
    if not weights.all():
        j = int(np.argmin(weights))
        raise UserError(f"{where}: weights[{j}] must be above 0 beside ref_logprobs, got {row['weights'][j]}")
    return [number(f"{where}: ref_logprobs[{j}]", x) for j, x in enumerate(given)]


@dataclass
class Encoder:
    """Encodes a data set's rows.

    options: of the chat template. vocabulary: entries of the model's embedding; context: the longest text, in tokens.
    None and 0: not known.
    """

    tokenizer: Any
    options: dict[str, Any]
    vocabulary: int | None = None
    context: int = 0

    def __call__(self, row: Mapping[str, Any], where: str = "a row") -> Row:
        """Raises UserError, one line that begins with `where`."""
        weights = weights_of(row, where)
        prompt, completions = self._ids(row, where)
        ess, refs = float(1 / (weights**2).sum()), refs_of(row, weights, where)
        if refs is not None:
            for ids in completions:
                self._check(prompt, ids, where)
            return Row(prompt, completions, weights.tolist(), ess, refs)
        merged: dict[tuple[int, ...], float] = {}
        for ids, weight in zip(completions, weights.tolist(), strict=True):
            self._check(prompt, ids, where)
            if weight:
                merged[tuple(ids)] = merged.get(tuple(ids), 0.0) + weight
        return Row(prompt, list(map(list, merged)), list(merged.values()), ess)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        return [self(row) for row in rows]

    def check(self, name: str, dataset: Any) -> None:
        """Raises UserError, one line that names the row, unless the data set is of rows, at least one, that fit the
        model."""
        if isinstance(dataset, dict):
            for key, part in dataset.items():
                self.check(f"{name}[{key!r}]", part)
            return
        if dataset is None or isinstance(dataset, str) or not hasattr(dataset, "__len__") or not len(dataset):
            raise UserError(f"{name} must be a data set of known length, of at least one row, got {dataset!r:.60}")
        for i, row in enumerate(dataset):
            self(row, f"{name} row {i}")

    def _ids(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        prompt = row.get("prompt_ids")
        try:
            if row.get("completions") is not None:
                return continued(self.tokenizer, row["prompt"], row["completions"], self.options)
            prompt = encode(self.tokenizer, [row["prompt"]], self.options)[0] if prompt is None else prompt
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return list(map(int, prompt)), [list(map(int, ids)) for ids in row["completion_ids"]]

    def _check(self, prompt: list[int], completion: list[int], where: str) -> None:
        if not prompt or not completion:
            raise UserError(f"{where}: {'a completion' if prompt else 'prompt'} must have at least one token, got none")
        if self.context and len(prompt) + len(completion) > self.context:
            came = f"{len(prompt)} + {len(completion)}"
            raise UserError(f"{where}: prompt and completion must fit the model's {self.context} tokens, got {came}")
        largest = max(*prompt, *completion)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise UserError(f"{where}: token ids must be below {self.vocabulary:,}, the vocabulary, got {largest}")


def _check_ids(name: str, ids: Any) -> None:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise UserError(f"{name} must be a list of token ids, got {ids!r:.60}")
    array = np.asarray(ids)
    if not array.size:
        raise UserError(f"{name} must have at least one token, got none")
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise UserError(f"{name} must be a list of token ids, integers of at least 0, got {ids!r:.60}")
