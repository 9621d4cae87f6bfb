"""A run killed at any moment goes on to the same losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppo_setup import lora, policy, rollouts, trainer
from turns import on_its_day

from fastalign import UserError

HERE = Path(__file__).parents[1]

# Every random number matters here: the order of the rows, the sampling, the mini batches, dropout.
RUN = """
import sys, json, os, signal
sys.path.insert(0, {here!r})
import torch
from ppo_setup import policy, trainer
torch.set_num_threads(1)
folder, steps, die = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = [{{"query": str(i), "input_ids": torch.arange(3, 5 + i % 4)}} for i in range(12)]
model = policy("gpt2", dtype=torch.float32, scale=1.0)
run = trainer(model, rate=1e-3, optimizer="adam", dataset=rows, batch_size=4, mini_batch_size=2, ppo_epochs=2,
              disable_dropout=False, use_score_scaling=True, use_score_norm=True, horizon=50.0)
if os.path.isdir(folder):
    run.load_checkpoint(folder)
while run.current_step < steps:
    for batch in run.dataloader:
        responses = run.generate(batch["input_ids"], return_prompt=False, do_sample=True, max_new_tokens=5, top_k=0)
        stats = run.step(batch["input_ids"], responses, [float(len(r)) + 0.1 * float(r[0]) for r in responses])
        names = ("ppo/loss/total", "ppo/policy/entropy", "objective/kl", "objective/kl_coef", "ppo/mean_scores")
        print(json.dumps([run.current_step, batch["query"], *(stats[n] for n in names)]), flush=True)
        if die and run.current_step == die:
            from fastalign.train import ppo_checkpoint
            import safetensors.torch
            safetensors.torch.save_file = lambda *a: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of saving
        run.save_checkpoint(folder)
        if run.current_step == steps:
            break
"""


def launch(folder, steps, die=0):
    script = RUN.format(here=str(HERE))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder), str(steps), str(die)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == (-signal.SIGKILL if die else 0), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@on_its_day("killed: PPOTrainer")
def test_a_killed_run_resumes_to_the_same_losses(tmp_path):
    whole = launch(tmp_path / "whole", 8)
    first = launch(tmp_path / "killed", 8, die=5)  # step 5 is not saved
    assert first == whole[:5]
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path / "killed"))
    second = launch(tmp_path / "killed", 8)
    assert second == whole[4:]
    assert os.listdir(tmp_path / "killed") == ["step-00000008"]


@pytest.mark.parametrize("peft", [False, True])
def test_weights_moments_and_counters_come_back(tmp_path, peft):
    options = {"optimizer": "adam", "rate": 1e-3, "use_score_scaling": True}
    make = lambda: trainer(policy(peft=lora() if peft else None), **options)  # noqa: E731
    run = make()
    for seed in range(2):
        run.step(*rollouts(seed=seed))
    run.save_checkpoint(tmp_path)
    again = make()
    again.load_checkpoint(tmp_path)
    assert again.current_step == 2 and again.kl_ctl.value == run.kl_ctl.value != 0.2
    assert vars(again.running) == vars(run.running)
    for r in (run, again):
        torch.manual_seed(0)
        r.stats = r.step(*rollouts(seed=2))
    assert all(run.stats[n] == again.stats[n] for n in ("ppo/loss/total", "objective/kl", "ppo/mean_scores"))
    for (name, mine), theirs in zip(again.policy.named_parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    (kept,) = tmp_path.glob("step-*/weights.safetensors")
    assert not peft or kept.stat().st_size < 60_000  # the base model is not in it
    assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".safetensors", ".json", "")]


def test_what_cannot_be_resumed_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no checkpoint"):
        trainer().load_checkpoint(tmp_path)
    trainer().save_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"contains another model's weights, \S+ is not (trained here|in it)"):
        trainer(policy(peft=lora())).load_checkpoint(tmp_path)
    state = next(tmp_path.glob("step-*/state.json"))
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 3'))
    with pytest.raises(UserError, match="was saved by 3 processes, this run has 1"):
        trainer().load_checkpoint(tmp_path)


def test_a_learning_rate_schedule_resumes(tmp_path):
    from tiny import tiny_tokenizer

    from fastalign.train.ppo import PPOConfig, PPOTrainer

    def make():
        model = policy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1)
        return PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=schedule)

    run, again = make(), make()
    run.step(*rollouts())
    run.save_checkpoint(tmp_path)
    again.load_checkpoint(tmp_path)
    assert again.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    lines = []
    for r in (run, again):
        torch.manual_seed(0)
        lines.append(r.step(*rollouts()))
    one, two = lines
    assert one["ppo/learning_rate"] == two["ppo/learning_rate"] == 5e-4
    assert one["ppo/loss/total"] == two["ppo/loss/total"]
