"""GRPO on several values at once: every completion is scored with every reward, and the vector becomes the
advantage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastalign._base.errors import UserError
from fastalign.data.dialogues import HUMAN
from fastalign.jobs import run as runs
from fastalign.jobs import trainers
from fastalign.jobs.ppo import inputs_of, read_lam, read_values, recorded, summary
from fastalign.jobs.settings import GRPOOptions, GRPOSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_grpo(
    model: str,
    prompts: Sequence[str] | Callable[[], Sequence[str]],
    values: Sequence[Any],
    lam: Sequence[float] | Mapping[str, float],
    out: str | os.PathLike[str],
    **options: Unpack[GRPOOptions],
) -> dict[str, Any]:
    """Train a model by GRPO on λ · R of groups of its own completions, into the folder `out`; see `jobs.run`.

    Args:
        prompts: the prompts, or a function that reads them, called once the other arguments are checked.
        values: m rewards, see `jobs.ppo.read_values`. lam: a weight for each, in order or by name.
        options: see `GRPOSettings`.

    Returns:
        The content of <out>/result.json: each value's mean over the first and the last tenth of the steps, with its
        standard error, and the KL where beta is not 0. <out>/log.jsonl has one line per log.

    Raises:
        UserError: one line, before anything is trained.
    """
    settings = GRPOSettings(**options)
    from fastalign.rewards import references

    scorers = read_values(values)
    names = [reward.name for reward in scorers]
    weights = read_lam(lam, names)
    adapters = runs.lora(settings.lora_r, "CAUSAL_LM")
    prompts = prompts() if callable(prompts) else prompts
    step = settings.completions
    if len(prompts) < (least := step // settings.num_generations):
        raise UserError(f"prompts must be at least {least}, for the {step} completions of a step, got {len(prompts)}")
    of = {"values": recorded(values), "lambda": weights, "prompts": runs.rows_hash(prompts)}
    record = settings.record(command="grpo", model=model, **of)
    inputs = inputs_of(model, values)
    run = runs.Run(out, record, resume=settings.resume, overwrite=settings.overwrite, inputs=inputs)
    if run.result is not None:
        return run.result
    references.reach(scorers)
    with runs.quiet(), run:
        from fastalign.train import GRPOConfig, GRPOTrainer
        from fastalign.train.grpo_options import check_args

        with runs.one_line():
            args = GRPOConfig(
                **trainers.arguments(run, settings.save_steps, settings.log_steps),
                advantage=settings.advantage, loss_type=settings.loss_type, num_generations=settings.num_generations,
                num_iterations=settings.num_iterations, max_completion_length=settings.max_new_tokens,
                temperature=settings.temperature, beta=settings.beta, reward_weights=weights,
            )  # fmt: skip
            check_args(args)
        loaded, tokenizer = runs.load_policy(model, settings.dtype, run.out)
        rows = prompt_rows(prompts, tokenizer, settings.chat)
        make = partial(GRPOTrainer, loaded, scorers, args, rows, processing_class=tokenizer, peft_config=adapters)
        shown = {name: f"rewards/{name}/mean" for name in names} | {"KL": "kl", "loss": "loss"}
        trainer, speed = trainers.train(run, "grpo", make, shown, settings.show_progress, settings.until)
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
