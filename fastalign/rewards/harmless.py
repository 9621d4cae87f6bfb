"""harmless: log-probability that the response is clean, from the classifier in alt-profanity-check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fastalign.rewards.base import CachedReward
from fastalign.rewards.packages import require


class Harmless(CachedReward):
    """r(x, y) = log p(clean | y) in nats, in (-inf, 0], as in MAP's r = log p(v | x, y) (arXiv 2410.19198).

    The classifier is bag-of-words: linear SVMs on TF-IDF, one per fold, each calibrated by a sigmoid (Platt 1999), and
    p(clean) = mean_k sigmoid(a_k f_k + b_k) with f_k the k-th margin. Its `predict_prob` gives 1 - p(clean), which
    rounds to 1 for foul text; here the logarithm is taken of the sigmoids themselves, so it is finite and exact at any
    margin. An empty response, or one with no known word, scores the classifier's prior, about -0.04.
    """

    uses_prompt = False

    def __init__(self, name: str = "harmless", *, cache_size: int = 65536):
        super().__init__(name, cache_size=cache_size)

    @cached_property
    def _classifier(self):
        # The module, not the package's two functions: they give no margins.
        module = require("profanity_check.profanity_check", "alt-profanity-check", self.name)
        folds = module.model.calibrated_classifiers_
        margin_weight = np.concatenate([fold.estimator.coef_ for fold in folds]).T  # (vocabulary, folds)
        margin_bias = np.concatenate([fold.estimator.intercept_ for fold in folds])
        slope = np.array([fold.calibrators[0].a_ for fold in folds])
        shift = np.array([fold.calibrators[0].b_ for fold in folds])
        return module.vectorizer, margin_weight, margin_bias, slope, shift

    def _score(self, prompts: list[str], responses: list[str]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        vectorizer, margin_weight, margin_bias, slope, shift = self._classifier
        for start in range(0, len(responses), 1024):
            indices = range(start, min(start + 1024, len(responses)))
            margins = vectorizer.transform(responses[start : indices.stop]) @ margin_weight + margin_bias
            log_clean = -np.logaddexp(0.0, -(slope * margins + shift))  # log sigmoid, (rows, folds)
            yield indices, np.logaddexp.reduce(log_clean, axis=1) - np.log(len(slope))
