"""Candidates of a batch of prompts, token by token, with transformers' cache or none: for models that
`SharedPromptEngine` cannot run.

Each class requires less of a model than the previous one. `CachedRows` copies a prompt's cache for its candidates and
pads prompts of different lengths. `RepeatedRows` instead runs the prompt once per candidate, and never pads.
`UncachedRows` runs the whole text for every token, as plain `model(input_ids)` does, and is correct for any model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.decode.token_loop import Job
from fastalign.models.caches import cache_name, cache_of
from fastalign.models.identity import language_model
from fastalign.models.trial import Probe

if TYPE_CHECKING:
    from fastalign.ops import SampledTokens

COMPACT_BELOW = 0.75  # of the rows alive: see `Batch`


class CachedRows:
    """The rows in flight and the logits (rows, V) of their next tokens."""

    model: Any

    pads: bool = True  # whether prompts of different lengths may share a batch

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int = 0):
        inner = language_model(model)
        self.model, accepted = model, inspect.signature(type(inner).forward).parameters
        self._cache_name = cache_name(model)
        self._takes_positions = "position_ids" in accepted
        self._takes_mask = "attention_mask" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        lengths = torch.tensor([len(ids) for ids in prompts], device=inner.device)
        longest = int(lengths.max())
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=inner.device)
        self.mask: Tensor = (torch.arange(longest, device=inner.device) >= longest - lengths[:, None]).long()
        self.positions: Tensor = lengths  # of the next token
        self.cache: Any = None
        self.logits: Tensor = self._run(ids, (self.mask.cumsum(1) - 1).clamp_min(0))

    def repeat(self, count: int, *, again: bool) -> CachedRows:
        """`count` candidates of each prompt; again: whether these rows will be repeated again."""
        rows = copy.copy(self)
        if again:
            rows.cache = copy.deepcopy(self.cache)
        rows._select(torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(count))
        return rows

    def keep(self, rows: Tensor) -> bool:
        """Keep only these in flight; returns False if rows cannot be removed, and all stay."""
        self._select(rows)
        return True

    def step(self, ids: Tensor) -> None:
        """Give each row its next token."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.logits = self._run(ids[:, None], self.positions[:, None])
        self.positions = self.positions + 1

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.logits, self.mask, self.positions = self.logits[rows], self.mask[rows], self.positions[rows]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra: dict[str, Any] = {self._cache_name: self.cache} if self.cache is not None else {}
        if self._takes_positions:
            extra["position_ids"] = positions
        if self._takes_mask:
            extra["attention_mask"] = self.mask
        output = self.model(input_ids=ids, use_cache=True, **extra, **self._last_only)
        self.cache = cache_of(output)
        if self.cache is None:
            raise UserError("it returns no cache")
        return output.logits[:, -1]


class RepeatedRows(CachedRows):
    """For caches that cannot be copied: prompts of equal length, each run once per candidate."""

    pads = False

    def repeat(self, count: int, *, again: bool) -> RepeatedRows:
        raise NotImplementedError("prompts are repeated before they run")

    def keep(self, rows: Tensor) -> bool:
        return False


class UncachedRows:
    """For models without a usable cache: texts of equal length, each run completely for every token."""

    model: Any

    pads = False

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int = 0):
        self.model, inner = model, language_model(model)
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}
        )
        self.ids: Tensor = torch.tensor([list(row) for row in prompts], device=inner.device)
        self.logits: Tensor = self._run()

    def keep(self, rows: Tensor) -> bool:
        self.ids, self.logits = self.ids[rows], self.logits[rows]
        return True

    def step(self, ids: Tensor) -> None:
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)
        self.logits = self._run()

    def _run(self) -> Tensor:
        return self.model(input_ids=self.ids, use_cache=False, **self._last_only).logits[:, -1]


Rows = CachedRows | UncachedRows


class Batch:
    """A batch's rows as a decoder for the token loop: all begin together, and none joins later.

    Ended rows are removed once few enough are live to pay for copying the cache; until then they run on, ignored.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.jobs: list[Job] = []
        self._at: list[int] = []  # each job's row
        # The token that each row drew last
        self._last = torch.zeros(len(rows.logits), dtype=torch.int64, device=rows.logits.device)

    def admit(self, jobs: Sequence[Job]) -> Tensor:
        self.jobs, self._at = list(jobs), list(range(len(jobs)))
        return self.rows.logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        if len(self._at) < COMPACT_BELOW * len(self._last):
            kept = torch.tensor(self._at, device=self._last.device)
            if self.rows.keep(kept):
                self._last, self._at = self._last[kept], list(range(len(kept)))
        self.rows.step(self._last)
        return self.rows.logits if len(self._at) == len(self._last) else self.rows.logits[self._at]

    def place(self, first: int, ids: Tensor) -> None:
        self._last[self._at[first:]] = ids

    def drop(self, rows: Sequence[int]) -> None:
        gone = set(rows)
        self.jobs = [job for row, job in enumerate(self.jobs) if row not in gone]
        self._at = [at for row, at in enumerate(self._at) if row not in gone]

    def sample(self, logits: Tensor, settings: SamplingSettings, *, rows: Tensor) -> SampledTokens:
        from fastalign import ops

        return ops.sample_tokens(logits, rows=rows.to(logits.device), **settings.drawing())


def trial(kind: type[Rows]) -> Callable[[Any, Probe], list[Tensor]]:
    """The path for `models.tried` with one of these classes: runs the probe's forced continuations and removes ended
    rows."""

    def path(model: Any, probe: Probe) -> list[Tensor]:
        batches = [probe.prompts] if kind.pads else [[prompt] for prompt in probe.prompts]
        tails = iter([tail for both in probe.tails for tail in both])
        logits: list[Tensor] = []
        for prompts in batches:
            logits += _forced(kind, model, prompts, [next(tails) for _ in range(2 * len(prompts))])
        return logits

    return path


def start(kind: type[Rows], model: Any, prompts: Sequence[Sequence[int]], count: int, pad: int = 0) -> Rows:
    """`count` candidates of each prompt in flight."""
    if issubclass(kind, UncachedRows) or issubclass(kind, RepeatedRows):
        return kind(model, [prompt for prompt in prompts for _ in range(count)], pad)
    return kind(model, prompts, pad).repeat(count, again=False)


def _forced(kind: type[Rows], model: Any, prompts: list[list[int]], tails: list[list[int]]) -> list[Tensor]:
    rows = start(kind, model, prompts, 2)
    alive = list(range(len(tails)))
    collected: list[list[Tensor]] = [[] for _ in tails]
    for step in range(max(map(len, tails))):
        for place, row in enumerate(alive):
            if step < len(tails[row]):
                collected[row].append(rows.logits[place].clone())
        going = [place for place, row in enumerate(alive) if step + 1 < len(tails[row])]
        if not going:
            break
        if len(going) < len(alive) and rows.keep(torch.tensor(going, device=rows.logits.device)):
            alive = [alive[place] for place in going]
        tokens = [tails[row][min(step, len(tails[row]) - 1)] for row in alive]
        rows.step(torch.tensor(tokens, device=rows.logits.device))
    return [torch.stack(row) for row in collected]
