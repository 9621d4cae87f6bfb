"""Presets: the reward models of the literature, each read as its authors read it. This file is data; `published` makes
rewards of it.

A preset's name is a group and a column, as in "map/humor", so that it is never a registered reward's. Its score is
direction · (what the head gives for the text); higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "see the model's page"


@dataclass(frozen=True)
class Preset:
    """One reward of the literature.

    model: its name on the hub; for head "reward" a registered reward; for head "service" that of the service.
    head: "logit" (one output of a sequence classifier, as it is), "probability" (its sigmoid), "gated" (ArmoRM's
        mixture of attributes: "score", or one attribute), "mlp" (GRM's value head), "cosine" (of pooled embeddings of
        prompt and response), "reward" or "service" (a probability that a service on the web gives).
    output: the label or index of the output that is read.
    text: what the model reads: "response", "chat" (the tokenizer's template), "pair" (prompt and response as two
        segments), or the first of two segments, with {prompt} in it; the second is the response.
    direction: 1, or -1 where the model's own number is lower for better texts.
    source: who uses it so.
    """

    name: str
    model: str
    head: str
    output: str | int
    text: str
    what: str
    source: str
    licence: str = UNKNOWN
    direction: int = 1

    @property
    def column(self) -> str:
        """Its name among values."""
        return self.name.rpartition("/")[2]

    @property
    def downloaded(self) -> str | None:
        """The model that comes from the hub; None where there is none."""
        return None if self.head in ("reward", "service") else self.model


_MAP = "MAP, arXiv 2410.19198"
_HH = "\n\nHuman: {prompt} \n\nAssistant:"  # the dialogues of Anthropic's hh-rlhf
_TOXICITY = {  # the labels of unitary/toxic-bert, and what Detoxify calls them
    "toxic": "toxicity", "severe_toxic": "severe_toxicity", "obscene": "obscene", "threat": "threat",
    "insult": "insult", "identity_hate": "identity_attack",
}  # fmt: skip
_SKYWORK = {
    "qwen3-0.6b": "Qwen3-0.6B", "qwen3-1.7b": "Qwen3-1.7B", "qwen3-4b": "Qwen3-4B", "qwen3-8b": "Qwen3-8B",
    "llama-1b": "Llama-3.2-1B", "llama-3b": "Llama-3.2-3B", "llama-8b": "Llama-3.1-8B",
    "llama-8b-40m": "Llama-3.1-8B-40M",
}  # fmt: skip
ARMORM = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe",
    "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style",
    "code-explanation", "code-instruction-following", "code-readability",
)  # fmt: skip
PERSPECTIVE = ("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT")
_GRM = "GRM, arXiv 2406.10216"

_TABLE = [
    Preset("map/humor", "mohameddhiab/humor-no-humor", "logit", 1, "response", "humour", _MAP),
    Preset("map/positive", "lvwerra/distilbert-imdb", "logit", 1, "response", "sentiment of a review", _MAP),
    Preset("map/helpful", "Ray2333/gpt2-large-helpful-reward_model", "logit", 0, _HH, "helpfulness", _MAP),
    Preset("map/harmless", "Ray2333/gpt2-large-harmless-reward_model", "logit", 0, _HH, "harmlessness", _MAP),
    Preset("map/diversity", "diversity", "reward", 0, "response", "distinct 2-, 3- and 4-grams", _MAP, "Apache-2.0"),
    Preset("map/coherence", "princeton-nlp/sup-simcse-bert-base-uncased", "cosine", 0, "pair",
           "similarity of prompt and response", _MAP),
    *(Preset(f"toxic-bert/{label}", "unitary/toxic-bert", "probability", label, "response",
             f"probability of {label}", "Jigsaw's challenge of 2018", "Apache-2.0", -1) for label in _TOXICITY),
    *(Preset(f"detoxify/{name}", "unitary/toxic-bert", "probability", label, "response",
             f"probability of {name}", "Detoxify 'original'", "Apache-2.0", -1) for label, name in _TOXICITY.items()),
    *(Preset(f"perspective/{name.lower()}", "Perspective API", "service", name, "response",
             f"probability of {name.lower()}", "Perspective API, to end in 2026", "the service's terms", -1)
      for name in PERSPECTIVE),
    *(Preset(f"rm/skywork-v2-{short}", f"Skywork/Skywork-Reward-V2-{size}", "logit", 0, "chat", "overall preference",
             "Skywork-Reward-V2, arXiv 2507.01352", "Apache-2.0" if "qwen" in short else UNKNOWN)
      for short, size in _SKYWORK.items()),
    *(Preset(f"rm/{short}", f"Ray2333/{model}", "logit", 0, "chat", "overall preference", _GRM)
      for short, model in (("grm-llama3-8b", "GRM-Llama3-8B-rewardmodel-ft"),
                           ("grm-llama3.2-3b", "GRM-Llama3.2-3B-rewardmodel-ft"),
                           ("grm-gemma2-2b", "GRM-Gemma2-2B-rewardmodel-ft"))),
    *(Preset(f"rm/{short}-sftreg", f"Ray2333/{model}-sftreg", "mlp", 0, "chat", "overall preference", _GRM)
      for short, model in (("grm-llama3-8b", "GRM-llama3-8B"), ("grm-llama3.2-3b", "GRM-llama3.2-3B"),
                           ("grm-gemma2-2b", "GRM-Gemma2-2B"), ("grm-gemma-2b", "GRM-Gemma-2B"))),
    *(Preset(f"rm/{short}", f"nicolinho/{model}", "gated", "score", "chat", "overall preference",
             "QRM, arXiv 2409.10164")
      for short, model in (("qrm-llama3-8b", "QRM-Llama3-8B"), ("qrm-llama3.1-8b", "QRM-Llama3.1-8B"))),
    Preset("rm/armorm", "RLHFlow/ArmoRM-Llama3-8B-v0.1", "gated", "score", "chat", "overall preference",
           "ArmoRM, arXiv 2406.12845", "Llama 3"),
    *(Preset(f"armorm/{name}", "RLHFlow/ArmoRM-Llama3-8B-v0.1", "gated", i, "chat", name.replace("-", ", ", 1),
             "ArmoRM, arXiv 2406.12845", "Llama 3") for i, name in enumerate(ARMORM)),
]  # fmt: skip
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}
