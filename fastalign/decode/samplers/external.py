"""Base of the samplers for models in another engine: vLLM, or a server (`samplers.vllm`, `.openai`).

They accept the arguments of `Sampler.iter_batches`, with the same checks, and return the same Candidates. Random
numbers are the engine's own, so a seed reproduces only on the same engine.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.text import Text
from fastalign.decode.candidates import Candidates
from fastalign.decode.samplers.base import BaseSampler, Request

Answer = tuple[str, list[int], list[float]]  # text, token ids, log-probs of a candidate


class External(BaseSampler):
    """A sampler whose model runs elsewhere.

    name: for errors and for the candidates' settings. tokenizer: the model's, or None. context: the maximum length in
    tokens, or 0 if only the engine knows it.
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

    def draw_parts(self, request: Request) -> Iterator[tuple[list[int], Candidates]]:
        """Each prompt as soon as it is done, short ones first."""
        from fastalign._base import progress

        settings = request.settings
        # Of a greedy prompt all candidates are the same, and engines refuse n > 1.
        count = settings.n if settings.temperature > 0 else 1
        wanted = sorted(request.wanted, key=lambda i: len(request.encoded[i]))
        total = len(wanted) * settings.n * settings.max_new_tokens
        with progress.bar("sampling", total=total, unit="tok", show=request.show_progress) as advance:
            done = lambda candidates: advance(candidates * settings.max_new_tokens * settings.n // count)  # noqa: E731
            for i, drawn in self.answers(request, wanted, count, done):
                texts, tokens, log_probs = zip(*drawn * (settings.n // count), strict=True)
                yield [i], request.part([i], [list(texts)], [list(tokens)], [list(log_probs)])

    @abstractmethod
    def answers(
        self, request: Request, wanted: Sequence[int], count: int, done: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yield (prompt index, its `count` candidates) of the wanted prompts; done: called with each number drawn."""


def request_seed(seed: int, place: int, first: int) -> int:
    """The seed of the request for candidates from `first` on of the prompt at `place`, in [0, 2^31): llama.cpp takes 32
    bits.

    vLLM draws candidate j of a request with that request's seed + j: with one start per prompt, two requests for the
    same prompt never share a seed, and the candidates do not depend on how n is split.
    """
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") % 2**30) + first


def split(n: int, at_once: int) -> list[tuple[int, int]]:
    """(first candidate, count) of each request for n candidates, at_once at most."""
    return [(first, min(at_once, n - first)) for first in range(0, n, at_once)]
