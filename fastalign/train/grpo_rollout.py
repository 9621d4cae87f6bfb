"""Rollouts of GRPO: completions drawn for groups of prompts, with what their loss needs."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign._base.errors import UserError
from fastalign.ops.checks import shown
from fastalign.train.grpo_options import sampling_settings
from fastalign.train.grpo_rewards import check_columns
from fastalign.train.parts import padded


@dataclass
class Rollout:
    """One completion, with what its loss needs; lists have one entry per completion token."""

    prompt: list[int]
    completion: list[int]
    counts: list[int]  # 0: not in the loss (an environment's token, or of a truncated completion)
    advantage: float = 0.0
    old: list[float] | None = None  # log-probabilities under the policy at the time of drawing
    ref: list[float] | None = None  # under the reference
    drawn: list[float] | None = None  # under the sampler, as it drew them
    weight: list[float] | None = None  # importance weights

    @property
    def tokens(self) -> int:
        """In the loss."""
        return sum(self.counts)


class Batch(NamedTuple):
    """Completions on this process: a generation, or a part of it; tokens: in the loss, of the whole generation on all
    processes."""

    rollouts: list[Rollout]
    tokens: int


class Drawn:
    """What the sampler or a `rollout_func` gave for a list of prompts."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    log_probs: list[list[float]] | None
    counts: list[list[int]]  # see Rollout
    extra: dict[str, Any]  # columns for the reward functions

    def __init__(self, prompt_ids, completion_ids, log_probs=None, counts=None, extra=None):
        self.prompt_ids, self.completion_ids, self.log_probs = prompt_ids, completion_ids, log_probs
        self.counts = [[1] * len(ids) for ids in completion_ids] if counts is None else counts
        self.extra = extra or {}


def draw(sampler: Any, prompt_ids: list[list[int]], args: Any, step: int, process: int) -> Drawn:
    """One completion per prompt; equal prompts that follow each other are a group, whose prompt is run once.

    step, process: with args.seed, they determine the random numbers.
    """
    groups = [list(group) for _, group in itertools.groupby(range(len(prompt_ids)), lambda i: prompt_ids[i])]
    completions: list[list[int]] = [[]] * len(prompt_ids)
    log_probs: list[list[float]] = [[]] * len(prompt_ids)
    for k, size in enumerate(sorted({len(group) for group in groups})):  # usually one
        alike = [group for group in groups if len(group) == size]
        seed = int(np.random.SeedSequence([args.seed, step, process, k]).generate_state(1, np.uint64)[0])
        ids, scores = sampler.draw([prompt_ids[group[0]] for group in alike], sampling_settings(args, size, seed))
        for group, group_ids, group_scores in zip(alike, ids, scores, strict=True):
            for i, one, its_scores in zip(group, group_ids, group_scores, strict=True):
                completions[i], log_probs[i] = one, its_scores
    return Drawn(prompt_ids, completions, log_probs)


def by_function(rollout_func: Any, prompts: list, trainer: Any, vocabulary: int) -> Drawn:
    """The result of a user's `rollout_func`, checked; as TRL has it, with "env_mask" for tokens of an environment."""
    output = rollout_func(prompts, trainer)
    names = ("prompt_ids", "completion_ids", "logprobs")
    if not isinstance(output, Mapping):
        raise UserError(f"rollout_func must return a dictionary of {', '.join(names)}, got {shown(output)}")
    output = dict(output)
    if missing := [name for name in names if name not in output]:
        raise UserError(f"rollout_func must return {', '.join(names)}, lacks {', '.join(missing)}")
    lists = {name: output.pop(name) for name in names}
    lists["env_mask"] = output.pop("env_mask", None)
    check_columns("rollout_func's result", output)
    for name, rows in lists.items():
        if rows is not None and len(rows) != len(prompts):
            rule = f"rollout_func must return one {name} entry per prompt given, {len(prompts)}"
            raise UserError(f"{rule}, got {len(rows)}")
    prompt_ids, completion_ids = (_ids(name, lists[name], vocabulary) for name in ("prompt_ids", "completion_ids"))
    for name in ("logprobs", "env_mask"):
        for i, row in enumerate(lists[name] or ()):
            if len(row) != len(completion_ids[i]):
                rule = f"rollout_func must return a {name} entry per completion token"
                raise UserError(f"{rule}, {len(completion_ids[i])} for completion {i}, got {len(row)}")
    return Drawn(prompt_ids, completion_ids, lists["logprobs"], lists["env_mask"], output)


def _ids(name: str, rows: Any, vocabulary: int) -> list[list[int]]:
    result = []
    for i, row in enumerate(rows or ()):
        try:
            ids = [operator.index(token) for token in row]
        except TypeError:
            raise UserError(f"rollout_func must return lists of token ids, got {shown(row)} in {name}[{i}]") from None
        if not ids:
            raise UserError("rollout_func must return prompts and completions of at least one token")
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            rule = f"rollout_func must return ids of the model's vocabulary, 0 to {vocabulary - 1}"
            raise UserError(f"{rule}, got {wrong[0]} in {name}[{i}]")
        result.append(ids)
    return result


def importance_weights(rollouts: Sequence[Rollout], args: Any) -> None:
    """Each token's (or sequence's) probability under the policy over that under the sampler, cut or masked as TRL does
    for vLLM; an unknown probability counts as equal."""
    low = -math.inf if args.vllm_importance_sampling_clip_min is None else args.vllm_importance_sampling_clip_min
    high = math.inf if args.vllm_importance_sampling_clip_max is None else args.vllm_importance_sampling_clip_max
    level, _, way = args.vllm_importance_sampling_mode.partition("_")
    for one in rollouts:
        if one.old is None or one.drawn is None:
            raise UserError(
                "importance_correction needs the sampler's log-probabilities: rollout_func gave no logprobs"
            )
        apart = torch.tensor(one.old, dtype=torch.float64) - torch.tensor(one.drawn, dtype=torch.float64)
        apart = apart.nan_to_num(nan=0.0) * torch.tensor(one.counts)
        ratio = (apart.sum().expand_as(apart) if level == "sequence" else apart).exp()
        inside = (ratio >= low) & (ratio <= high)
        one.weight = (ratio.clamp(low, high) if way == "truncate" else ratio * inside).tolist()


def on_policy(log_probs: Tensor, before: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """(R,) bool: rows whose mean log-ratio to the policy that drew them is at most the threshold (arXiv 2512.02556)."""
    apart = ((before - log_probs).nan_to_num(nan=0.0) * mask).sum(1) / mask.sum(1).clamp(min=1)
    return apart <= threshold


def beside(rollouts: Sequence[Rollout], name: str, device: torch.device) -> Tensor | None:
    """A field of the rollouts as (R, T - 1), where position t belongs to token t + 1; None where they have none."""
    lists = [getattr(rollout, name) for rollout in rollouts]
    if any(one is None for one in lists):
        return None
    rows = [[0.0] * (len(rollout.prompt) - 1) + one for rollout, one in zip(rollouts, lists, strict=True)]
    return padded(rows, 0.0, torch.float32).to(device, non_blocking=True)


def lists_of(scored: Tensor, rollouts: Sequence[Rollout]) -> Iterator[list[float]]:
    """The reverse of `beside`."""
    for row, rollout in zip(scored.float().tolist(), rollouts, strict=True):
        first = len(rollout.prompt) - 1
        yield row[first : first + len(rollout.completion)]
