"""python gpu_jobs.py [JOB...]: whole jobs on the emulated GPU give what they give on the CPU. Without names: those of
today.

A tensor made on the wrong device, memory read from the host or an operator between two devices ends it with an error.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import quick_interpreter  # noqa: F401
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from emulated_gpu import GPU, emulated_gpu, waits
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM
from turns import by_the_day

PROMPTS = ["the cat", "tell me a story of the big red dog and the small blue fox", "why"]
CPU = torch.device("cpu")


def sampling(device: torch.device) -> Any:
    """Prompts of several lengths on the shared-prompt engine, with every option that changes the draw."""
    from fastalign.decode import Sampler
    from fastalign.decode.shared_prompt import SharedPromptEngine

    tokenizer = tiny_tokenizer()
    results = []
    for kind, options in (("llama", {"temperature": 0.8, "top_k": 20}), ("gpt2", {"top_p": 0.9}), ("mistral", {})):
        sampler = Sampler(tiny_causal_lm(tokenizer, kind=kind).to(device), tokenizer)
        assert sampler.path() is SharedPromptEngine
        drawn = sampler.sample(PROMPTS, n=3, max_new_tokens=4, seed=7, **options)
        results += [drawn.token_ids, drawn.logprobs]
    return results


def selection(device: torch.device) -> Any:
    """Candidates that are selected while they are drawn, and resampling."""
    from fastalign import rewards
    from fastalign.decode import Sampler, particles, speculative_rejection
    from fastalign.ops.resample import resample

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [len(text) / 10 for text in responses]

    tokenizer, reward = tiny_tokenizer(), rewards.from_function(score, "length")
    sampler = Sampler(tiny_causal_lm(tokenizer).to(device), tokenizer)
    options: dict[str, Any] = {"n": 4, "lam": [1.0], "max_new_tokens": 6, "checkpoints": [2, 4], "seed": 7}
    drawn = [method(sampler, PROMPTS, reward, **options) for method in (speculative_rejection, particles)]
    weights = torch.arange(24.0).reshape(3, 8).to(device)
    indices = [resample(weights, 3, method=name, seed=1) for name in ("multinomial", "gumbel_top_k", "best")]
    return [one.candidates.token_ids for one in drawn], indices


def rewards(device: torch.device) -> Any:
    """Rewards that run a model."""
    from fastalign.rewards import Implicit, LogLikelihood, from_pairwise, score

    tokenizer = tiny_tokenizer()
    models = [tiny_causal_lm(tokenizer, seed=seed, scale=3.0).to(device) for seed in range(2)]
    made = [
        LogLikelihood(model=models[0], tokenizer=tokenizer),
        Implicit(model=models[0], reference=models[1], tokenizer=tokenizer),
        from_pairwise(classifier(tokenizer).to(device).eval(), tokenizer),
    ]
    return [score(reward, PROMPTS, [" sat on the mat", " yes", " because"]) for reward in made]


def classifier(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **tokens, num_labels=1, initializer_range=0.2))


def palettes(device: torch.device) -> Any:
    from fastalign import palette

    grid = np.random.default_rng(0).normal(size=(240, 3))
    floors = [0.3, 0.2, -0.5]
    groups = np.arange(240) // 20
    values = torch.from_numpy(grid).to(device)
    return [palette.solve(values, floors, groups=g).lam for g in (None, groups)]


def soups(device: torch.device) -> Any:
    from fastalign import soup

    model, *others = [tiny_causal_lm(tiny_tokenizer(), seed=seed).to(device) for seed in range(3)]
    mixed = soup.interpolate(model, others, [0.3, 0.7])
    assert next(mixed.parameters()).device == device
    return list(mixed.parameters())


def dpo(device: torch.device) -> Any:
    from fastalign.train import DPOConfig, DPOTrainer

    rows = [{"prompt": p, "chosen": f" good {i}", "rejected": " bad and big"} for i, p in enumerate(PROMPTS * 2)]
    return trained(DPOTrainer, DPOConfig, rows, device, packs=True)


def reward_model(device: torch.device) -> Any:
    from fastalign.train import RewardConfig, RewardTrainer

    rows = [{"prompt": p, "chosen": f" good {i}", "rejected": " bad and big"} for i, p in enumerate(PROMPTS * 2)]
    return trained(RewardTrainer, RewardConfig, rows, device, model=classifier(tiny_tokenizer()))


def grpo(device: torch.device) -> Any:
    from fastalign.train import GRPOConfig, GRPOTrainer

    def length(completions: list[str], **others: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    rows = [{"prompt": p} for p in PROMPTS * 2]
    return trained(GRPOTrainer, GRPOConfig, rows, device, more={"reward_funcs": [length]}, packs=True, **options)


def distill(device: torch.device) -> Any:
    from fastalign.train import DistillConfig, DistillTrainer

    rows = [
        {"prompt_ids": [5, 6, 7 + i], "completion_ids": [[9, 8], [9, 8, 11 + i], [12]], "weights": [0.2, 1.0, 3.0]}
        for i in range(4)
    ]
    return trained(DistillTrainer, DistillConfig, rows, device)


def trained(
    trainer: Any, config: Any, rows: Any, device: torch.device, *, model=None, packs=False, more=None, **options: Any
) -> Any:
    """The losses of two steps, and the weights after them."""
    with tempfile.TemporaryDirectory() as folder:
        model = model or AutoModelForCausalLM.from_pretrained(tiny_folder(folder, scale=3.0), use_kernels=False)
        arguments = config(
            folder, use_cpu=device == CPU, bf16=False, per_device_train_batch_size=2, max_steps=2, logging_steps=1,
            learning_rate=1e-2, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        made = trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            **more or {},
        )
        assert made.accelerator.device == device
        assert not packs or made._packs
        made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert len(losses) == 2
    return losses, list(model.parameters())


def ppo(device: torch.device) -> Any:
    import ppo_setup

    made = ppo_setup.trainer(ppo_setup.policy(), **{"accelerator_kwargs": {"cpu": True}} if device == CPU else {})
    assert made.accelerator.device == device
    queries = [torch.arange(5, 5 + n) for n in (3, 7, 1, 5)]
    drawn = made.generate(queries, max_new_tokens=4, do_sample=True, top_k=0, top_p=1.0, return_prompt=False)
    stats = made.step(queries, drawn, [torch.tensor(float(len(x)) - 1) for x in drawn])
    return drawn, stats["ppo/loss/total"], [p for p in made.model.parameters() if p.requires_grad]


def align(device: torch.device) -> Any:
    """Palette in, model out: sampling, rewards, the dual, distillation, the proof."""
    from fastalign.jobs.align import job

    words = ["cat", "dog", "fox", "hat", "house", "story", "good", "bad"]
    prompts = [f"tell me a {word} {ending}" for word in words for ending in ("story", "review")]
    with tempfile.TemporaryDirectory() as folder:
        model, code = tiny_folder(Path(folder) / "model", scale=3.0), Path(folder) / "own.py"
        code.write_text(
            "def vowels(prompts, texts):\n    return [sum(c in 'aeiou' for c in text) / 4 for text in texts]\n"
        )
        result = job.align(
            str(model), prompts, [f"{code}:vowels"], "vowels>=+10%", Path(folder) / "out", how="distill", candidates=8,
            max_new_tokens=4, seed=0, budget="1000t", dtype="float32", show_progress=False, texts_per_prompt=2,
        )  # fmt: skip
        assert (Path(folder) / "out" / "report.html").exists()
    return [result["lam"]["vowels"], *(result["values"]["vowels"][name] for name in ("base", "realised", "se"))]


JOBS = {
    job.__name__: job
    for job in (sampling, selection, rewards, palettes, soups, dpo, grpo, distill, ppo, reward_model, align)
}


def on_host(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [on_host(x) for x in result]
    return result.detach().cpu() if isinstance(result, torch.Tensor) else torch.as_tensor(np.asarray(result))


# How often a job's own code may wait for the GPU (transformers waits on its own, and so does the trial of a model): one
# read for each token that is drawn; of a training step one of the batch, before its forward pass, one of the loss,
# one of the figures that are logged and one of the gradient's norm.
WAITS = {"sampling": 3 * 4, "dpo": 2 * 4, "grpo": 2 * (4 + 4), "distill": 2 * 2, "reward_model": 2 * 3}


def main() -> None:
    names = sys.argv[1:] or by_the_day(JOBS, 6)
    torch.set_num_threads(1)
    wanted = {name: on_host(JOBS[name](CPU)) for name in names}
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first device
    with emulated_gpu():
        for name in names:
            waits.clear()
            result = JOBS[name](GPU)
            own = [place for place in waits if not place.startswith(("trial.py", "packing.py"))]
            assert name not in WAITS or len(own) <= WAITS[name], f"{name}: {Counter(own)}"
            torch.testing.assert_close(
                on_host(result), wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            print(f"{name}: {dict(Counter(own))}", flush=True)


if __name__ == "__main__":
    main()
