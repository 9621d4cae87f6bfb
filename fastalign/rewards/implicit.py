"""The implicit reward of a model that was trained from another: β (log p(y|x) - log p0(y|x)), in nats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.rewards.base import CachedReward
from fastalign.rewards.log_likelihood import LogLikelihood


class Implicit(CachedReward):
    """DPO's reward β (log p(y|x) - log p0(y|x)) (arXiv 2305.18290, eq. 5), nats, summed over the response's tokens; it
    is known up to a term of the prompt alone.

    model, reference: the trained model and the one that it was trained from, as `LogLikelihood`'s model and read as it
    reads texts; each is loaded once, at first use. An empty response scores 0.
    """

    reads_messages = True

    def __init__(
        self,
        name: str = "implicit",
        *,
        model: Any = None,
        reference: Any = None,
        beta: float = 0.1,
        tokenizer: Any = None,
        batch_size: int = 16,
        max_length: int | None = None,
        cache_size: int = 65536,
    ):
        super().__init__(name, cache_size=cache_size)
        for argument, given in (("model", model), ("reference", reference)):
            if given is None:
                raise UserError(f"{argument} must name a model, as in implicit[model=./tuned,reference=./base]")
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise UserError(f"beta must be a number > 0, got {beta!r}")
        options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
        self.beta = float(beta)
        self._tuned, self._base = (LogLikelihood(name, model=one, **options) for one in (model, reference))

    def model_state(self) -> Any:
        return self._tuned.model_state(), self._base.model_state()

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        tuned, base = self._tuned.totals(prompts, responses), self._base.totals(prompts, responses)
        yield range(len(responses)), self.beta * (tuned - base)
