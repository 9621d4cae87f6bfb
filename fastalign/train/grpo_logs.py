"""What GRPO logs, under TRL's names: means over all processes and over the steps since the last log."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastalign._base.files import atomic_write
from fastalign.losses.policy import PolicyLoss
from fastalign.train.grpo_options import CLIPPED
from fastalign.train.grpo_rollout import Rollout

EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}  # over the completions of a step


class Logs:
    """metrics: mode -> name -> the values since the last log."""

    metrics: dict[str, dict[str, list[float]]]

    def __init__(self, names: Sequence[str], weights: Tensor, completions: bool):
        """names, weights: of the rewards; completions: whether their table will be written."""
        self.names, self.weights, self.completions = names, weights, completions
        self.metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._marked: dict[str, int] = {}  # name -> values at `mark`
        self._terms: list[tuple[str, Tensor, float, float]] = []  # of the present step: name, value (), weight, count
        self._shares: dict[str, list[Tensor]] = {}  # name -> each completion's, of the present step
        self._reported: dict[str, list[float]] = defaultdict(list)
        self._extra: dict[str, list[Any]] = defaultdict(list)
        self._table: dict[str, list[Any]] = {}  # the latest completions
        self._began, self._tokens = time.perf_counter(), 0  # since the last log

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """For reward functions: a column of the completions' table."""
        if self.completions:
            self._extra[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """For reward functions: a number to log."""
        self._reported[name].append(float(value))

    def lengths(self, mode: str, lengths: list[tuple[int, int]], ended: list[bool], seen: float) -> float:
        """lengths: tokens of each prompt and completion. Returns the tokens seen in training, given those before."""
        rows = gather_object([(*pair, end) for pair, end in zip(lengths, ended, strict=True)])
        every, whole = [n for _, n, _ in rows], [n for _, n, end in rows if end] or [0]
        metrics = self.metrics[mode]
        if mode == "train":
            tokens = sum(prompt + n for prompt, n, _ in rows)
            seen, self._tokens = seen + tokens, self._tokens + tokens
        metrics["num_tokens"] = [float(seen)]
        for name, values in (("", every), ("_terminated", whole)):
            metrics[f"completions/mean{name}_length"].append(sum(values) / len(values))
            metrics[f"completions/min{name}_length"].append(float(min(values)))
            metrics[f"completions/max{name}_length"].append(float(max(values)))
        metrics["completions/clipped_ratio"].append(sum(not end for _, _, end in rows) / len(rows))
        return seen

    def rewards(self, mode: str, rewards: Tensor, advantages: Tensor) -> None:
        """rewards (n, m), advantages (B, G), both of all processes."""
        metrics = self.metrics[mode]
        for name, column in zip(self.names, rewards.unbind(1), strict=True):
            scored = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"].append(_mean(scored))
            metrics[f"rewards/{name}/std"].append(_std(scored))
        total = (rewards * self.weights).nansum(1)[~rewards.isnan().all(1)]
        metrics["reward"].append(_mean(total))
        metrics["reward_std"].append(_std(total))
        metrics["frac_reward_zero_std"].append(float((advantages == 0).all(1).double().mean()))
        reported, self._reported = self._reported, defaultdict(list)
        parts = gather_object([dict(reported)])
        for name in sorted({name for part in parts for name in part}):
            values = [value for part in parts for value in part.get(name, [])]
            metrics[name].append(sum(values) / len(values))

    def texts(self, prompts: list, texts: list, rewards: Tensor, advantages: Tensor) -> None:
        extra, self._extra = gather_object([dict(self._extra)]), defaultdict(list)
        table = {"prompt": gather_object(prompts), "completion": gather_object(texts)}
        table |= dict(zip(self.names, rewards.T.tolist(), strict=True))
        for name in sorted({name for part in extra for name in part}):
            column = [value for part in extra for value in part.get(name, [None] * len(prompts))]
            if len(column) == len(table["prompt"]):
                table[name] = column
        self._table = {**table, "advantage": advantages.flatten().tolist()}

    def sampling(self, mode: str, rollouts: Sequence[Rollout], level: str) -> None:
        """How far the sampler's log-probabilities are from the policy's, and the importance weights."""
        apart: list[float] = []
        weights: list[float] = []
        for one in rollouts:
            assert one.old and one.drawn and one.weight  # of `importance_weights`
            kept = [i for i, counts in enumerate(one.counts) if counts]
            apart += [x for i in kept if not math.isnan(x := abs(one.old[i] - one.drawn[i]))]
            weights += one.weight[:1] if level == "sequence" else [one.weight[i] for i in kept]
        apart, weights = (
            [x for part in parts for x in part] or [0.0]
            for parts in zip(*gather_object([(apart, weights)]), strict=True)
        )
        metrics = self.metrics[mode]
        metrics["sampling/sampling_logp_difference/mean"].append(sum(apart) / len(apart))
        metrics["sampling/sampling_logp_difference/max"].append(max(apart))
        metrics["sampling/importance_sampling_ratio/min"].append(min(weights))
        metrics["sampling/importance_sampling_ratio/mean"].append(sum(weights) / len(weights))
        metrics["sampling/importance_sampling_ratio/max"].append(max(weights))

    def part(self, loss: PolicyLoss, loss_type: str, level: str, tokens: int, rows: int, entropy_coef: float) -> None:
        """The means of a part of a step; entropy_coef: of its mean entropy in the step's loss. Nothing is read."""
        if entropy_coef and loss.entropy is not None:
            self._terms.append(("policy_loss", loss.entropy, entropy_coef, 0))
        ratios = tokens if level == "token" else rows
        means: dict[str, tuple[Tensor | None, int]] = {"entropy": (loss.entropy, tokens), "kl": (loss.kl, tokens)}
        if loss_type in CLIPPED:
            means["clip_ratio/low_mean"] = (loss.clip_low, ratios)
            means["clip_ratio/high_mean"] = (loss.clip_high, ratios)
            means["clip_ratio/region_mean"] = (loss.clip_low + loss.clip_high, ratios)
            for name, clipped in zip(EXTREMES, (loss.rows.clip_low, loss.rows.clip_high), strict=True):
                shares = clipped / loss.rows.tokens if level == "token" else clipped.clamp(max=1)
                self._shares.setdefault(name, []).append(shares)
        elif loss_type == "cispo":
            means["cispo_clip_ratio"] = (loss.clip_high, ratios)
        elif loss_type == "vespo":
            means["vespo/phi_seq_mean"] = (loss.weight, rows)
        self._terms += [(name, mean, count, count) for name, (mean, count) in means.items() if mean is not None]

    def step(self, mode: str, loss: Tensor, entropy_coef: float) -> None:
        """Ends a step: its sums over all processes become means."""
        if entropy_coef:
            self._terms.append(("policy_loss", loss, 1, 1))
        if entropy_coef and mode == "train":
            self.metrics[mode]["entropy_coef"].append(entropy_coef)
        parts = gather_object([self._read()])
        for name in parts[0][0]:
            total, count = (sum(sums[name][k] for sums, _ in parts) for k in (0, 1))
            self.metrics[mode][name].append(total / max(count, 1.0))
        for name in parts[0][1]:
            every = [x for _, shares in parts for x in shares[name] if not math.isnan(x)]
            self.metrics[mode][name].append(EXTREMES[name](every, default=math.nan))
        self._terms, self._shares = [], {}

    def _read(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """name -> [sum, count] and name -> shares of the present step, read from a GPU at once."""
        shares = {name: torch.cat(parts) for name, parts in self._shares.items()}
        values = iter(torch.cat([*(value[None] for _, value, *_ in self._terms), *shares.values()]).tolist())
        sums: dict[str, list[float]] = {}
        for name, _, weight, count in self._terms:
            total, before = sums.get(name, (0.0, 0.0))
            sums[name] = [total + next(values) * weight, before + count]
        return sums, {name: list(itertools.islice(values, len(x))) for name, x in shares.items()}

    def mark(self) -> None:
        """Ends a training step with all that it logs."""
        self._marked = {name: len(values) for name, values in self.metrics["train"].items()}

    def rewind(self) -> None:
        """Forgets what was logged since `mark`: of a step that does not end."""
        kept = {name: self.metrics["train"][name][:count] for name, count in self._marked.items()}
        self.metrics["train"] = defaultdict(list, kept)
        self._reported, self._extra = defaultdict(list), defaultdict(list)

    def means(self, mode: str) -> dict[str, Any]:
        """Those since the last call; None where nothing was scored."""
        result: dict[str, Any] = {}
        metrics, self.metrics[mode] = self.metrics[mode], defaultdict(list)
        if mode == "train":
            now, self._marked = time.perf_counter(), {}
            if self._tokens:  # not where completions are used again, nor in the summary of the run
                metrics["tokens_per_second"] = [self._tokens / (now - self._began)]
            self._began, self._tokens = now, 0
        for name, values in metrics.items():
            known = [value for value in values if not math.isnan(value)]
            result[name if mode == "train" else f"eval_{name}"] = sum(known) / len(known) if known else None
        return result

    def write(self, folder: str, step: int) -> None:
        """The latest completions as <folder>/completions/completions_<step>.parquet, as TRL."""
        import pyarrow
        import pyarrow.parquet

        path = os.path.join(folder, "completions", f"completions_{step:05d}.parquet")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        table = {"step": [step] * len(self._table["prompt"]), **self._table}
        with atomic_write(path) as beside:
            pyarrow.parquet.write_table(pyarrow.table(table), beside)


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else math.nan


def _std(x: Tensor) -> float:
    return math.nan if not len(x) else float(x.std()) if len(x) > 1 else 0.0
