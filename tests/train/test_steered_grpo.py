"""GRPO towards a palette: the KL as a reward, weights that follow λ, checkpoints that keep it."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import UserError
from fastalign.losses import group_advantages
from fastalign.train import GRPOConfig, GRPOTrainer
from fastalign.train.grpo_rollout import Batch, Rollout
from fastalign.train.replay import Replay
from fastalign.train.steered_grpo import SteeredGRPOTrainer, telling
from fastalign.train.steering import Baselines, Rule, Steering

PROMPTS = ["the cat sat", "a dog ran", "who is big", "tell me"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


def vowels(completions, **others):
    return [sum(text.count(letter) for letter in "aeiou") / 10 for text in completions]


def length(completions, **others):
    return [float(len(text)) for text in completions]


def trainer(folder, out, cls=SteeredGRPOTrainer, **options):
    more = {name: options.pop(name) for name in ("steering", "baselines", "replay") if name in options}
    common = {"output_dir": str(out), "report_to": [], "logging_steps": 1, "per_device_train_batch_size": 16}
    common |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": 4}
    common |= {"learning_rate": 1e-2, "gradient_checkpointing": False, "num_generations": 8, "beta": 1.0}
    common |= {"max_completion_length": 6, "kl_in_reward": True, "advantage": "rloo", "loss_type": "dr_grpo"} | options
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4])
    config = GRPOConfig(**common)
    return cls(model, [vowels, length], config, data, processing_class=tiny_tokenizer(), **more)


def steering(**rule):
    return Steering([0.6, 12.0], [">=", "<="], [0.5, -0.01], rule=Rule(**rule))


BASE = Baselines({prompt: np.array([0.3, 14.0]) for prompt in PROMPTS}, np.array([0.3, 14.0]))


def logs(trained):
    return [row for row in trained.state.log_history if "loss" in row]


def test_the_kl_is_one_more_reward(folder, tmp_path, monkeypatch):
    """Its log-ratios are those of policy and reference by plain forward passes, its weight is -beta."""
    seen = []
    original = GRPOTrainer._advantages

    def looked(self, prompts, rewards, log_ratios):
        seen.append((prompts, rewards, log_ratios, [p.detach().clone() for p in self.model.parameters()]))
        seen[-1] += (original(self, prompts, rewards, log_ratios),)
        return seen[-1][-1]

    drawn = []
    look = GRPOTrainer._look
    monkeypatch.setattr(GRPOTrainer, "_advantages", looked)
    monkeypatch.setattr(
        GRPOTrainer, "_look", lambda self, rollouts, mode: (look(self, rollouts, mode), drawn.append(rollouts))
    )
    t = trainer(folder, tmp_path, GRPOTrainer, beta=0.3, reward_weights=[1.0, 0.1])
    t.train()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    policy = copy.deepcopy(base)
    assert seen[0][2].abs().max() < 1e-4 and seen[-1][2].abs().max() > 1e-2
    for (_, rewards, log_ratios, weights, advantages), rollouts in zip(seen, drawn, strict=True):
        for p, w in zip(policy.parameters(), weights, strict=True):
            p.data.copy_(w)
        wanted = []
        for one in rollouts:
            ids = torch.tensor([[*one.prompt, *one.completion]])
            places = range(len(one.prompt) - 1, ids.shape[1] - 1)
            ratio = 0.0
            for model, sign in ((policy, 1), (base, -1)):
                log_p = model(ids).logits[0].log_softmax(-1)
                ratio += sign * sum(float(log_p[i, ids[0, i + 1]]) for i in places)
            wanted.append(ratio)
        np.testing.assert_allclose(log_ratios.flatten().numpy(), wanted, atol=2e-4)
        whole = torch.cat((rewards, log_ratios[..., None]), 2)
        torch.testing.assert_close(advantages, group_advantages(whole, weights=[1.0, 0.1, -0.3], how="rloo"))


def test_weights_follow_the_levels(folder, tmp_path):
    steer = steering(memory=2.0)
    t = trainer(folder, tmp_path, steering=steer, baselines=BASE)
    t.train()
    rows = logs(t)
    assert len({row["lam/vowels"] for row in rows}) == 4 and rows[-1]["lam/vowels"] == steer.lam[0]
    assert t.reward_weights.tolist() == steer.lam.tolist()
    for row in rows:  # each batch has all prompts, so levels are its means
        assert np.isfinite([row["level/vowels"], row["level/length"]]).all()
    assert rows[0]["level/length"] == pytest.approx(rows[0]["rewards/length/mean"])
    assert all(row["lam/length"] <= 0 <= row["lam/vowels"] for row in rows)


def test_it_resumes_with_its_lam(folder, tmp_path):
    whole = trainer(folder, tmp_path / "a", steering=steering(), baselines=BASE)
    whole.train()
    first = trainer(folder, tmp_path / "b", steering=steering(), baselines=BASE, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer(folder, tmp_path / "b", steering=steering(), baselines=BASE)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for a, b in zip(logs(whole)[2:], logs(second)[2:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["lam/vowels"] == pytest.approx(a["lam/vowels"], rel=1e-5)


@pytest.fixture(scope="module")
def replay(folder):
    """The base's own candidates, scored."""
    from fastalign.decode import Sampler

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    candidates = Sampler(base, tiny_tokenizer()).sample(PROMPTS, n=16, max_new_tokens=6, seed=0)
    rewards = [[[f([text])[0] for f in (vowels, length)] for text in row] for row in candidates.texts]
    return Replay(candidates, np.array(rewards), PROMPTS, first=2)


