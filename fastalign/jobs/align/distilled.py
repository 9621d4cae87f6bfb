"""Distillation to a palette, steered: after each pass over the candidates the model's own levels are measured, and the
next pass asks for more by what it fell short of, until every level holds or the budget ends."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.files import read_json
from fastalign.decode.candidates import Candidates
from fastalign.jobs.align import steps
from fastalign.jobs.align.budget import Budget
from fastalign.jobs.distill import read_rows, train_distill

if TYPE_CHECKING:
    from fastalign.jobs.align.job import Job

PASSES = 4  # at most
PROMPTS = 2  # of a step
LIGHT = 0.1  # of a prompt's weight, on the candidates that a pass leaves out
DRAWS = 4  # of each training prompt, to measure a pass's model


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
    aim = Aim(Candidates.from_parquet(job.scored, kind="scored").reward_array(job.names), job.solution)
    source, began, tokens, cost = job.source.name, time.perf_counter(), 0.0, (0.0, 0.0)
    for i in range(PASSES):
        made, since = _place(job, i), (time.perf_counter() - began, tokens)
        job.lam = dict(zip(job.names, aim.lam.tolist(), strict=True))
        if not (scored := made.with_name(f"{made.name}_scored.parquet")).exists():
            tokens += _train(job, source, made, left.less(*since), options)
            now = time.perf_counter() - began, tokens
            if i + 1 == PASSES or left.less(*now).spent(*cost):
                return i, tokens
            tokens += _measure(job, made, scored)
            cost = time.perf_counter() - began - since[0], tokens - since[1]
        levels = Candidates.from_parquet(scored, kind="scored").reward_array(job.names).mean(axis=(0, 1))
        if aim.holds(levels) or left.less(time.perf_counter() - began, tokens).spent(*cost):
            return i, tokens
        aim.further(levels)
        if i:
            shutil.rmtree(_place(job, i - 1), ignore_errors=True)
        source = str(made)
    raise AssertionError("the last pass returns")


class Aim:
    """What a pass's λ is for: the palette, and beyond it by what the passes before it fell short of.

    grid: (P, N, m), the candidates' rewards. solution: of `steps.solve_palette`. lam: (m,).
    """

    lam: np.ndarray

    def __init__(self, grid: np.ndarray, solution: Mapping[str, Any]):
        self._flat = np.ascontiguousarray(grid.reshape(-1, grid.shape[-1]))
        self._groups = np.repeat(np.arange(len(grid)), grid.shape[1])
        self._sense: list[str] = solution["sense"]
        self._side = np.array([steps.SIDE[each] for each in self._sense])
        self._free = np.array(solution["free"], dtype=bool)
        self._palette = self._levels = np.array(solution["solved_for"], dtype=np.float64)
        self.lam = np.array(solution["lambda"], dtype=np.float64)

    def holds(self, levels: np.ndarray) -> bool:
        """Whether no level falls short of what the candidates' λ was solved for."""
        return bool(((self._side * (levels - self._palette) >= 0) & (self._side != 0) | self._free).all())

    def further(self, levels: np.ndarray) -> None:
        """Aim further by what these levels lack; never at less than the palette."""
        from fastalign.palette import solve

        aim = self._levels + self._palette - levels
        aim = np.where(self._side * (aim - self._palette) < 0, self._palette, aim)
        self._levels = np.where(self._free, self._palette, aim)
        found = solve(self._flat, self._levels, groups=self._groups, sense=self._sense)
        if found.nearest is not None:
            found, self._levels = steps.just_inside(found.nearest, self._flat, self._groups, self._sense)
        self.lam = found.lam


def without_least(weights: Sequence[float], share: float = LIGHT) -> list[float]:
    """The weights with the smallest of them, that `share` of their sum in all, set to 0: a candidate of weight 0 costs
    nothing."""
    order = sorted(range(len(weights)), key=lambda j: weights[j])
    left, result = share * sum(weights), list(weights)
    for j in order:
        left -= weights[j]
        if left < 0:
            break
        result[j] = 0.0
    return result


def _place(job: Job, i: int) -> Path:
    return job.folder.part(job.part) / f"distilled-{i}"


def _train(job: Job, source: str, made: Path, left: Budget, options: Mapping[str, Any]) -> float:
    rows = read_rows(job.scored, lam=job.lam)
    rows.sampling = {**rows.sampling, "model": source, "model_content": None}  # on purpose, not those of the base
    for row in rows:
        row["weights"] = without_least(row["weights"])
    return train_distill(source, rows, made, **options, batch_size=PROMPTS, epochs=1.0, until=left.spent)["tokens"]


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
