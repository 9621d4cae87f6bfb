"""Checks of a trainer's inputs before anything slow starts: one line that says what is wrong, and where."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fastalign._base import numbers
from fastalign._base.errors import UserError
from fastalign.data.conversations import text_of
from fastalign.data.dialogues import with_prompt
from fastalign.data.preferences import NUMBERS


def pairs(name: str, dataset: Any, *, tokenized: Sequence[str] = ()) -> Any:
    """A preference dataset, with its rows checked if possible: chosen and rejected present and not empty, numbers
    finite.

    Completions of messages that begin with a text prompt are cut after it (`data.dialogues.with_prompt`). tokenized:
    columns that indicate already tokenized text. Iterable datasets are left to the trainer. Raises UserError.
    """
    if isinstance(dataset, dict):
        return {key: pairs(f"{name}[{key!r}]", part, tokenized=tokenized) for key, part in dataset.items()}
    columns = getattr(dataset, "column_names", None)
    if not columns:
        return dataset
    known = hasattr(dataset, "num_rows")
    if known:
        for column, rules in NUMBERS.items():
            if column in columns:
                numbers.column(name, column, dataset[column], **rules)
    if set(tokenized) & set(columns):
        return dataset
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise UserError(
            f"{name} must have the columns prompt, chosen and rejected, lacks {', '.join(missing)}: {columns}"
        )
    if "prompt" in columns and _begins_with_prompt(dataset):
        dataset = _with_prompts(name, dataset)
    if not known:
        return dataset
    for column in ("chosen", "rejected"):
        for i, value in enumerate(dataset[column]):
            if _empty(value):
                raise UserError(f"{name} must have no empty completion, row {i} has one in {column}")
    return dataset


def _begins_with_prompt(dataset: Any) -> bool:
    first = next(iter(dataset), None)
    return first is not None and isinstance(first["prompt"], str) and isinstance(first["chosen"], list)


def _with_prompts(name: str, dataset: Any) -> Any:
    def cut(row: dict[str, Any], i: int) -> dict[str, Any]:
        try:
            pair = with_prompt(row)
        except UserError as error:
            raise UserError(f"{name} row {i}: {error}") from None
        if isinstance(pair["prompt"], str):
            raise UserError(
                f"{name} row {i}: chosen and rejected must begin with the prompt, or be text like the prompt"
            )
        return {column: pair[column] for column in ("prompt", "chosen", "rejected")}

    return dataset.map(cut, with_indices=True)


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not value or not (text_of(value[-1].get("content")).strip() or value[-1].get("tool_calls"))


def room(name: str, before: Any, after: Any, max_length: int | None) -> None:
    """TRL drops pairs whose prompt alone reaches `max_length`: warns if some are dropped, raises if all are."""
    if not (hasattr(before, "num_rows") and hasattr(after, "num_rows")) or before.num_rows == after.num_rows:
        return
    why = f"their prompt alone reaches max_length {max_length}, which leaves none for the completion"
    if after.num_rows == 0:
        raise UserError(f"{name} dataset has no pair left: {why}")
    warnings.warn(
        f"{before.num_rows - after.num_rows} of {before.num_rows} {name} pairs are dropped: {why}", stacklevel=2
    )


def one_tokenizer(processing_class: Any, tokenizer: Any) -> Any:
    """The trainer's tokenizer, given under TRL's name for it or under the older one; None: by neither."""
    if None not in (processing_class, tokenizer):
        raise UserError("tokenizer and processing_class are the same argument: give one")
    return processing_class if tokenizer is None else tokenizer


def vocabularies(model: Any, ref_model: Any, tokenizer: Any) -> None:
    """Checks that models and tokenizer match; those given by name are left to the trainer."""
    sizes = [
        None if m is None or isinstance(m, str) else m.get_input_embeddings().weight.shape[0]
        for m in (model, ref_model)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(f"ref_model must have the model's vocabulary, got {sizes[1]:,} and {sizes[0]:,} entries")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if sizes[0] is not None and hasattr(tokenizer, "__len__") and len(tokenizer) > sizes[0]:
        raise UserError(f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding only {sizes[0]:,}")
