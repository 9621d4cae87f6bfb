"""A GRPO run that was stopped goes on as if it had not been."""

import json

import pytest
import torch
import trl
from grpo_setup import completions_of, length, logs, trainer
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, TrainerCallback

from fastalign.train import GRPOTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


CONSTANT = {"max_steps": 6, "lr_scheduler_type": "constant"}
SAVES = {"save_strategy": "steps", "save_steps": 3}


def losses(run):
    return [row["loss"] for row in logs(run)]


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "learning_rate": 1e-2},
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"beta": 0.5, "learning_rate": 1e-2, "sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=str,
)
def test_a_run_resumes_where_it_stopped(folder, tmp_path, options):
    common = CONSTANT | options
    whole = trainer(GRPOTrainer, folder, tmp_path / "whole", **common)
    whole.train()
    trainer(GRPOTrainer, folder, tmp_path / "part", **SAVES, **common | {"max_steps": 3}).train()
    second = trainer(GRPOTrainer, folder, tmp_path / "part", **SAVES, **common)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == pytest.approx(losses(whole), abs=1e-5)
    assert second.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


@pytest.mark.parametrize("name", ["default", "mine"])
def test_adapters_and_their_frozen_copy_resume(folder, tmp_path, name):
    peft = pytest.importorskip("peft")

    def run(out, **options):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora, adapter_name=name)
        options = CONSTANT | {"learning_rate": 1e-2, "beta": 0.5} | options
        return trainer(GRPOTrainer, folder, tmp_path / out, model=model, **options)

    whole = run("whole")
    whole.train()
    run("part", **SAVES, max_steps=3).train()
    second = run("part", **SAVES)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "at"),
    [({}, 5), ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 10)],
    ids=["between steps", "within a step"],
)
def test_a_reward_that_raises_loses_nothing(folder, tmp_path, options, at):
    calls = []

    def fails(completions, trainer_state, **others):
        calls.append(trainer_state.global_step)
        if len(calls) == at:
            raise ZeroDivisionError("the reward's own")
        return length(completions)

    common = CONSTANT | {"save_strategy": "steps", "save_steps": 100} | options
    whole = trainer(GRPOTrainer, folder, tmp_path / "whole", rewards=[length], **common)
    whole.train()
    saved = []

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **others):
            saved.append((state.global_step, len(first._metrics["train"]["reward"])))

    more = {"callbacks": [Saves()]}
    first = trainer(GRPOTrainer, folder, tmp_path / "part", rewards=[fails], more=more, **common)
    with pytest.raises(ZeroDivisionError, match="the reward's own"):
        first.train()
    assert (tmp_path / "part" / "checkpoint-4").is_dir() and calls[-1] == 4
    second = trainer(GRPOTrainer, folder, tmp_path / "part", rewards=[fails], **common)
    second.train(resume_from_checkpoint=True)
    each = options.get("gradient_accumulation_steps", 1)
    assert saved == [(4, 0)]  # what the unfinished step logged is not kept
    assert calls[at:] == [step for step in (4, 5) for _ in range(each)]
    assert losses(second) == pytest.approx(losses(whole), abs=1e-5)
    assert second.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}], ids=str)
def test_a_checkpoint_of_trls_trainer_goes_on_as_there(folder, tmp_path, options):
    common = {"more": {"rollout_func": completions_of}} | CONSTANT | SAVES | options
    trainer(trl.GRPOTrainer, folder, tmp_path, **common | {"max_steps": 3}).train()
    curves = []
    for cls in (trl.GRPOTrainer, GRPOTrainer):
        run = trainer(cls, folder, tmp_path, **common | {"save_strategy": "no"})
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4, abs=1e-4) and len(curves[1]) == 6


def test_without_its_reference_a_checkpoint_says_so(folder, tmp_path):
    common = CONSTANT | SAVES | {"beta": 0.1}
    trainer(GRPOTrainer, folder, tmp_path, **common | {"max_steps": 3}).train()
    with pytest.warns(UserWarning, match="checkpoint-3 has no reference: sync_ref_model starts from the model"):
        trainer(GRPOTrainer, folder, tmp_path, sync_ref_model=True, **common).train(resume_from_checkpoint=True)


def test_completions_of_another_number_of_processes_are_drawn_again(folder, tmp_path):
    steps = []

    def score(completions, trainer_state, **others):
        steps.append(trainer_state.global_step)
        return length(completions)

    common = CONSTANT | SAVES | {"num_iterations": 2}
    trainer(GRPOTrainer, folder, tmp_path, rewards=[score], **common | {"max_steps": 3}).train()
    path = tmp_path / "checkpoint-3" / "rollouts_0.json"
    kept = json.loads(path.read_text())
    kept["generation"]["rollouts"] = kept["generation"]["rollouts"][:4]  # one of two processes
    path.write_text(json.dumps(kept))
    run = trainer(GRPOTrainer, folder, tmp_path, rewards=[score], **common)
    run.train(resume_from_checkpoint=True)
    assert steps == [0, 2, 3, 4] and len(losses(run)) == 6
