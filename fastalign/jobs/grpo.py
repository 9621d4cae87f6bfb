"""GRPO on several values at once: every completion is scored with every reward, and the vector becomes the
advantage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastalign._base.errors import UserError
from fastalign.data.dialogues import HUMAN
from fastalign.jobs import run as runs
from fastalign.jobs import trainers
from fastalign.jobs.ppo import inputs_of, read_lam, read_values, recorded, summary


def train_grpo(
    model: str,
    prompts: Sequence[str] | Callable[[], Sequence[str]],
    values: Sequence[Any],
    lam: Sequence[float] | Mapping[str, float],
    out: str | os.PathLike[str],
    *,
    advantage: str = "grpo",
    loss_type: str = "dapo",
    learning_rate: float = 1e-6,
    num_generations: int = 8,
    batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    num_iterations: int = 1,
    epochs: float = 1.0,
    max_steps: int | None = None,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    beta: float = 0.0,
    lora_r: int | None = None,
    chat: bool | None = None,
    dtype: str = "auto",
    seed: int = 0,
    save_steps: int = 25,
    log_steps: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
    until: Callable[[float, float], bool] | None = None,
) -> dict[str, Any]:
    """Train a model by GRPO on λ · R of groups of its own completions, into the folder `out`; see `jobs.run`.

    Args:
        prompts: the prompts, or a function that reads them, called once the other arguments are checked.
        values: m rewards, see `jobs.ppo.read_values`. lam: a weight for each, in order or by name.
        advantage: how rewards become advantages, see `losses.group_advantages`. loss_type: see `losses.grpo_loss`.
        num_generations: completions per prompt. batch_size: completions at once; batch_size ·
            gradient_accumulation_steps are a step's, a multiple of num_generations.
        num_iterations: steps on the same completions. epochs, max_steps: if given, max_steps takes precedence.
        beta: weight of the KL penalty towards the model before training.
        chat: apply the chat template; None: if there is one and no prompt is a dialogue in text.
        lora_r: train adapters of that rank, merged at the end. save_steps: steps between checkpoints.
        resume, overwrite: see `jobs.run.Run`. until: see `trainers.train`.

    Returns:
        The content of <out>/result.json: each value's mean over the first and the last tenth of the steps, with its
        standard error, and the KL where beta is not 0. <out>/log.jsonl has one line per log.

    Raises:
        UserError: one line, before anything is trained.
    """
    runs.check_counts(
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_iterations=num_iterations,
        max_steps=max_steps,
        max_new_tokens=max_new_tokens,
        seed=seed,
        save_steps=save_steps,
        log_steps=log_steps,
    )
    for name, value in (("learning_rate", learning_rate), ("epochs", epochs)):
        if not 0 < value < float("inf"):
            raise UserError(f"{name} must be positive and finite, got {value}")
    if not 0 <= beta < float("inf"):
        raise UserError(f"beta must be at least 0 and finite, got {beta}")
    step = batch_size * gradient_accumulation_steps
    if not (isinstance(num_generations, int) and num_generations >= 2 and step % num_generations == 0):
        rule = f"num_generations must be at least 2 and divide the {step} completions of a step"
        raise UserError(f"{rule}, batch_size · gradient_accumulation_steps, got {num_generations!r}")
    from fastalign.rewards import references

    scorers = read_values(values)
    names = [reward.name for reward in scorers]
    weights = read_lam(lam, names)
    adapters = runs.lora(lora_r, "CAUSAL_LM")
    prompts = prompts() if callable(prompts) else prompts
    if len(prompts) < (least := step // num_generations):
        raise UserError(f"prompts must be at least {least}, for the {step} completions of a step, got {len(prompts)}")
    settings = {
        "command": "grpo", "model": model, "values": recorded(values), "lambda": weights,
        "prompts": runs.rows_hash(prompts),
        "advantage": advantage, "loss_type": loss_type, "learning_rate": learning_rate,
        "num_generations": num_generations, "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps, "num_iterations": num_iterations, "epochs": epochs,
        "max_steps": max_steps, "max_new_tokens": max_new_tokens, "temperature": temperature, "beta": beta,
        "lora_r": lora_r, "chat": chat, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    run = runs.Run(out, settings, resume=resume, overwrite=overwrite, inputs=inputs_of(model, values))
    if run.result is not None:
        return run.result
    references.reach(scorers)
    with runs.quiet(), run:
        from fastalign.train import GRPOConfig, GRPOTrainer
        from fastalign.train.grpo_options import check_args

        with runs.one_line():
            args = GRPOConfig(
                **trainers.arguments(run, save_steps, log_steps),
                advantage=advantage, loss_type=loss_type, num_generations=num_generations,
                num_iterations=num_iterations, max_completion_length=max_new_tokens, temperature=temperature, beta=beta,
                reward_weights=weights,
            )  # fmt: skip
            check_args(args)
        loaded, tokenizer = runs.load_policy(model, dtype, run.out)
        rows = prompt_rows(prompts, tokenizer, chat)
        make = lambda callback: GRPOTrainer(  # noqa: E731
            loaded, scorers, args, rows, processing_class=tokenizer, peft_config=adapters, callbacks=[callback]
        )
        shown = {name: f"rewards/{name}/mean" for name in names} | {"KL": "kl", "loss": "loss"}
        trainer, speed = trainers.train(run, "grpo", make, shown, show_progress, until)
        runs.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.out)
    result = {
        "steps": trainer.state.global_step, "tokens": trainer._total_train_tokens, "tokens_per_second": speed
    }  # fmt: skip
    logged = [row for row in trainer.state.log_history if "reward" in row]  # not where completions are used again
    if runs.is_main() and logged:
        means = [
            {"values": {name: row[f"rewards/{name}/mean"] for name in names}, "kl": row.get("kl")} for row in logged
        ]
        result |= summary(means, names)
    return run.finish(result)


def prompt_rows(prompts: Sequence[str], tokenizer: Any, chat: bool | None) -> Any:
    """The prompts as TRL has them: messages where the chat template applies."""
    from datasets import Dataset

    if chat is None:
        chat = tokenizer.chat_template is not None and not any(HUMAN in prompt for prompt in prompts)
    if chat and tokenizer.chat_template is None:
        raise UserError("chat needs a chat template, and the model's tokenizer has none")
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        messages = getattr(prompt, "messages", None)
        if messages is not None and not chat:
            raise UserError(f"prompts: row {i} is a conversation: it needs the chat template")
        rows.append({"prompt": messages or [{"role": "user", "content": prompt}] if chat else prompt})
    return Dataset.from_list(rows)
