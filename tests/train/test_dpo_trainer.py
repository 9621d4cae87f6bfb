"""DPOTrainer against TRL's: the same losses, metrics and weights; what it adds; what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from turns import on_its_day

from fastalign import UserError
from fastalign._base.cache import cache_dir
from fastalign.losses import dpo_loss
from fastalign.train import DPOConfig, DPOTrainer

WORDS = "the quick brown fox jumps over a lazy dog near some quiet river bank".split()
STEPS = 3


def text(i, n):
    return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(n))


def rows(count=12):
    return [
        {"prompt": text(i, 4 + i % 3), "chosen": " " + text(i + 1, 3 + i % 2), "rejected": " " + text(i + 2, 5)}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), scale=3.0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))


def trainer(cls, folder, out, *, data=None, eval_data=None, model=None, peft_config=None, more=None, **options):
    config = DPOConfig if cls is DPOTrainer else trl.DPOConfig
    common = {"output_dir": str(out), "report_to": [], "logging_steps": 1, "per_device_train_batch_size": 4}
    common |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": STEPS}
    common |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "per_device_eval_batch_size": 4} | options
    return cls(
        model or AutoModelForCausalLM.from_pretrained(folder),
        args=config(**common),
        train_dataset=Dataset.from_list(data or rows()),
        eval_dataset=None if eval_data is None else Dataset.from_list(eval_data),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **(more or {}),
    )


def logs(trained):
    return [row for row in trained.state.log_history if "loss" in row]


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "ipo", "ld_alpha": 0.5, "use_weighting": True},
        {"loss_type": "aot"},
        {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": False},
        {"max_length": 24, "truncation_mode": "keep_end"},
    ],
    ids=lambda options: " ".join(map(str, options)) or "default",
)
def test_every_step_equals_trls(folder, tmp_path, options):
    theirs = trainer(trl.DPOTrainer, folder, tmp_path, **options)
    theirs.train()
    ours = trainer(DPOTrainer, folder, tmp_path, max_packed_tokens=40, **options)
    assert ours._packs
    ours.train()
    assert len(logs(theirs)) == STEPS
    for a, b in zip(logs(theirs), logs(ours), strict=True):
        names = {name for name, value in a.items() if isinstance(value, float)}
        if abs(a["rewards/margins"]) < 1e-5:  # the model is its reference still: which is larger is rounding
            names.remove("rewards/accuracies")
        for name in names - {"epoch"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name
        assert b["num_tokens"] == a["num_tokens"] and b["tokens_per_second"] > 0
    for (name, a), (_, b) in zip(theirs.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


def test_lora_takes_its_reference_from_the_model_without_it(folder, tmp_path):
    peft = pytest.importorskip("peft")
    curves = []
    for cls in (trl.DPOTrainer, DPOTrainer):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        t = trainer(cls, folder, tmp_path, peft_config=lora)
        assert t.ref_model is None
        t.train()
        curves.append([row["loss"] for row in logs(t)])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4) and curves[0][-1] != curves[0][0]


def test_padded_rows_and_evaluation_give_the_same(folder, tmp_path):
    result = []
    for share in (True, False):
        t = trainer(DPOTrainer, folder, tmp_path, eval_data=rows(6), share_prompt=share, max_steps=2)
        assert t._packs == share
        t.train()
        result.append((logs(t), t.evaluate()))
    (a, evaluated), (b, again) = result
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], abs=1e-5)
    for name in ("eval_loss", "eval_rewards/margins", "eval_entropy"):
        assert evaluated[name] == pytest.approx(again[name], abs=1e-4)
    theirs = trainer(trl.DPOTrainer, folder, tmp_path, eval_data=rows(6), max_steps=2)
    theirs.train()
    assert theirs.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-4)


def test_reference_log_probs_are_kept_by_content(folder, tmp_path, monkeypatch):
    kept = cache_dir() / "ref_logps"
    trainer(DPOTrainer, folder, tmp_path, precompute_ref_log_probs=True)
    assert len(list(kept.iterdir())) == 1
    made = []
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *a: made.append(1))
    again = trainer(DPOTrainer, folder, tmp_path, precompute_ref_log_probs=True)
    assert not made and again.train_dataset[0]["ref_chosen_logps"] < 0
    monkeypatch.undo()
    monkeypatch.setenv("FASTALIGN_CACHE", str(kept.parent))
    trainer(DPOTrainer, folder, tmp_path, data=rows(8), precompute_ref_log_probs=True)
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight[5] += 1
    trainer(DPOTrainer, folder, tmp_path, model=other, precompute_ref_log_probs=True)
    assert len(list(kept.iterdir())) == 3


def test_a_reference_with_a_hook_is_neither_kept_nor_taken_for_another(folder, tmp_path):
    kept = cache_dir() / "ref_logps"
    losses = []
    for steered in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if steered:
            model.model.layers[0].register_forward_hook(lambda module, given, out: out + 0.3)
        trained = trainer(DPOTrainer, folder, tmp_path, model=model, precompute_ref_log_probs=True)
        assert len(list(kept.glob("*"))) == (0 if steered else 1)
        trained.train()
        losses.append(logs(trained)[0]["loss"])
    assert losses == pytest.approx([0.693147, 0.693147], abs=1e-4)


def gpt2(folder, dropout=0.0, **options):
    """The same weights at every call."""
    config = GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(3)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model.eval()


def llama(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(6 if "q_proj" in name or "k_proj" in name else 1)
    return model


def swapped(folder):
    """The same tensors by other names: a hash of values in their order would be the same."""
    model = llama(folder)
    first, second = (layer.input_layernorm.weight.data for layer in model.model.layers)
    first.mul_(1.5)
    model.model.layers[0].input_layernorm.weight.data, model.model.layers[1].input_layernorm.weight.data = second, first
    return model


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    "one, other",
    [
        (llama, lambda folder: llama(folder, rope_parameters={"rope_type": "default", "rope_theta": 50.0})),
        (gpt2, lambda folder: gpt2(folder, scale_attn_by_inverse_layer_idx=True)),
        (gpt2, lambda folder: gpt2(folder, activation_function="relu")),
        (llama, lambda folder: llama(folder, rms_norm_eps=0.1)),
        (llama, swapped),
    ],
)
def test_kept_log_probs_are_of_the_same_model_alone(folder, tmp_path, one, other):
    options = {"max_steps": 1, "precompute_ref_log_probs": True, "data": rows(4), "learning_rate": 0.0}
    result = [trainer(DPOTrainer, folder, tmp_path, model=make(folder), **options) for make in (one, other)]
    ours, theirs = (each.train_dataset["ref_chosen_logps"][:] for each in result)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-3
    for each in result:  # the policy is its own reference
        each.train()
        assert each.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_has_no_dropout(folder, tmp_path, training):
    options = {"max_steps": 1, "data": rows(4), "disable_dropout": False}
    model = gpt2(folder, 0.5).train(training)
    result = trainer(DPOTrainer, folder, tmp_path, model=model, precompute_ref_log_probs=True, **options)
    plain = trainer(DPOTrainer, folder, tmp_path / "b", model=gpt2(folder), precompute_ref_log_probs=True, **options)
    assert result.train_dataset["ref_chosen_logps"][:] == pytest.approx(
        plain.train_dataset["ref_chosen_logps"][:], abs=1e-4
    )
    assert all(module.training == training for module in model.modules())


def test_a_reference_that_is_not_on_disk_is_asked_for(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    ours = trainer(DPOTrainer, folder, tmp_path, model=model)
    ours.train()
    with pytest.raises(UserError, match="eval_dataset must be given to the trainer, or ref_model"):
        ours.evaluate(Dataset.from_list(rows(6)))


def test_no_second_model_where_the_reference_can_be_asked_before_training(folder, tmp_path):
    ours = trainer(DPOTrainer, folder, tmp_path)
    assert ours.ref_model is None and "ref_chosen_logps" in ours.train_dataset.column_names
    partly = trainer(DPOTrainer, folder, tmp_path, max_steps=1, data=rows(8))  # half of the pairs would be run in vain
    assert partly.ref_model is not None and "ref_chosen_logps" not in partly.train_dataset.column_names
    theirs = trainer(trl.DPOTrainer, folder, tmp_path)
    result = []
    for each in (ours, theirs):
        each.train()
        result.append(each.evaluate(Dataset.from_list(rows(6)))["eval_loss"])
    assert result[0] == pytest.approx(result[1], abs=1e-4)
    assert ours.ref_model is not None


def test_modpo_margins_and_weights(folder, tmp_path):
    data = [row | {"margin": 0.3 * (i % 3) - 0.2, "weight": 1.0 + i % 2} for i, row in enumerate(rows(4))]
    t = trainer(
        DPOTrainer, folder, tmp_path, data=data, modpo_weight=0.5, precompute_ref_log_probs=False, max_steps=1, beta=0.2
    )
    with torch.no_grad():
        for p in t.ref_model.parameters():
            p.mul_(0.9)  # apart from the policy
    inputs = t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(4)]))
    loss = t._compute_loss(t.model, inputs, False).detach()
    mask = inputs["completion_mask"][:, 1:].bool()
    batch = t._batch(inputs)
    with torch.no_grad():
        policy = t.model(rows=batch)["log_probs"].masked_fill(~mask, 0).sum(-1).chunk(2)
        ref = t.ref_model(rows=batch)["log_probs"].masked_fill(~mask, 0).sum(-1).chunk(2)
    difference = (policy[0] - ref[0]) - (policy[1] - ref[1])
    margins, weights = (torch.tensor([row[name] for row in data]) for name in ("margin", "weight"))
    expected = -(weights * torch.nn.functional.logsigmoid((0.2 * difference - margins) / 0.5)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_counts_for_sigmoid(folder, tmp_path):
    t = trainer(DPOTrainer, folder, tmp_path, label_smoothing=0.2, max_steps=1)
    t.train()
    zero = torch.zeros(1)
    assert logs(t)[0]["loss"] == pytest.approx(
        float(dpo_loss(zero, zero, zero, zero, label_smoothing=0.2).losses), abs=1e-4
    )


RESUMES = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
from pathlib import Path
from test_dpo_trainer import *
import os, signal
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if {kill} and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
t = trainer(DPOTrainer, {folder!r}, {out!r}, max_steps=4, save_strategy="steps", save_steps=2)
t.add_callback(Kill())
t.train(resume_from_checkpoint={resume})
print("LOSSES", *[row["loss"] for row in logs(t)])
"""


