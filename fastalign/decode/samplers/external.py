"""What the samplers share whose model runs in another engine: vLLM, or a server (`samplers.vllm`, `.openai`).

They take what `Sampler.iter_batches` takes, under the same checks, and give the same Candidates; the random numbers
are the engine's own, so a seed gives the same result on the same engine only.
"""

from __future__ import annotations

import hashlib
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.data.text import Text
from fastalign.decode.candidates import Candidates
from fastalign.decode.samplers.base import BaseSampler, Request


class External(BaseSampler):
    """A sampler without a model of its own.

    name: told in errors and in the candidates' settings. tokenizer: of the model, or None. context: the longest
    text in tokens, or 0 where the engine alone knows it.
    """

    name: str
    tokenizer: Any
    context: int
    text: Text

    def __init__(self, name: str, tokenizer: Any, context: int):
        self.name, self.tokenizer, self.context, self.text = name, tokenizer, context, Text(tokenizer)

    @property
    def model(self) -> Any:
        raise UserError(f"{self.name} runs in another engine: this needs the model itself, loaded by Sampler")


def request_seed(seed: int, place: int, first: int) -> int:
    """The seed of the request for candidates `first` and on of the prompt at `place`, in [0, 2^31): llama.cpp takes
    32 bits.

    vLLM draws candidate j of a request with that request's seed + j: counted from one start per prompt, two
    requests for the same prompt never share a seed, and the candidates do not depend on how n was split.
    """
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") % 2**30) + first


def split(n: int, at_once: int) -> list[tuple[int, int]]:
    """(first candidate, count) of each request for n candidates, at_once at most."""
    return [(first, min(at_once, n - first)) for first in range(0, n, at_once)]


def asked(settings: SamplingSettings) -> int:
    """How many candidates to ask an engine for: one where all are the same (engines refuse n > 1 there)."""
    return settings.n if settings.temperature > 0 else 1


def one_prompt(request: Request, i: int, drawn: list[tuple[str, list[int], list[float]]]) -> Candidates:
    """The Candidates of the prompt at i from (text, token ids, log-probs) of each that was asked for."""
    drawn = drawn if len(drawn) == request.settings.n else drawn * request.settings.n
    texts, tokens, log_probs = ([list(column)] for column in zip(*drawn, strict=True))
    return request.part([i], texts, tokens, log_probs)
