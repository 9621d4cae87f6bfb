"""GRPOTrainer against TRL's on the same completions: the same losses, metrics and weights; what it adds; what it
refuses."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset
from grpo_setup import STEPS, completions_of, length, logs, prompts, trainer, vowels
from plain_advantages import plain_advantages
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import UserError
from fastalign.train import GRPOTrainer
from fastalign.train.rows import add_row_forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


def timed(name):
    return any(word in name for word in ("time", "second"))


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch"},
        {"loss_type": "bnpo", "entropy_coef": 0.1},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "gradient_accumulation_steps": 3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "learning_rate": 0.5},
        {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2, "learning_rate": 0.5},
        {"loss_type": "sapo", "num_iterations": 3, "learning_rate": 0.5, "mask_truncated_completions": True},
        {"loss_type": "luspo", "num_iterations": 2, "learning_rate": 0.5, "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "num_iterations": 2, "learning_rate": 0.5},
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5], "temperature": 0.7},
        {"beta": 0.2, "use_bias_correction_kl": False, "num_iterations": 2, "learning_rate": 0.5, "delta": 1.5},
        {"off_policy_mask_threshold": 0.1, "num_iterations": 2, "mask_truncated_completions": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_every_step_equals_trls(folder, tmp_path, options):
    theirs, ours = (
        # Adam would make a step of a difference in the last digit of a gradient.
        trainer(cls, folder, tmp_path, more={"rollout_func": completions_of}, **{"optim": "sgd", **options})
        for cls in (trl.GRPOTrainer, GRPOTrainer)
    )
    assert ours._packs
    ours.args.max_packed_tokens = 60
    theirs.train()
    ours.train()
    assert len(logs(theirs)) == STEPS
    pairs = [*zip(logs(theirs), logs(ours), strict=True)]
    pairs.append(tuple(t.evaluate(Dataset.from_list(prompts(4))) for t in (theirs, ours)))
    for a, b in pairs:
        assert set(a) <= set(b)
        names = {name for name, value in a.items() if isinstance(value, float) and not timed(name)}
        if "gradient_accumulation_steps" in options:  # TRL's are means over the batches of a step
            names -= {"clip_ratio/low_min", "clip_ratio/high_max"}
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name
    for (name, a), (_, b) in zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("given", ["new", "trained"])
def test_lora_takes_its_reference_from_the_model_without_it(folder, tmp_path, given):
    """New adapters: the model without them. Those that the model came with: a frozen copy of them."""
    peft = pytest.importorskip("peft")
    curves = []
    for cls in (trl.GRPOTrainer, GRPOTrainer):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=given == "new")
        options = {"more": {"rollout_func": completions_of}, "beta": 0.1, "learning_rate": 1e-2}
        if given == "trained":
            torch.manual_seed(1)
            options["model"] = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
        else:
            options["more"]["peft_config"] = lora
        t = trainer(cls, folder, tmp_path, **options)
        assert t.ref_model is None
        t.train()
        curves.append([(row["loss"], row["kl"]) for row in logs(t)])
    assert curves[0][0][1] == pytest.approx(0, abs=1e-6) and curves[0][-1][1] > 1e-4
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_each_trainer_of_a_model_with_adapters_starts_from_them(folder, tmp_path, name):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora, adapter_name=name)
    for _ in range(2):
        t = trainer(GRPOTrainer, folder, tmp_path, model=model, beta=0.1, learning_rate=1e-2)
        t.train()
        kl = [row["kl"] for row in logs(t)]
        assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
        assert model.active_adapter == name and set(model.peft_config) == {name, "ref"}
        assert all(p.requires_grad == (f".{name}" in n) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("kind", ["modules", "functions"])
def test_without_dropout_policy_and_reference_begin_the_same(folder, tmp_path, kind):
    """Dropout that is a module, as in GPT-2, and that attention is given as a number, as in Llama."""
    kl = []
    for disable in (True, False):
        model = tiny_causal_lm(tiny_tokenizer(), kind="gpt2", dtype=torch.float32)
        if kind == "functions":
            model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.5)
        options = {"beta": 0.1, "disable_dropout": disable, "share_prompt": False, "max_steps": 1}
        t = trainer(GRPOTrainer, folder, tmp_path, model=model, **options)
        t.train()
        kl.append(logs(t)[0]["kl"])
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[1] > 1e-3


def test_importance_weights_are_logged_as_for_vllm(folder, tmp_path):
    t = trainer(
        GRPOTrainer, folder, tmp_path, more={"rollout_func": completions_of}, importance_correction=True, max_steps=1,
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=0.02,
    )  # fmt: skip
    t.train()
    row = logs(t)[0]
    low, mean, high = (row[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max"))
    assert 0 < low < mean < high == 0.02
    apart, most = (row[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
    assert 0 < apart < most and most >= -math.log(low) - 1e-6


def test_a_stream_is_evaluated_in_groups_too(folder, tmp_path):
    t = trainer(GRPOTrainer, folder, tmp_path)
    rows = Dataset.from_list(prompts(5))
    expected, evaluated = (t.evaluate(data) for data in (rows, rows.to_iterable_dataset()))
    for name in ("eval_loss", "eval_reward", "eval_reward_std", "eval_entropy"):
        assert evaluated[name] == pytest.approx(expected[name], abs=1e-5)


def test_old_log_probabilities_are_the_draws(folder, tmp_path):
    """Two passes over the same completions: with what the sampler recorded, and with a forward pass instead."""
    curves = []
    for forward in (False, True):
        t = trainer(GRPOTrainer, folder, tmp_path, num_iterations=2, learning_rate=1e-2, temperature=0.8)
        if forward:
            look = t._look

            def again(rollouts, mode, t=t, look=look):
                look(rollouts, mode)
                t._fill("old", rollouts, t.model)

            t._look = again
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][1] != pytest.approx(curves[0][0], abs=1e-3)


def test_padded_rows_and_evaluation_give_the_same(folder, tmp_path):
    result = []
    for share in (True, False):
        t = trainer(GRPOTrainer, folder, tmp_path, share_prompt=share, beta=0.1, max_steps=2)
        assert t._packs == share
        t.train()
        result.append((logs(t), t.evaluate(Dataset.from_list(prompts(3)))))
    (a, evaluated), (b, again) = result
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], abs=1e-5)
    for name in ("eval_loss", "eval_reward", "eval_entropy", "eval_rewards/length/mean"):
        assert evaluated[name] == pytest.approx(again[name], abs=1e-4)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("how", ["grpo", "batch", "dr_grpo", "rloo", "gdpo", "rank"])
def test_one_update_equals_a_plain_float64_reference(folder, tmp_path, how):
    seen = {}

    def remember(prompts, completions, completion_ids, **others):
        seen.update(prompts=prompts, ids=completion_ids, length=length(completions))
        seen["vowels"] = vowels(completions, others["number"])
        return seen["length"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    t = trainer(
        GRPOTrainer, folder, tmp_path, model=model, rewards=[remember, vowels], advantage=how, max_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", gradient_accumulation_steps=2,
        max_packed_tokens=50,
    )  # fmt: skip
    t.train()
    said = ([math.nan if x is None else x for x in seen[name]] for name in ("length", "vowels"))
    scores = list(zip(*said, strict=True))
    groups = plain_advantages([scores[i : i + 4] for i in range(0, len(scores), 4)], [1.0, 1.0], how)
    advantages = [x for group in groups for x in group]
    loss, tokens = 0.0, sum(map(len, seen["ids"]))
    for prompt, ids, advantage in zip(seen["prompts"], seen["ids"], advantages, strict=True):
        first = t.processing_class(prompt)["input_ids"]
        row = torch.tensor([[*first, *ids]])
        log_probs = before(row).logits[0, len(first) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
        loss = loss - ((log_probs - log_probs.detach()).exp() * advantage).sum() / tokens
    loss.backward()
    assert logs(t)[0]["loss"] == pytest.approx(float(loss), abs=1e-6)
    for (name, ours), p in zip(t.model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.data - ours.data, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_copy_of_a_model_that_scores_rows_runs_its_own_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for _ in range(2):  # as for two trainers, one after the other
        add_row_forward(model)
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        for p in model.parameters():
            p.zero_()
        torch.testing.assert_close(twin(ids).logits, expected)


def test_training_twice_begins_again(folder, tmp_path):
    t = trainer(GRPOTrainer, folder, tmp_path, max_steps=2, num_iterations=2, learning_rate=0.0)
    curves = []
    for _ in range(2):
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[0] == curves[1]


def test_an_evaluation_batch_has_whole_groups(folder, tmp_path):
    t = trainer(GRPOTrainer, folder, tmp_path, per_device_eval_batch_size=6)
    with pytest.raises(UserError, match=r"a multiple of num_generations_eval = 4 .* got 6: set per_device_eval_batch"):
        t.evaluate(Dataset.from_list(prompts(3)))