def test_candidates_have_the_variance_that_training_lowers(folder, tmp_path, replay, monkeypatch):
    """λ·R less the log-ratio to the base by plain forward passes, centred as REINFORCE leave-one-out does; λ rests."""
    batches = []
    original = SteeredGRPOTrainer._replayed

    def looked(self, *args):
        batches.append((original(self, *args), self.reward_weights.numpy().copy()))
        return batches[-1][0]

    monkeypatch.setattr(SteeredGRPOTrainer, "_replayed", looked)
    steer = steering()
    t = trainer(folder, tmp_path, steering=steer, baselines=BASE, replay=replay)
    t.train()
    assert len(batches) == 3 and sum("lam/vowels" in row for row in logs(t)) == 1  # the third of four is its own
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    (first, lam), (second, _), _ = batches
    assert lam.tolist() == [0.5, -0.01]
    for one in first.rollouts:
        ids = torch.tensor([[*one.prompt, *one.completion]])
        log_p = base(ids).logits[0].log_softmax(-1)
        wanted = [float(log_p[i - 1, ids[0, i]]) for i in range(len(one.prompt), ids.shape[1])]
        np.testing.assert_allclose(one.ref, wanted, atol=2e-4)
        np.testing.assert_allclose(one.old, wanted, atol=2e-4)
    text = {tuple(ids): i for row in replay._scored.token_ids for i, ids in enumerate(row)}
    group = first.rollouts[:8]
    assert all(tuple(one.completion) in text for one in group)
    tokenizer = tiny_tokenizer()
    texts = tokenizer.batch_decode([one.completion for one in group], skip_special_tokens=True)
    own = np.array([lam @ [vowels([text])[0], length([text])[0]] for text in texts])
    np.testing.assert_allclose([one.advantage for one in group], (own - own.mean()) * 8 / 7, atol=1e-3)
    moved = [sum(one.old) - sum(one.ref) for one in second.rollouts]
    assert np.abs(moved).max() > 1e-2


def test_it_resumes_amid_the_candidates(folder, tmp_path, replay):
    given = {"baselines": BASE, "replay": replay}
    whole = trainer(folder, tmp_path / "a", steering=steering(), **given)
    whole.train()
    first = trainer(folder, tmp_path / "b", steering=steering(), save_strategy="steps", save_steps=1, **given)
    first.train()
    second = trainer(folder, tmp_path / "b", steering=steering(), **given)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    for a, b in zip(logs(whole)[1:], logs(second)[1:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def test_the_telling_half():
    rows = [Rollout([1], [2] * (i + 1), [1] * (i + 1), advantage=a) for i, a in enumerate([0.1, -3.0, 2.0, -0.2])]
    kept = telling(Batch(rows, 10))
    assert kept.rollouts == rows[1:3] and kept.tokens == 5
    assert telling(Batch(rows[:1], 1)).rollouts == rows[:1]


def test_it_ends_when_every_level_holds(folder, tmp_path):
    easy = Steering([-100.0, 1000.0], [">=", "<="], [0.0, 0.0], rule=Rule(hold=2))
    t = trainer(folder, tmp_path, steering=easy, baselines=BASE)
    t.train()
    assert t.state.global_step == 2


@pytest.mark.parametrize("option", [{"beta": 0.5}, {"advantage": "grpo"}, {"kl_in_reward": False}])
def test_another_objective_is_refused(folder, tmp_path, option):
    with pytest.raises(UserError, match=r"kl_in_reward=True, beta=1\.0 and advantage='rloo'"):
        trainer(folder, tmp_path, steering=steering(), baselines=BASE, **option)


def test_a_kl_without_a_reference_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="kl_in_reward needs a reference: beta must not be 0"):
        trainer(folder, tmp_path, GRPOTrainer, beta=0.0)
