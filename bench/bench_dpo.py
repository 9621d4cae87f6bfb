"""DPO on SmolLM2-135M: fastalign's DPOTrainer against TRL's, each in its own process, on the same pairs.

24 pairs, prompts of 96 words, completions of 24 to 64 words, batches of 4, float32. Time is measured from the trainer's
construction, which includes precomputed reference log-probabilities, to the end of training; memory is the process's
peak; the losses of every step must agree to 1e-4.
"""

from __future__ import annotations

import pytest
from fastalign.bench.machine import bar
from fastalign.bench.worker import Worker

pytestmark = pytest.mark.training
TRL = "TRL DPOTrainer"
CASES = {  # options and bar
    "SmolLM2-135M, float32": ({}, bar(3.0, zen4=3.3, zen5=5.0)),
    "SmolLM2-135M, float32, reference precomputed": ({"precompute_ref_log_probs": True}, bar(2.5)),
    "SmolLM2-135M, float32, LoRA": ({"lora": True}, bar(2.5, zen4=3.3, zen5=5.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_training(compare, tmp_path_factory, case):
    options, goal = CASES[case]

    def run(kind):
        return Worker("dpo_job.py", lambda: [kind, options, str(tmp_path_factory.mktemp(kind))])

    ours, theirs = run("fastalign"), run("trl")

    def check():
        losses = [worker.answer["losses"] for worker in (ours, theirs)]
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        assert apart < 1e-4, apart
        return f"losses of {len(losses[0])} steps differ by {apart:.1e} at most"

    compare(ours, {TRL: theirs}, bars={TRL: goal}, check=check, rounds=1)
