"""Padded batches of token ids, longest first, and running a model on them without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastalign._base.errors import UserError

if TYPE_CHECKING:
    import torch


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, longest first, so that padding is small and running out of memory happens
    at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> torch.Tensor:
    """int64 (len(rows), longest row), padded with `value` on the right (or left); width at least 1."""
    import torch

    width = max(1, max(len(row) for row in rows))
    out = torch.full((len(rows), width), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        out[index, start : start + len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return out.to(device)


def log_likelihoods(
    model: Any, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices, (k,) float64): the log-probability in nats of each target, token ids, after its context, batch by
    batch; neither is empty."""
    import torch

    from fastalign.models.scoring import score

    rows = [[*context, *target] for context, target in zip(contexts, targets, strict=True)]
    for batch in length_batches([len(row) for row in rows], batch_size):
        ids = pad([rows[i] for i in batch], 0, model.device)
        labels = pad([[-100] * (len(contexts[i]) - 1) + list(targets[i]) for i in batch], -100, model.device)
        with evaluating(model):
            log_probs = score(model, ids, labels).outputs["log_probs"]
            counts = (labels != -100).sum(dim=1).tolist()
            totals = torch.stack([part.double().sum() for part in log_probs.split(counts)])
        yield batch, totals


def context_length(config: Any, tokenizer: Any) -> int | None:
    """The model's maximum number of tokens, from its tokenizer or its configuration; None if neither says."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    limits = [limit for limit in limits if limit and 0 < limit < 1_000_000_000]  # tokenizers write "none" as 1e30
    return min(limits, default=None)


def check_count(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{argument} must be an int >= 1, got {value!r}")
    return value


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inference mode with dropout off; restores the model's train/eval mode afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
