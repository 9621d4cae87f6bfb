"""Checks of what a user hands to a trainer, before anything long begins: one line that says what is wrong, and where."""

from __future__ import annotations

import warnings
from typing import Any

from fastalign.errors import UserError


def pairs(name: str, dataset: Any) -> None:
    """A map-style preference dataset has chosen and rejected, none empty. Others are left to the trainer."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            pairs(f"{name}[{key!r}]", part)
        return
    columns = getattr(dataset, "column_names", None)
    if not columns or "chosen_ids" in columns:
        return
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise UserError(
            f"{name} must have the columns prompt, chosen and rejected, lacks {', '.join(missing)}: {columns}"
        )
    if not hasattr(dataset, "num_rows"):
        return
    for column in ("chosen", "rejected"):
        for i, value in enumerate(dataset[column]):
            if _empty(value):
                raise UserError(f"{name} must have no empty completion, row {i} has one in {column}")


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not value or not str(value[-1].get("content") or "").strip()


def room(name: str, before: Any, after: Any, max_length: int | None) -> None:
    """TRL drops pairs whose prompt alone reaches `max_length`: said where it is some, refused where it is all."""
    if not (hasattr(before, "num_rows") and hasattr(after, "num_rows")) or before.num_rows == after.num_rows:
        return
    why = f"their prompt alone reaches max_length {max_length}, which leaves none for the completion"
    if after.num_rows == 0:
        raise UserError(f"{name} dataset has no pair left: {why}")
    warnings.warn(
        f"{before.num_rows - after.num_rows} of {before.num_rows} {name} pairs are dropped: {why}", stacklevel=2
    )


def vocabularies(model: Any, ref_model: Any, tokenizer: Any) -> None:
    """Models and tokenizer fit; those given by name are left to the trainer."""
    sizes = [
        None if m is None or isinstance(m, str) else m.get_input_embeddings().weight.shape[0]
        for m in (model, ref_model)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(f"ref_model must have the model's vocabulary, got {sizes[1]:,} and {sizes[0]:,} entries")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if sizes[0] is not None and hasattr(tokenizer, "__len__") and len(tokenizer) > sizes[0]:
        raise UserError(f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding only {sizes[0]:,}")
