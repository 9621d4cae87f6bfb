"""What `tools/versions.py` runs in each environment: every seam to other packages once, on tiny models. Prints a JSON
object, name of the check -> null, or the error in one line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # its tiny models
warnings.filterwarnings("ignore")

CHECKS: dict[str, Callable[[Path], Any]] = {}
PAIRS = [{"prompt": "tell me a story", "chosen": " of a fox", "rejected": " of a dog and a hat"}] * 4
ARGUMENTS: dict[str, Any] = {"max_steps": 3, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
ARGUMENTS |= {"disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


def tiny(folder: Path | None = None) -> tuple[Any, Any]:
    """folder: where TRL finds the model again."""
    import torch
    from tiny import tiny_causal_lm, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, dtype=torch.float32)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = type(model).from_pretrained(folder)
    return model, tokenizer


def moved(trainer: Any, model: Any) -> None:
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses and all(abs(loss) < 1e4 for loss in losses), losses
    assert any(not a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


@check
def install(folder: Path) -> None:
    """TRL's own DPO on our head gives the loss that it gives alone, where it runs alone: 1.15 asks for a GPU."""
    import torch
    import trl
    from datasets import Dataset

    from fastalign.integrations.trl import install, uninstall

    losses = []
    for ours in (False, True):
        if ours:
            install()
        try:
            model, tokenizer = tiny(folder / "model")
            torch.manual_seed(0)
            args = trl.DPOConfig(str(folder), **ARGUMENTS)
            trainer = trl.DPOTrainer(
                model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
            )
            moved(trainer, model)
            losses.append(trainer.state.log_history[0]["loss"])
        except (RuntimeError, AttributeError) as error:  # TRL 1.15's kernel without a GPU, or without Triton
            if ours or not ("0 active drivers" in str(error) or "no attribute 'apply'" in str(error)):
                raise
        finally:
            uninstall()
    assert max(losses) - min(losses) < 1e-4, losses


@check
def dpo(folder: Path) -> None:
    from datasets import Dataset

    from fastalign.train import DPOConfig, DPOTrainer

    model, tokenizer = tiny()
    args = DPOConfig(str(folder), **ARGUMENTS)
    moved(DPOTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer), model)


@check
def grpo(folder: Path) -> None:
    from fastalign.train import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny()
    args = GRPOConfig(str(folder), num_generations=2, max_completion_length=6, **ARGUMENTS)
    rows = [{"prompt": "tell me a story"}, {"prompt": "a red fox"}]
    lengths = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
    trainer = GRPOTrainer(model, lengths, args, rows, processing_class=tokenizer)
    moved(trainer, model)


@check
def distill(folder: Path) -> None:
    from fastalign.train import DistillConfig, DistillTrainer

    model, tokenizer = tiny()
    rows = [{"prompt": "a red", "completions": [" fox", " dog"], "weights": [1.0, 2.0]}] * 4
    moved(DistillTrainer(model, DistillConfig(str(folder), **ARGUMENTS), rows, processing_class=tokenizer), model)


@check
def reward(folder: Path) -> None:
    from datasets import Dataset

    from fastalign.train import RewardConfig, RewardTrainer

    _, tokenizer = tiny(folder / "base")
    trainer = RewardTrainer(
        str(folder / "base"), args=RewardConfig(str(folder / "out"), **ARGUMENTS),
        train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer,
    )  # fmt: skip
    moved(trainer, trainer.model)


@check
def ppo(folder: Path) -> None:
    import torch

    from fastalign.train import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    model, tokenizer = tiny()
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, learning_rate=1e-3), policy, None, tokenizer)
    queries = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("tell me", "a red fox")]
    for _ in range(3):
        drawn = trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True, top_k=0)
        stats = trainer.step(queries, list(drawn), [torch.tensor(1.0), torch.tensor(0.0)])
    assert abs(float(stats["ppo/loss/total"])) < 1e4


@check
def sampler(folder: Path) -> None:
    from fastalign.decode import Sampler

    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer)
    drawn = sampler.sample(["tell me a story", "a red fox"], n=4, max_new_tokens=6, seed=0)
    assert [len(texts) for texts in drawn.texts] == [4, 4]


@check
def soup(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fastalign import soup

    for seed in (0, 1):
        model, tokenizer = tiny()
        for weight in model.parameters():
            weight.data += seed
        model.save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
    soup.merge([folder / "0", folder / "1"], [0.5, 0.5], out=folder / "mixed")
    mixed, first = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("mixed", "0"))
    gap = next(mixed.parameters()) - next(first.parameters())
    assert abs(gap.mean().item() - 0.5) < 1e-5


@check
def heads(folder: Path) -> None:
    """The fused head of eleven architectures gives the log-probs of plain logits."""
    import small_models
    import torch

    from fastalign.integrations.transformers import fused_forward

    for name in small_models.MODELS:
        model = small_models.build(name)
        ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            found = fused_forward(model, ids, input_ids=ids)
        assert torch.allclose(found.double(), wanted.double(), atol=1e-4), name


def main() -> None:
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                function(Path(folder))
                found[name] = None
            except Exception as error:
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
