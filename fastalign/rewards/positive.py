"""positive: sentiment of the response by VADER."""

from __future__ import annotations

from functools import cached_property

from fastalign.rewards.base import PerTextReward
from fastalign.rewards.packages import require


class Positive(PerTextReward):
    """VADER compound sentiment of the response, in [-1, 1]; 0 is neutral, and so is an empty response.

    Source: Hutto & Gilbert 2014, VADER: a parsimonious rule-based model for sentiment analysis of social media text.
    """

    def __init__(self, name: str = "positive", *, cache_size: int = 65536):
        super().__init__(name, cache_size=cache_size)

    @cached_property
    def _analyzer(self):
        return require("vaderSentiment.vaderSentiment", "vaderSentiment", self.name).SentimentIntensityAnalyzer()

    def value(self, response: str) -> float:
        return self._analyzer.polarity_scores(response)["compound"]
