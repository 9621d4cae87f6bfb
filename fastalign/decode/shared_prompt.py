"""Decoding many candidates of a prompt whose keys and values are stored once.

Attention over the prompt is one matrix product for all of its candidates; each candidate's own tokens are attended
separately, and the two parts are merged by their log-sum-exp. As soon as a candidate ends, the next one takes its slot,
from the same prompt or another, so that every row of every product is live.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import backend
from fastalign._base.errors import UserError
from fastalign.backend import threads
from fastalign.data.sampling import SamplingSettings
from fastalign.decode.joined_prompts import Joined
from fastalign.decode.plan import planned
from fastalign.decode.stacked_attention import Rows, Stack, attend
from fastalign.decode.step_layers import DTYPES, StepLayers
from fastalign.decode.token_loop import Job, TokenLoop
from fastalign.models.compiled_layers import CompiledLayers
from fastalign.models.head import Head, head_of
from fastalign.models.identity import Verdict, language_model, passable
from fastalign.models.linear_layers import SpedUp
from fastalign.models.merged_lora import MergedLora
from fastalign.models.trial import Probe, tried
from fastalign.ops import layer_passes
from fastalign.ops.buffers import Buffer, buffer, rows
from fastalign.ops.shared_attention import Layout, shared_attention, takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastalign.ops import SampledTokens

GROW = 32  # tokens by which the room for own keys and values grows
PREFILL = 1024  # tokens of several prompts that run together


@dataclass
class Prefix:
    """A prompt's keys and values, per layer (kv heads, P, d), and its last hidden state (H,)."""

    length: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    buffers: dict[int, tuple[Buffer, Buffer]] = field(default_factory=dict)  # of both, for the native attention
    hidden: Tensor = field(init=False)  # once it has run

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep a copy of a layer's keys and values, keys transposed unless a kernel of ours reads them: so products
        with few queries read them best."""
        chosen = backend.choose(keys.device)
        self.values[layer] = values.contiguous()
        if chosen == "triton":
            self.keys[layer] = keys.contiguous()
            return
        transposed = keys.transpose(1, 2).contiguous()
        self.keys[layer] = transposed.transpose(1, 2)
        if chosen == "cpu":
            self.buffers[layer] = buffer(transposed), buffer(self.values[layer])


def supports(model: PreTrainedModel) -> Verdict:
    """Whether `SharedPromptEngine` gives the model's own logits, tested by trial: see `fastalign.models`."""
    wrapped = passable(model)
    return tried(model, "shared-prompt engine", _forced, attends=True) if wrapped else wrapped


