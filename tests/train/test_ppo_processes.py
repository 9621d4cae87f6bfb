"""Two processes give what one gives on the same global batch, with the model whole in each (DDP) or cut (FSDP2)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ppo_processes import OPTIONS, ROWS, steps
from ppo_setup import policy, snapshot, trainer
from turns import on_its_day

from fastalign.train.value_head import AutoModelForCausalLMWithValueHead

pytestmark = on_its_day("ranks: PPO")
HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What two processes under torchrun found, and the folder they wrote to."""
    out = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, HERE / "ppo_processes.py", out], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "result.pt", weights_only=True) | {"out": out}


@pytest.fixture(scope="module")
def alone():
    run = trainer(policy(), policy(seed=1), batch_size=4, mini_batch_size=2, gradient_accumulation_steps=2, **OPTIONS)
    metrics = steps(run, slice(None))
    return run, metrics, snapshot(run.policy)


@pytest.mark.parametrize("how", ["replicated", "sharded", "sharded by accelerate"])
def test_two_processes_take_the_single_processes_steps(result, alone, how):
    (losses, weights), (_, expected, theirs) = result[how], alone
    np.testing.assert_allclose(losses, expected, rtol=1e-9, atol=1e-11)
    for name, x in theirs.items():
        torch.testing.assert_close(weights[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    before = policy()
    assert all(not torch.equal(p, theirs[n]) for n, p in before.named_parameters() if "layers" in n)


def test_the_exact_kl_of_a_sharded_model(result):
    run = trainer(policy(), policy(seed=1), batch_size=4, mini_batch_size=4, kl_penalty="full", **OPTIONS)
    np.testing.assert_allclose(result["sharded exact"], steps(run, slice(None), 1), rtol=1e-9, atol=1e-11)


def test_the_coefficient_follows_the_global_batch(result, alone):
    assert result["replicated coefficient"] == pytest.approx(alone[0].kl_ctl.value, rel=1e-12)


def test_the_rows_are_dealt(result):
    loader = trainer(dataset=ROWS, batch_size=4, mini_batch_size=4).dataloader
    whole = [batch["query"] for batch in loader]
    assert [a + b for a, b in zip(*result["rows"], strict=True)] == whole


def test_a_sharded_model_is_saved_whole(result):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(result["out"] / "model", dtype=torch.float64)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, result["saved"][name].to(p.dtype), rtol=1e-6, atol=1e-6)
