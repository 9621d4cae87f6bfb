"""What whole steps take of a GPU, traced without one: launches, peak memory and how often the host waits stay within
budgets. Tighten one when it is beaten."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from grpo_setup import completions_of
from grpo_setup import trainer as grpo_trainer
from small_models import build
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastalign import palette
from fastalign.models.packing import NAME, halves, packed, packed_hidden, register
from fastalign.palette import setup
from fastalign.palette.passes import DevicePass
from fastalign.train import DPOConfig, DPOTrainer, GRPOTrainer

pytest.importorskip("triton")
GB = 2**30


@pytest.fixture(scope="module")
def costs():
    path = Path(__file__).parents[2] / "tools" / "gpu_costs.py"
    spec = importlib.util.spec_from_file_location("gpu_costs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_costs"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "options, gigabytes, launches",
    [
        ({}, 1.5, 100),
        ({"budget": 4 << 30}, 3.85, 180),  # tiles kept: three products for four
        ({"frozen": True}, 0.4, 160),
        ({"backward": False}, 0.01, 12),
        ({"vocab": 131_072, "statistics": 1}, 1.35, 90),
    ],
    ids=str,
)
def test_the_fused_head_at_8192_tokens(costs, options, gigabytes, launches):
    from fastalign.bench.gpu_linear_token_logprobs import Setting, _build

    found = costs.traced(_build(Setting(**options), "meta", False).run)
    assert found.bytes < gigabytes * GB and found.launches <= launches and not found.waits


def test_what_is_freed_no_longer_counts(costs):
    x = torch.empty(1 << 20, device="meta")  # 4 MB, there before

    def run():
        y = x + 1
        del y
        z = x.view(2, -1) * 2
        return z, z.sum()

    found = costs.traced(run)
    assert found.bytes == x.nbytes + 4 and found.launches == 3
    assert costs.traced(lambda: torch.ones(3)[torch.ones(3) > 0].sum().item()).waits.total() == 2


def test_the_table_has_every_case(costs, tmp_path, capsys):
    assert costs.main(["gae", "--table", str(tmp_path / "costs.md")]) == 0
    lines = (tmp_path / "costs.md").read_text().splitlines()
    assert lines[2] == "| gae | 512 × 128 float32 | _gae 1 | 0 | 1 | 0.5 MB |" and len(lines) > 5
    assert capsys.readouterr().out.splitlines() == lines


def test_solving_a_palette(costs, monkeypatch):
    rewards = np.random.default_rng(0).normal(size=(5000, 3))
    passes, call = [], DevicePass.__call__

    def counted(self, lam):
        passes.append(1)
        return call(self, lam)

    monkeypatch.setattr(DevicePass, "__call__", counted)
    monkeypatch.setattr(setup, "ArrayPass", lambda given, **options: DevicePass(torch.from_numpy(given), **options))
    solutions = []
    found = costs.traced(lambda: solutions.append(palette.solve(rewards, [0.3, 0.2, 0.1])))
    assert solutions[0].kkt_residual < 1e-9
    assert found.kernels == {"_joint": len(passes), "_merge": len(passes)} and len(passes) <= 12
    assert found.operations.total() <= len(passes) and not found.waits


def steps(costs, trainer):
    """The costs of each training step of `trainer`."""
    found, step = [], trainer.training_step

    def traced(*args):
        result = []
        found.append(costs.traced(lambda: result.append(step(*args))))
        return result[0]

    trainer.training_step = traced
    trainer.train()
    return found


def dpo_trainer(folder, out):
    texts = ("the cat sat", " on the mat", " under a red hat")
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))] * 4
    config = DPOConfig(
        str(out), report_to=[], per_device_train_batch_size=4, use_cpu=True, bf16=False, max_steps=1,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())


def grpo(folder, out):
    return grpo_trainer(GRPOTrainer, folder, out, max_steps=1, more={"rollout_func": completions_of})


@pytest.mark.parametrize(
    "trainer, megabytes, launches, waits", [(dpo_trainer, 0.9, 380, 1), (grpo, 0.42, 520, 15)], ids=["dpo", "grpo"]
)
def test_a_training_step(costs, tmp_path, monkeypatch, trainer, megabytes, launches, waits):
    """Of a Llama of two layers and 4 pairs or 8 completions: forward and backward passes, reference, metrics. GRPO's
    waits are for rewards and advantages, on the host in a real run too, and one for the loss."""
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    folder = str(tiny_folder(tmp_path / "model", scale=3.0))
    (found,) = steps(costs, trainer(folder, tmp_path / "out"))
    assert found.kernels == {"forward_tiles": 1, "merge_tiles": 1, "gradient_tiles": 1}
    assert found.bytes < megabytes * 2**20
    assert found.launches <= launches and found.waits.total() <= waits


@pytest.mark.parametrize("name", ["llama", "mistral (window)"])
def test_a_packed_row_is_one_attention_a_layer(costs, name):
    """In bfloat16 on "meta" tensors, which run what a GPU does: as many launches for 16 pairs as for 2."""
    model = build(name).to("meta", torch.bfloat16)
    register()
    model.set_attn_implementation(NAME)
    found = []
    for pairs in (2, 2, 16):  # the first call also makes what is kept
        ids = torch.randint(3, 97, (2 * pairs, 9))
        ids[pairs:, :5] = ids[:pairs, :5]
        pack = packed(ids.numpy(), np.ones(ids.shape), halves(len(ids)), torch.device("meta"))
        found.append(costs.traced(lambda pack=pack: packed_hidden(model, pack)))
    assert found[1].launches == found[2].launches and not found[2].waits
    assert found[2].operations["_varlen_attn"] == model.config.num_hidden_layers


def test_whole_steps_of_a_llama_of_two_layers(costs, monkeypatch):
    """What the table of predictions is made of: a decoded token for 1, 8 and 64 prompts, and a packed training step."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import gpu_steps

    *decoded, trained = gpu_steps.steps("tiny")
    assert len(decoded) == 3 and len({step.launches for step in decoded}) == 1
    assert decoded[0].launches <= 13 * 2 + 22
    assert not any(step.waits for step in (*decoded, trained))
    assert trained.launches <= 380
