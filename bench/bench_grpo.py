"""GRPO on SmolLM2-135M: fastalign's GRPOTrainer against TRL's, each in its own process, on the same prompts.

One step on the CPU in float32: completions of a fixed length are drawn for each prompt, scored by a function, and
trained on once, 32 at a time, or 16 after long prompts: more take TRL over 24 GB. Time is from the trainer's
construction to the end of training; memory is the peak of the process. Loss and gradient norm of a small step on given
completions must agree first.
"""

from __future__ import annotations

import pytest
from fastalign.bench.machine import bar
from fastalign.bench.worker import Worker

pytestmark = pytest.mark.training
TRL = "TRL GRPOTrainer"
CASES = {  # options and bar
    "4 prompts of 96 words x 8, 24 tokens": (
        {"prompts": 4, "words": 96, "completions": 8, "new": 24, "at_once": 32},
        bar(3.5, zen5=6.0),
    ),
    "8 prompts of 96 words x 16, 32 tokens": (
        {"prompts": 8, "words": 96, "completions": 16, "new": 32, "at_once": 32},
        bar(3.6, zen5=6.5),
    ),
    "2 prompts of 400 words x 16, 24 tokens": (
        {"prompts": 2, "words": 400, "completions": 16, "new": 24, "at_once": 16},
        bar(6.5, zen5=11.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_grpo(compare, tmp_path_factory, case):
    options, goal = CASES[case]

    def run(kind):
        return Worker("grpo_job.py", lambda: [kind, options, str(tmp_path_factory.mktemp(kind))])

    ours, theirs = run("fastalign"), run("trl")

    def check():
        for a, b in zip(ours.answer["known"], theirs.answer["known"], strict=True):
            assert abs(a - b) <= 1e-3 * max(1.0, abs(b)), (a, b)
        assert ours.answer["tokens"] == theirs.answer["tokens"] == options["new"]
        return "loss and gradient norm on given completions agree"

    compare(ours, {TRL: theirs}, bars={TRL: goal}, check=check, rounds=1)
