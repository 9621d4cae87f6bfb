"""Distillation to a palette, steered: after each pass over the candidates the model's own levels are measured, and λ
of the next pass asks for more by what they fell short of (`train.steering`), until every level holds or the budget
ends."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.files import read_json
from fastalign.decode.candidates import Candidates
from fastalign.jobs.align import steps
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.distill import DistillRows, train_distill
from fastalign.train.replay import Replay
from fastalign.train.steering import Rule, Steering, covariance, key_of

if TYPE_CHECKING:
    from fastalign.jobs.align.job import Job

PASSES = 6  # at most, where no budget ends the training
PROMPTS, CHOSEN = 8, 8  # of a step, and candidates of each
SELECTIONS = 1  # of each prompt's candidates, in a pass
WARMUP = 3  # steps of a pass, if it has many: the first is at a rate of 0
DRAWS = 4  # of each training prompt, to measure a pass's model
RULE = Rule(gain=2.0, rate=0.5, memory=1.0, limit=3.0, hold=0)
LEAST = 1e-200  # of a candidate's weight beside the largest: none may be 0


def distill(job: Job, out: Path, left: Budget, options: Mapping[str, Any]) -> float:
    """Train the job's model into `out`; returns how many tokens that took. options: of `train_distill`.

    Pass i has its model and that model's samples in distilled-<i>, beside the candidates; a resumed job goes on after
    the last one that was measured.
    """
    tokens = 0.0

    def train() -> dict[str, Any]:
        nonlocal tokens
        i, tokens = _passes(job, left, options)
        return {"passes": i + 1, "lam": job.lam}

    done = job.folder.decided(f"{job.part}: distilled", train)
    job.lam = done["lam"]
    if (made := _place(job, done["passes"] - 1)).exists():
        _move(made, out)
    return tokens


def _passes(job: Job, left: Budget, options: Mapping[str, Any]) -> tuple[int, float]:
    """(the last pass, tokens)."""
    steering = Steering.of(job.solution, RULE)
    source, began, tokens, cost = job.source.name, time.perf_counter(), 0.0, (0.0, 0.0)
    for i in count():
        made, since = _place(job, i), (time.perf_counter() - began, tokens)
        job.lam = dict(zip(job.names, steering.lam.tolist(), strict=True))
        if not (scored := made.with_name(f"{made.name}_scored.parquet")).exists():
            tokens += _train(job, i, source, made, left.less(*since), options)
            now = time.perf_counter() - began, tokens
            if left.less(*now).spent(*cost) or (i + 1 == PASSES and not left.limited):
                return i, tokens
            tokens += _measure(job, made, scored)
            cost = time.perf_counter() - began - since[0], tokens - since[1]
        rewards = Candidates.from_parquet(scored, kind="scored").reward_array(job.names)
        steering.update(rewards.mean(axis=(0, 1)), covariance(rewards))
        if holds(steering) or left.less(time.perf_counter() - began, tokens).spent(*cost):
            return i, tokens
        if i:
            shutil.rmtree(_place(job, i - 1), ignore_errors=True)
        source = str(made)
    raise AssertionError("a pass returns")


def holds(steering: Steering) -> bool:
    """Whether the last levels that were measured fall short of none of the palette's."""
    gap = (steering.levels - steering.palette) * steering.side
    return bool(((gap >= 0) & (steering.side != 0) | steering.free).all())


def _place(job: Job, i: int) -> Path:
    return job.folder.part(job.part) / f"distilled-{i}"


def _train(job: Job, i: int, source: str, made: Path, left: Budget, options: Mapping[str, Any]) -> float:
    rows = DistillRows(selected(Candidates.from_parquet(job.scored, kind="scored"), job.lam, [job.seed, i]))
    rows.source = str(job.scored)
    warmup = min(WARMUP, len(job.train) * SELECTIONS // PROMPTS // 4)
    return train_distill(
        source, rows, made, **options, batch_size=PROMPTS, epochs=1.0, warmup_steps=warmup, until=left.spent
    )["tokens"]


def selected(scored: Candidates, lam: Mapping[str, float], seed: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of `train.DistillTrainer`: of each prompt in turn, the best and the worst of its candidates by λ·R."""
    rng, rewards = np.random.default_rng(seed), scored.reward_array(tuple(lam))
    weights, keys = np.array(list(lam.values())), [key_of(prompt) for prompt in scored.prompts]
    replay = Replay(scored, rewards, keys)
    for _ in range(SELECTIONS):
        for i in rng.permutation(len(keys)).tolist():
            texts = replay.texts(keys[i], CHOSEN, weights, rng)
            scores = np.array([one.rewards for one in texts]) @ weights
            yield {
                "prompt": scored.prompts[i],
                "completion_ids": [one.token_ids for one in texts],
                "weights": np.maximum(np.exp(scores - scores.max()), LEAST).tolist(),
                "ref_logprobs": [sum(one.logprobs) for one in texts],
            }


def _measure(job: Job, made: Path, scored: Path) -> float:
    """Write the model's samples of the training prompts, with their scores."""
    drawn = made.with_name(f"{made.name}.parquet")
    tokens = job.drawn(drawn, job.model.at(made), job.train, DRAWS, job.seed_of(drawn.name)).tokens
    steps.score(drawn, job.rewards, scored, show_progress=job.show_progress)
    return tokens


def _move(made: Path, out: Path) -> None:
    """Put a run's files into `out`, in place of those of an earlier run."""
    out.mkdir(exist_ok=True)
    if (result := out / "result.json").is_file() and (made / "result.json").is_file():
        for name in read_json(result).get("files", []):
            (out / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == "result.json"):  # which says that all are there
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        os.replace(path, out / path.name)
    made.rmdir()
