"""Rewards measured on files of correct and wrong answers: what `fastalign reward-bench` runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign._base import outputs
from fastalign._base.errors import UserError
from fastalign._base.files import JSON, check_ending, read_json
from fastalign.data import rows as sources
from fastalign.report.best_of import Question
from fastalign.rewards import references


def reward_bench(
    data: str | os.PathLike[str],
    rewards: Sequence[str],
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    report: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Accuracy by subset and calibration of each reward, or head of a reward model, into a JSON file.

    data: a file of rows, or a hub data set, in RewardBench 2's form: prompt, chosen and rejected (lists of answers, or
        one), and, where there are any, subset and id. rewards: names or references. report: a page (.html) or figures
        (.png, .svg) of the scores and the calibration.

    Raises FileNotFoundError or UserError, one line.
    """
    from fastalign.report.reward import written

    names, given = references.names(rewards), list(rewards)
    check_ending("out", out, JSON)
    pages = written(report) if report is not None else []
    inputs = {"data": data, **{path: path for path in references.contents(given)}}
    job = outputs.Job("reward-bench", inputs, {"rewards": given, "split": split})
    if (record := outputs.claim(out, job, overwrite=overwrite, files=pages)) is None:
        return read_json(Path(out), kind="reward_bench")
    from fastalign.report.best_of import standings
    from fastalign.rewards import score

    questions, prompts, answers = _read(os.fspath(data), split)
    scores = score(given, prompts, answers, show_progress=show_progress)
    measured, pairs = standings(questions, scores, names)
    result: dict[str, Any] = {
        "kind": "reward_bench", "version": 1, "rows": len(questions),
        "rewards": {one.name: one.to_json() for one in measured},
    }  # fmt: skip
    with outputs.making(out, result, record, files=pages):
        if report is not None:
            pairs.write(report)
    return result


def _read(data: str, split: str) -> tuple[list[Question], list[Any], list[str]]:
    questions, prompts, answers = [], [], []
    for i, row in enumerate(sources.read(data, split=split, what="answers")):
        if lacking := [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]:
            raise UserError(f"{data}: row {i} must have prompt, chosen and rejected, lacks {', '.join(lacking)}")
        right, wrong = (_texts(f"{data}: row {i}: {name}", row[name]) for name in ("chosen", "rejected"))
        _count(f"{data}: row {i}", row, len(right), len(wrong))
        prompt = [dict(message) for message in row["prompt"]] if isinstance(row["prompt"], list) else row["prompt"]
        questions.append(Question(str(row.get("subset") or "all"), str(row.get("id", i)), len(right),
                                  len(right) + len(wrong)))  # fmt: skip
        prompts += [prompt] * (len(right) + len(wrong))
        answers += [*right, *wrong]
    return questions, prompts, answers


def _texts(where: str, x: Any) -> list[str]:
    several = [x] if isinstance(x, str) else x
    if not isinstance(several, list) or not several or not all(isinstance(one, str) for one in several):
        raise UserError(f"{where} must be an answer or a list of answers, got {x!r:.60}")
    return several


def _count(where: str, row: Mapping[str, Any], right: int, wrong: int) -> None:
    for name, count in (("num_correct", right), ("num_incorrect", wrong)):
        if row.get(name) not in (None, "", count, str(count)):
            raise UserError(f"{where}: {name} is {row[name]}, there are {count}")