class SharedPromptEngine:
    """The rows in flight and their keys and values. Not thread-safe; one job at a time on a model.

    rows: maximum number of candidates in flight; prompts: of prompts, None for any number. Memory beyond the model:
    `row_bytes` for the new tokens of each candidate in flight, and once for each of their prompts; a copy of the linear
    layers' weights on processors where packed ones are faster, and another with a LoRA's adapters merged, each only if
    it takes at most a quarter of the available memory, and both at most `spare` bytes. room: new tokens of a candidate
    that a GPU has place for from the start, where it would else copy all to grow.

    Lengths, positions and the tokens drawn last stay on the model's device: a step waits for nothing there.
    """

    model: PreTrainedModel
    prompts: int

    rows: int

    def __init__(
        self, model: PreTrainedModel, rows: int, prompts: int | None = None, spare: int | None = None, room: int = 0
    ):
        self.model, self.rows, self.prompts = language_model(model), rows, prompts or rows
        self._merged = MergedLora(self.model, spare)
        self._spare = None if spare is None else spare - self._merged.nbytes
        self.room = room
        self.head: Head = head_of(self.model)
        self.prefixes: dict[int, Prefix] = {}
        self.jobs: list[Job] = []  # of the rows in flight, which are the first len(jobs) of every cache
        # Own tokens whose keys are in the cache, and the token drawn last, whose keys are not.
        self.lengths, self.last = torch.zeros(2, rows, dtype=torch.int64, device=self.device).unbind(0)
        self._clock, self._births = 0, list[int]()  # steps so far, and before each row in flight began
        self._starts: Tensor | None = None  # of the rows in flight, the lengths of their prompts
        self._layers: StepLayers | None = None  # from the first step on
        self.keys: dict[int, Tensor] = {}  # layer -> (rows, kv heads, room, d)
        self.values: dict[int, Tensor] = {}
        self.joined: Joined | None = None  # the prompts, for the Triton kernels
        self.layout: Layout | None = None  # of the rows in flight, for them
        self.stack: Stack | None = None  # the prompts, where neither they nor the native attention run

    @staticmethod
    def row_bytes(model: PreTrainedModel, tokens: int) -> int:
        """Bytes of the keys and values of that many tokens."""
        config = model.config.get_text_config()
        queries = getattr(config, "num_attention_heads", None) or 1
        heads = getattr(config, "num_key_value_heads", None) or queries
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        return 2 * config.num_hidden_layers * heads * size * tokens * model.dtype.itemsize

    @torch.inference_mode()
    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Run prompts, given as token ids, and keep their keys and values. Several run as one text, without padding."""
        for part in _parts(prompts):
            prefixes = {prompt: Prefix(len(ids)) for prompt, ids in part.items()}
            plan = _Prefill(list(prefixes.values()))
            ids = torch.tensor([list(itertools.chain.from_iterable(part.values()))])
            hidden = self._run(ids, torch.cat([torch.arange(length) for length in plan.lengths])[None], plan)
            for prefix, states in zip(prefixes.values(), hidden[0].split(plan.lengths), strict=True):
                prefix.hidden = states[-1].clone()
            self.prefixes |= prefixes
        self.joined = self.layout = self.stack = None

    def forget(self, prompt: int) -> None:
        del self.prefixes[prompt]
        if not self.prefixes:
            self.joined = self.layout = self.stack = None

    @property
    def free(self) -> int:
        return self.rows - len(self.jobs)

    @torch.inference_mode()
    def admit(self, jobs: Sequence[Job]) -> Tensor:
        """Put new candidates of prefilled prompts in flight; returns the hidden states (jobs, H) for their first
        token."""
        first = len(self.jobs)
        self._births += [self._clock] * len(jobs)
        self._seat([*self.jobs, *jobs])
        self.lengths[first : len(self.jobs)] = 0
        return torch.stack([self.prefixes[job.prompt].hidden for job in jobs])

    def place(self, first: int, ids: Tensor) -> None:
        """Set the tokens drawn by the rows from `first` on."""
        self.last[first : first + len(ids)] = ids

    def _seat(self, jobs: list[Job]) -> None:
        self.jobs, self._starts, self.layout = jobs, None, None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run the last token of every row in flight; returns the hidden states (rows in flight, H) for the next."""
        count = len(self.jobs)
        if self._starts is None:
            self._starts = torch.tensor([self.prefixes[job.prompt].length for job in self.jobs]).to(self.device)
        lengths = self.lengths[:count]
        positions, longest = self._starts + lengths, self._clock - min(self._births) + 1
        step = _Step(self, count, longest, lengths, positions)
        if self._layers is None and backend.choose(self.device) != "reference":
            with self._merged:
                self._layers = StepLayers(self.model, self.head.weight, self.rows, self._spare)
        hidden = self._run(self.last[:count, None], positions[:, None], step, self._layers)
        lengths += 1
        self._clock += 1
        return hidden[:, 0]

    def drop(self, rows: Sequence[int]) -> None:
        """Remove these rows from flight; the last rows take their slots."""
        gone = set(rows)
        if not gone:
            return
        keep = len(self.jobs) - len(gone)
        movers = [row for row in range(keep, len(self.jobs)) if row not in gone]
        rest = [movers.pop(0) if row in gone else row for row in range(keep)]
        self.rearrange(rest, [self.jobs[row] for row in rest])

    @torch.inference_mode()
    def rearrange(self, rows: Sequence[int], jobs: Sequence[Job]) -> None:
        """Replace the rows in flight by copies of these rows, named `jobs`; a row may be taken more than once, or not
        at all."""
        moved = [(to, of) for to, of in enumerate(rows) if to != of]
        if moved:
            to, of = torch.tensor(moved).to(self.device).unbind(1)
            for of_rows in (self.lengths, self.last, *self.keys.values(), *self.values.values()):
                of_rows.index_copy_(0, to, of_rows.index_select(0, of))
        self._births = [self._births[row] for row in rows]
        self._seat(list(jobs))

    def shrink(self) -> None:
        """Release the memory of unused slots; `rows` becomes the number in flight."""
        self.rows = len(self.jobs)
        self.lengths, self.last = self.lengths[: self.rows], self.last[: self.rows]
        for caches in (self.keys, self.values):
            for layer, cache in caches.items():
                caches[layer] = cache[: self.rows].clone()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _run(self, ids: Tensor, positions: Tensor, plan: Any, layers: StepLayers | None = None) -> Tensor:
        """The last hidden states, with attention computed by `plan`."""
        with contextlib.ExitStack() as block:
            if layers is None or not layers.whole:
                block.enter_context(planned(self.model))
                if self.device.type == "cpu":
                    block.enter_context(CompiledLayers.of(self.model))  # of its layers before any are merged
                    block.enter_context(SpedUp(self._merged.linears))
            block.enter_context(self._merged)
            if layers is not None:
                block.enter_context(layers)
            output = self.model.base_model(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=False,
                plan=plan,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),  # passed on, not read
            ).last_hidden_state
        if not plan.calls:
            raise UserError(f"{type(self.model).__name__} keeps arguments from its attention")
        return output

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) from hidden states (rows, H)."""
        return self.head.logits(hidden, None if self._layers is None else self._layers.head)

    def sample(self, hidden: Tensor, settings: SamplingSettings, *, rows: Tensor) -> SampledTokens:
        """`ops.sample_tokens` of the logits of hidden states (rows, H); on a GPU without truncation, the logits are
        never held."""
        from fastalign import ops

        rows = rows.to(hidden.device)
        # On a CPU the fused op's second read of the head's weight costs more than the logits do.
        if backend.choose(hidden.device) == "triton" and not settings.truncates:
            return ops.linear_sample_tokens(
                hidden, **self.head.arguments(), rows=rows, temperature=settings.temperature, seed=settings.seed
            )
        return ops.sample_tokens(self.logits(hidden), rows=rows, **settings.drawing())


class _Prefill:
    """Plain causal attention, within each prompt, that stores its keys and values."""

    def __init__(self, prefixes: list[Prefix]):
        self.prefixes, self.calls = prefixes, 0
        self.lengths = [prefix.length for prefix in prefixes]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        """(1, heads, tokens, d) from q of that shape and k, v (1, kv heads, tokens, d)."""
        self.calls += 1
        prompts = zip(self.prefixes, *(x.split(self.lengths, 2) for x in (q, k, v)), strict=True)
        parts = [self._within(prefix, layer, *qkv, *settings).transpose(1, 2) for prefix, *qkv in prompts]
        return torch.cat(parts, 1).transpose(1, 2)  # token by token in memory: some models view it so

    def _within(
        self, prefix: Prefix, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap
    ) -> Tensor:
        prefix.store(layer, k[0], v[0])
        length = q.shape[2]
        mask = None
        if (window is not None and length > window) or softcap is not None:
            apart = torch.arange(length, device=q.device)
            apart = apart[:, None] - apart[None, :]
            mask = (apart >= 0) if window is None else (apart >= 0) & (apart < window)
        if softcap is None:
            options: dict[str, Any] = {
                "attn_mask": mask,
                "is_causal": mask is None,
                "enable_gqa": q.shape[1] != k.shape[1],
            }
            return F.scaled_dot_product_attention(q, k, v, scale=scaling, **options)
        grouped = q.unflatten(1, (k.shape[1], -1))
        out, _ = _part(grouped, k[:, :, None], v[:, :, None], scaling, softcap, mask)
        return out.flatten(1, 2)


class _Step:
    """One new token of each row: its prompt's part once per prompt, its own part row by row."""

    def __init__(self, engine: SharedPromptEngine, count: int, longest: int, lengths: Tensor, positions: Tensor):
        self.engine, self.count, self.longest, self.calls = engine, count, longest, 0
        self.lengths, self.positions = lengths, positions
        chosen = backend.choose(lengths.device)
        self.native, self.launched = chosen == "cpu", chosen == "triton"

    @cached_property
    def groups(self) -> list[tuple[Prefix, Tensor]]:
        """Each prompt with its rows."""
        by_prompt: dict[int, list[int]] = {}
        for row, job in enumerate(self.engine.jobs):
            by_prompt.setdefault(job.prompt, []).append(row)
        return [(self.engine.prefixes[prompt], torch.tensor(rows)) for prompt, rows in by_prompt.items()]

    @cached_property
    def order(self) -> Tensor:
        """The rows, prompt by prompt."""
        return torch.cat([rows for _, rows in self.groups])

    @cached_property
    def rows(self) -> Tensor:
        return torch.arange(self.count, device=self.lengths.device)

    @cached_property
    def joined(self) -> Joined:
        """The engine's, made anew once prompts have come."""
        engine = self.engine
        if engine.joined is None:
            engine.joined = Joined(engine.prefixes)
        return engine.joined

    @cached_property
    def layout(self) -> Layout:
        """The engine's, made anew once prompts or rows have come or gone."""
        engine, joined = self.engine, self.joined
        if engine.layout is None:
            prompts = [joined.index[job.prompt] for job in engine.jobs]
            engine.layout = Layout.of(prompts, joined.lengths, self.lengths.device)
        return engine.layout

    @cached_property
    def stack(self) -> Stack:
        """As `joined`."""
        engine = self.engine
        if engine.stack is None:
            engine.stack = Stack(engine.prefixes)
        return engine.stack

    @cached_property
    def grouped(self) -> Rows:
        prompts = [self.stack.index[job.prompt] for job in self.engine.jobs]
        return Rows(prompts, self.positions - self.lengths, self.lengths, self.longest, self.stack)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        turn: layer_passes.Turn | None = None,
    ) -> Tensor:
        """(rows, heads, 1, d) from q of that shape and the new k, v (rows, kv heads, 1, d). turn: what is first done to
        q and k, on a GPU alone."""
        self.calls += 1
        keys, values = self._room(layer, k, v)
        if self.native and q.dtype in DTYPES:
            return self._attend_natively(layer, q, k, v, keys, values, scaling, window, softcap)
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        if turn is None:
            keys[self.rows, :, self.lengths], values[self.rows, :, self.lengths] = k, v
        else:
            q = layer_passes.rotate(q, k, v, turn, keys, values, self.lengths)
        if self.launched and takes(q, v):
            shared, own = self.joined.layer(layer), (keys, values)
            result = shared_attention(q, shared, own, self.lengths, self.layout, scaling, window, softcap)
        else:
            own = keys[: self.count, :, : self.longest], values[: self.count, :, : self.longest]
            result = attend(q, self.stack.layer(layer), own, self.grouped, scaling, window, softcap)
        return result.unsqueeze(2)

    def _attend_natively(
        self, layer: int, q, k, v, keys: Tensor, values: Tensor, scaling: float, window: int | None, softcap
    ) -> Tensor:
        """The same in one call."""
        heads, kv = q.shape[1], k.shape[1]
        out = q.new_empty(self.count, heads, v.shape[-1])
        (query, _q), (key, _k), (value, _v) = (rows(x[:, :, 0]) for x in (q, k, v))  # and what they point into
        prompts = [(*prefix.buffers[layer], prefix.length, len(of)) for prefix, of in self.groups]
        backend.native.shared_attention(
            buffer(out), buffer(keys), buffer(values), query, key, value, prompts, buffer(self.order),
            buffer(self.lengths), kv, heads // kv, keys.shape[2], window or 0, scaling, softcap or 0.0, threads(),
        )  # fmt: skip
        return out.unsqueeze(2)

    def _room(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        engine = self.engine
        if layer not in engine.keys or engine.keys[layer].shape[2] < self.longest:
            room = -(-max(self.longest, engine.room if self.launched else 0) // GROW) * GROW
            for caches, new in ((engine.keys, k), (engine.values, v)):
                grown = new.new_empty(engine.rows, new.shape[1], room, new.shape[3])
                grown.zero_()  # places after a row's tokens get weight 0, but must be finite
                if layer in caches:
                    grown[:, :, : caches[layer].shape[2]] = caches[layer]
                caches[layer] = grown
        return engine.keys[layer], engine.values[layer]


def _part(q, k, v, scaling: float, softcap: float | None, mask) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scaling) v and the log-sum-exp of the scores, float32; q (..., n, d), k and v (..., T, d)."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    # A part that sees nothing has weight 0 in the merge: its value is 0, not NaN.
    p = (scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp()
    return torch.matmul(p.to(v.dtype), v), lse


def _forced(model: PreTrainedModel, probe: Probe) -> list[Tensor]:
    """`SharedPromptEngine` in a trial: both prompts' continuations in flight together, token by token; ended ones are
    dropped."""
    tails = {Job(p, c): tail for p, both in enumerate(probe.tails) for c, tail in enumerate(both)}
    engine = SharedPromptEngine(model, len(tails))
    collected: dict[Job, list[Tensor]] = {job: [] for job in tails}
    engine.prefill(dict(enumerate(probe.prompts)))
    hidden = engine.admit(list(tails))
    for step in range(max(map(len, tails.values()))):
        for job, row in zip(engine.jobs, engine.head.logits(hidden), strict=True):
            collected[job].append(row)
        engine.place(0, torch.tensor([tails[job][step] for job in engine.jobs]))
        engine.drop([row for row, job in enumerate(engine.jobs) if step + 1 == len(tails[job])])
        if engine.jobs:
            hidden = engine.step()
    return [torch.stack(rows) for rows in collected.values()]


def _parts(prompts: Mapping[int, Sequence[int]]) -> Iterator[dict[int, Sequence[int]]]:
    """The prompts in parts of up to `PREFILL` tokens, or of one prompt."""
    part: dict[int, Sequence[int]] = {}
    for prompt, ids in prompts.items():
        if part and sum(map(len, part.values())) + len(ids) > PREFILL:
            yield part
            part = {}
        part[prompt] = ids
    if part:
        yield part


def draw(
    loop: TokenLoop, prompts: Mapping[int, Sequence[int]], jobs: Iterator[Job], counts: Mapping[int, int]
) -> Iterator[list[Job]]:
    """Draw every job to its end, with as many in flight as fit; after every step, yields the jobs that ended.

    prompts: token ids; counts: candidates per prompt, after which its keys and values are released.
    """
    engine, left = cast(SharedPromptEngine, loop.decoder), dict(counts)
    waiting = next(jobs, None)
    while waiting is not None or engine.jobs:
        new: list[Job] = []
        fresh: dict[int, Sequence[int]] = {}
        while waiting is not None and len(new) < engine.free:
            if waiting.prompt not in engine.prefixes and waiting.prompt not in fresh:
                if len(engine.prefixes) + len(fresh) >= engine.prompts:
                    break
                fresh[waiting.prompt] = prompts[waiting.prompt]
            new.append(waiting)
            waiting = next(jobs, None)
        engine.prefill(fresh)
        ended = loop.step(new)
        for job in ended:
            left[job.prompt] -= 1
            if left[job.prompt] == 0:
                engine.forget(job.prompt)
        yield ended
