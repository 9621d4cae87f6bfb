"""How far texts are from the base model: their log-probabilities under a model, KL and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign._base.error_bars import standard_error
from fastalign.decode.candidates import Candidates
from fastalign.rewards import encoding

BATCH_SIZE = 16


def log_likelihoods(model: Any, prompts: Sequence[list[int]], token_ids: Sequence[list[list[int]]]) -> np.ndarray:
    """(P, k) float64: the log-probability in nats of each text given its prompt; all by token ids."""
    contexts = [prompt for prompt, texts in zip(prompts, token_ids, strict=True) for _ in texts]
    texts = [text for row in token_ids for text in row]
    result = np.zeros(len(texts))
    for batch, totals in encoding.log_likelihoods(model, contexts, texts, BATCH_SIZE):
        result[batch] = totals.cpu().numpy()
    return result.reshape(len(prompts), -1)


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
