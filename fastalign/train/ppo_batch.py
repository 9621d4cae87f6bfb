"""The checked arguments of `PPOTrainer.step`, as one batch padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign._base.errors import UserError


@dataclass
class Rollouts:
    """Queries with their responses, B rows. Position t predicts token t + 1, so T tokens have T - 1 positions."""

    input_ids: Tensor  # (B, T) int64, padded on the right
    labels: Tensor  # (B, T - 1) int64: the next token where it is part of a response and counts, -100 elsewhere
    lengths: Tensor  # (B,) int64: tokens of query and response
    query_lengths: Tensor  # (B,) float32
    response_lengths: Tensor  # (B,) float32

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids and labels of some rows, truncated to the longest of them."""
        longest = int(self.lengths[indices].max())
        return self.input_ids[indices, :longest], self.labels[indices, : longest - 1]


def rollouts(
    queries: Any, responses: Any, masks: Any, batch_size: int, vocabulary: int, pad: int, device: torch.device
) -> Rollouts:
    """Check lists of token tensors and batch them. Raises UserError or TypeError, one line that names the entry."""
    queries, responses = (_tokens(n, x, vocabulary) for n, x in (("queries", queries), ("responses", responses)))
    lengths = {"queries": len(queries), "responses": len(responses)}
    if masks is not None:
        masks = _masks(masks, responses)
        lengths["response_masks"] = len(masks)
    check_lengths(batch_size, **lengths)
    whole = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
    input_ids = torch.full((batch_size, max(whole)), pad, dtype=torch.int64)
    labels = torch.full((batch_size, max(whole) - 1), -100, dtype=torch.int64)
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        input_ids[i, : whole[i]] = torch.cat((query, response))
        kept = response if masks is None else response.masked_fill(~masks[i], -100)
        labels[i, len(query) - 1 : whole[i] - 1] = kept
    sizes = [torch.tensor([len(x) for x in rows], dtype=torch.float32) for rows in (queries, responses)]
    return Rollouts(input_ids.to(device), labels.to(device), torch.tensor(whole), *sizes)


def check_lengths(batch_size: int, **lengths: int) -> None:
    for name, length in lengths.items():
        if length != batch_size:
            raise UserError(f"{name} must have as many entries as batch_size, {batch_size}, got {length}")


def scalars(scores: Any, batch_size: int, device: torch.device) -> Tensor:
    """Scores as (B,) float32 from a list of numbers and one-element tensors, or a tensor (B,)."""
    if (isinstance(scores, Tensor) and scores.ndim != 1) or not isinstance(scores, (Sequence, Tensor)):
        shape = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"scores must be a list of {batch_size} scalars, got {shape}")
    check_lengths(batch_size, scores=len(scores))
    numbers = []
    for i, score in enumerate(scores):
        if isinstance(score, Tensor) and score.numel() != 1:
            raise UserError(f"scores[{i}] must be a scalar, got a tensor of shape {tuple(score.shape)}")
        try:
            numbers.append(float(score))
        except (TypeError, ValueError):
            raise UserError(f"scores[{i}] must be a scalar, got {type(score).__name__}") from None
    scores = torch.tensor(numbers, dtype=torch.float32)
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise UserError(f"scores must be finite, got {numbers[i]} at scores[{i}]")
    return scores.to(device)


def _tokens(name: str, rows: Any, vocabulary: int) -> list[Tensor]:
    if not isinstance(rows, (list, tuple)):
        came = f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise UserError(f"{name} must be a list of tensors of token ids, got {came}")
    checked = []
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise UserError(f"{name}[{i}] must be a tensor of token ids, got {type(row).__name__}")
        row = row.detach().cpu()
        if row.ndim == 2 and len(row) == 1:
            row = row[0]
        if row.ndim != 1 or row.is_floating_point():
            raise UserError(f"{name}[{i}] must be a tensor (tokens,) of ids, got {tuple(row.shape)} {row.dtype}")
        if len(row) == 0:
            raise UserError(f"{name}[{i}] must hold at least one token, got none")
        if row.min() < 0 or row.max() >= vocabulary:
            bad = int(row[(row < 0) | (row >= vocabulary)][0])
            raise UserError(f"{name}[{i}] must hold token ids in [0, {vocabulary}), got {bad}")
        checked.append(row.long())
    return checked


def _masks(masks: Any, responses: list[Tensor]) -> list[Tensor]:
    if not isinstance(masks, (list, tuple)):
        raise UserError(f"response_masks must be a list of tensors, got {type(masks).__name__}")
    checked = []
    for i, (mask, response) in enumerate(zip(masks, responses, strict=False)):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if shape != tuple(response.shape):
            raise UserError(
                f"response_masks[{i}] must have the shape of responses[{i}], ({len(response)},), got {shape}"
            )
        if not (mask != 0).any():
            raise UserError(f"response_masks[{i}] must keep at least one token, got none")
        checked.append((mask != 0).cpu())
    return checked if len(masks) == len(responses) else list(masks)
