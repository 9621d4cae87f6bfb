"""Stops a trainer at the first non-finite loss or gradient, before a weight changes."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from fastalign._base.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

SHOWN = 8  # rows listed in a message


class StopsAtNaN(_Trainer):
    """A mixin to place before a transformers Trainer among the bases; for batches of pairs as TRL collates them."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(value := loss.detach().item()):
            self._stop("loss", value, inputs)
        self._seen = [*getattr(self, "_seen", []), inputs["input_ids"]]
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once before each optimiser step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not_finite(norm, self.accelerator):
            self._stop("gradient's norm", float(norm), *({"input_ids": ids} for ids in self._seen))
        self._seen = []
        return norm

    def _stop(self, what: str, value: float, *batches: dict[str, Any]) -> None:
        rows = sorted({row for batch in batches for row in rows_of(self.train_dataset, batch["input_ids"])})
        stop(self, what, value, rows)


def stop(trainer: _Trainer, what: str, value: float, rows: list[int]) -> NoReturn:
    """Ends the training of a transformers Trainer."""
    folder = trainer.args.output_dir
    kept = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    raise UserError(stopped(trainer.state.global_step + 1, what, value, rows, kept))


def not_finite(norm: Tensor | float | None, accelerator: Any) -> bool:
    """Whether a gradient's norm is NaN or infinite and not handled: float16's gradient scaler skips such steps."""
    if norm is None or getattr(accelerator, "scaler", None) is not None:
        return False
    return not math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))


def stopped(step: int, what: str, value: float, rows: list[int], checkpoint: str | None) -> str:
    """The error message for it."""
    some = ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
    where = f" on rows {some}" if rows else ""
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was kept before"
    return f"step {step}: the {what} is {value}{where}; training stops before it changes a weight; {kept}"


def rows_of(dataset: Any, input_ids: Tensor) -> list[int]:
    """Which rows of a tokenized dataset the chosen halves of collated pairs (2B, T) come from, if that can be
    determined."""
    if not hasattr(dataset, "num_rows") or "chosen_ids" not in dataset.column_names:
        return []
    wanted = [row.tolist() for row in input_ids[: len(input_ids) // 2].cpu()]
    names = [name for name in ("prompt_ids", "chosen_ids") if name in dataset.column_names]
    rows = []
    for i, row in enumerate(dataset.select_columns(names)):
        ids = [token for name in names for token in row[name]]
        # Padded on either side, and truncated at either end if too long.
        if any(_within(ids[:k], one) or _within(ids[-k:], one) for one in wanted if (k := min(len(ids), len(one)))):
            rows.append(i)
    return rows


def _within(ids: list[int], padded: list[int]) -> bool:
    return padded[: len(ids)] == ids or padded[len(padded) - len(ids) :] == ids