@on_its_day("killed: DPOTrainer")
def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path):
    def run(out, kill=False, resume=False):
        tests = str(Path(__file__).parents[1])
        script = RESUMES.format(tests=tests, folder=folder, out=str(tmp_path / out), kill=kill, resume=resume)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
        result = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOSSES")]
        return done, [float(x) for x in result[0]] if result else None

    done, whole = run("whole")
    assert done.returncode == 0, done.stderr[-2000:]
    done, _ = run("killed", kill=True)
    assert done.returncode == -9
    done, resumed = run("killed", resume=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(whole) == 4 and resumed == pytest.approx(whole, abs=1e-6)


def test_mistakes_are_reported_in_one_line(folder, tmp_path):
    def refused(match, **change):
        with pytest.raises(UserError, match=match) as raised:
            trainer(DPOTrainer, folder, tmp_path, **change)
        assert "\n" not in str(raised.value)

    refused("lacks rejected", data=[{"prompt": "a", "chosen": "b"}])
    refused("row 1 has one in rejected", data=[*rows(1), {"prompt": "a", "chosen": "b", "rejected": " "}])
    refused("no pair left: their prompt alone reaches max_length 4", max_length=4)
    refused(r"modpo_weight must be in \(0, 1\], got 0", modpo_weight=0)
    refused("same argument", more={"tokenizer": tiny_tokenizer()})
    small = AutoModelForCausalLM.from_pretrained(folder)
    small.resize_token_embeddings(100)
    refused("the tokenizer has 3", model=small)
    refused("ref_model must have the model's vocabulary, got 100 and 3", more={"ref_model": small})
    with pytest.warns(UserWarning, match="of 12 train pairs are dropped"):
        longest = max(len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in rows())
        trainer(DPOTrainer, folder, tmp_path, max_length=longest)


def test_tokenizer_goes_by_its_old_name(folder, tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer()
    t = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows(4)), tokenizer=tokenizer)
    assert t.processing_class is tokenizer


