"""Two processes give what one gives on the same global batch, with the model whole in each (DDP) or cut (FSDP2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grpo_processes import CASES, DRAWN, SHARDED, made, trained
from tiny import tiny_folder
from transformers import AutoModelForCausalLM
from turns import on_its_day

pytestmark = on_its_day("ranks: GRPO")
HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    """What two processes under torchrun found, and the folder they wrote to."""
    out = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, HERE / "grpo_processes.py", folder, out], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out / "result.pt", weights_only=True) | {"out": out}


def assert_same(ours, theirs):
    """The curves and weights of two runs."""
    (rows, weights), (expected, their_weights) = ours[:2], theirs[:2]
    assert len(rows) == len(expected)
    for a, b in zip(rows, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for name, x in their_weights.items():
        torch.testing.assert_close(weights[name], x, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process's run of a case."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = trained(made(folder, tmp_path_factory.mktemp("alone"), 1, CASES[name]))
        return runs[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_single_processes_steps(result, alone, name):
    assert_same(result[name], alone(name))


@pytest.mark.parametrize("name", SHARDED)
def test_so_do_two_that_share_the_weights(result, alone, name):
    *_, (one, other) = result[f"{name}, sharded"]
    assert one == other  # a sharded model runs equally often on both
    assert_same(result[f"{name}, sharded"], alone(name))


def test_processes_may_run_a_different_number_of_parts(result):
    assert any(one != other for *_, (one, other) in (result[name] for name in CASES))


def test_both_processes_draw_and_a_run_is_reproducible(result, folder, tmp_path):
    *_, draws = result["drawn"]
    for step in draws:
        assert all(prompt == step[0][0] for prompt, _ in step)  # a group that spans the processes
        assert len({tuple(completion) for _, completion in step}) == 4
    assert len(draws) == DRAWN["max_steps"] + 3  # and the evaluation's
    again = result["drawn again"]
    assert again[3] == draws
    assert_same(again, result["drawn"])

    steps = iter(draws)

    def replayed(prompts, trainer):
        prompt_ids, completion_ids = zip(*next(steps), strict=True)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    assert_same(result["drawn"], trained(made(folder, tmp_path, 1, DRAWN, rollout_func=replayed)))


def test_a_sharded_model_draws_trains_saves_and_resumes(result):
    ours, theirs = result["drawn, sharded"], result["drawn"]
    assert ours[3] == theirs[3]
    assert_same(ours, theirs)
    saved = AutoModelForCausalLM.from_pretrained(result["out"] / "model", dtype=torch.float32)
    for name, p in saved.named_parameters():
        torch.testing.assert_close(p, ours[1][name], rtol=0, atol=0)
    assert_same(result["resumed"], ours)
    assert len(result["resumed"][2][0]) < len(ours[2][0])


@pytest.mark.parametrize("how", ["raises", "raises, sharded"])
def test_a_reward_that_raises_on_one_process_ends_both(result, how):
    (one, other), files = result[how]
    assert one == "UserError: process 1 could not draw or score its completions: see its error"
    assert other == "ZeroDivisionError: the reward's own"
    assert {"rollouts_0.json", "rollouts_1.json", "trainer_state.json"} <= set(files)


def test_a_prompt_refused_on_one_process_ends_both(result):
    assert sorted(result["no prompt"])[0].startswith("UserError: process ")
    assert sorted(result["no prompt"])[1] == "UserError: prompt must have at least one token, got ''"
