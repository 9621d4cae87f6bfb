"""How far texts are from the base model: their log-probabilities under a model, KL and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign._base.error_bars import standard_error
from fastalign.decode.candidates import Candidates

BATCH_SIZE = 16


def log_likelihoods(model: Any, prompts: Sequence[Sequence[int]], token_ids: Sequence[Sequence[Sequence[int]]]) -> Any:
    """(P, k) float64: the log-probability in nats of each text given its prompt; all by token ids."""
    import torch

    from fastalign.models.scoring import score
    from fastalign.rewards.encoding import evaluating, length_batches, pad

    rows = [(list(prompt), list(text)) for prompt, texts in zip(prompts, token_ids, strict=True) for text in texts]
    totals = np.zeros(len(rows))
    for batch in length_batches([len(prompt) + len(text) for prompt, text in rows], BATCH_SIZE):
        ids = pad([[*rows[i][0], *rows[i][1]] for i in batch], 0, model.device)
        labels = pad([[-100] * (len(rows[i][0]) - 1) + rows[i][1] for i in batch], -100, model.device)
        with evaluating(model):
            log_probs = score(model, ids, labels).outputs["log_probs"]
        counts = (labels != -100).sum(dim=1).tolist()
        totals[batch] = torch.stack([part.double().sum() for part in log_probs.split(counts)]).cpu().numpy()
    return totals.reshape(len(prompts), -1)


def drawn(candidates: Candidates) -> np.ndarray:
    """(P, k) float64: the log-probability of each text under the model that drew it, as the sampler recorded it."""
    return np.array([[sum(text) for text in row] for row in candidates.logprobs], dtype=np.float64)


def of_weights(log_weights: np.ndarray) -> tuple[float, float | None]:
    """KL of drawing one of N candidates with these log weights (P, N) from drawing one uniformly, in nats: the mean
    over prompts, and its standard error."""
    scores = log_weights - log_weights.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    return mean_and_error(np.where(p > 0, p * (log_p + math.log(scores.shape[1])), 0.0).sum(axis=1))


def mean_and_error(per_prompt: np.ndarray) -> tuple[float, float | None]:
    error = float(standard_error(per_prompt))
    return float(per_prompt.mean()), error if math.isfinite(error) else None


def perplexity(log_likelihood: float, tokens: int) -> float | None:
    return math.exp(min(-log_likelihood / tokens, 700.0)) if tokens else None


def count(candidates: Candidates) -> int:
    return sum(len(ids) for row in candidates.token_ids for ids in row)