RANKS = """
import sys
import transformers
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
from ppo_processes import shard_by_accelerate
from test_dpo_trainer import *
if {sharded}:
    made = transformers.Trainer.create_accelerator_and_postprocess
    def sharding(self):
        made(self)
        shard_by_accelerate()
        self.is_fsdp_enabled = True
    transformers.Trainer.create_accelerator_and_postprocess = sharding
t = trainer(DPOTrainer, {folder!r}, {out!r}, max_steps=3, per_device_train_batch_size={size}, ddp_backend="gloo",
            max_packed_tokens=30, precompute_ref_log_probs={precomputed})
t.train()
assert (type(next(t.model.parameters())).__name__ == "DTensor") == {sharded}
if t.is_world_process_zero():
    print("LOSSES", *(row[name] for name in ("loss", "rewards/margins", "grad_norm") for row in logs(t)))
"""


@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param(sharded, id=name, marks=on_its_day(f"ranks: {name}"))
        for sharded, name in ((False, "DDP"), (True, "FSDP2"))
    ],
)
def test_two_processes_give_the_losses_of_one_for_the_same_global_batch(folder, tmp_path, sharded):
    tests, result = str(Path(__file__).parents[1]), []
    for ranks, size in ((1, 4), (2, 2)):
        script = tmp_path / f"run{ranks}.py"
        record = {"sharded": sharded and ranks == 2, "precomputed": ranks == 2, "out": str(tmp_path / "out")}
        script.write_text(RANKS.format(tests=tests, folder=folder, size=size, **record))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
        done = subprocess.run(torchrun, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        result.append(
            [float(x) for line in done.stdout.splitlines() if line.startswith("LOSSES") for x in line.split()[1:]]
        )
    assert len(result[0]) == 9 and result[1] == pytest.approx(result[0], abs=1e-4)


def test_the_callers_configuration_stays_as_it_is(folder, tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), report_to="none", precompute_ref_log_probs=None, use_cpu=True)
    before = config.to_dict()
    trained = DPOTrainer(
        str(folder), args=config, train_dataset=Dataset.from_list(rows(4)), processing_class=tiny_tokenizer()
    )
    assert trained.args.precompute_ref_log_probs is True
    assert config.to_dict() == before
