"""PPO on several values at once: every rollout is scored with every reward, and the policy is trained on λ·R."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastalign._base import progress
from fastalign._base.error_bars import standard_error
from fastalign._base.errors import UserError
from fastalign._base.numbers import weights
from fastalign.data.dialogues import HUMAN
from fastalign.data.text import Text
from fastalign.jobs import run as runs
from fastalign.jobs.settings import PPOOptions, PPOSettings
from fastalign.jobs.trainers import steps

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Steer(Protocol):
    """Weights of the values that move with what the policy reaches. settings: JSON values that determine it.

    weights: from prompts and scores (n, m) of a step, those to train it by; may set the trainer's KL coefficient.
    result: what it adds to the run's. save, load: beside the newest of the checkpoints in `folder`.
    """

    settings: Any

    def weights(self, trainer: Any, prompts: Sequence[str], scores: np.ndarray) -> np.ndarray: ...

    @property
    def holds(self) -> bool: ...

    def result(self) -> dict[str, Any]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def read_values(values: Sequence[Any]) -> list[Any]:
    """Rewards by reference (`rewards.parse`) or as objects; a reward model's folder gives one reward per head.

    Raises UserError, one line.
    """
    from fastalign.rewards.references import load

    return list(load(values))


def inputs_of(model: str, values: Sequence[Any]) -> list[str]:
    """The model, and the files and reward models among the values: what a run must not write into."""
    from fastalign.rewards.references import contents

    return [model, *contents(values)]


def recorded(values: Sequence[Any]) -> list[str]:
    """The values as a run's settings have them: references, and objects by their names."""
    return [value if isinstance(value, str) else value.name for value in values]


def read_lam(lam: Sequence[float] | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The weights of these values, in order, given in order or by name. Raises UserError."""
    if isinstance(lam, Mapping):
        if set(lam) != set(names):
            raise UserError(f"lam must weigh each of {', '.join(names)} once, got {', '.join(lam)}")
        lam = [lam[name] for name in names]
    checked = weights(lam, len(names), ", ".join(names))
    if not checked.any():
        raise UserError("lam must not be all zero: there would be nothing to learn")
    return checked.tolist()


def train_ppo(
    model: str,
    prompts: Sequence[str] | Callable[[], Sequence[str]],
    values: Sequence[Any],
    lam: Sequence[float] | Mapping[str, float],
    out: str | os.PathLike[str],
    *,
    steer: Steer | None = None,
    **options: Unpack[PPOOptions],
) -> dict[str, Any]:
    """Train a model by PPO on λ·R of its own responses, into the folder `out`; see `jobs.run`.

    Args:
        prompts: the prompts, or a function that reads them, called once the other arguments are checked.
        values: m rewards, see `read_values`. lam: a weight for each, in order or by name.
        steer: moves the weights and the KL coefficient after every step, and begins at lam.
        options: see `PPOSettings`.

    Returns:
        The content of <out>/result.json: each value's mean over the first and the last tenth of the steps, with its
        standard error, and the KL. <out>/log.jsonl has one line per step: the mean of every value, of λ·R, the KL to
        the model before training, losses, tokens per second.

    Raises:
        UserError: one line, before anything is trained.
    """
    settings = PPOSettings(**options)
    scorers = read_values(values)
    names = [reward.name for reward in scorers]
    lam = np.array(read_lam(lam, names))
    from fastalign.jobs.stopping import Stopping
    from fastalign.rewards import references
    from fastalign.train import PPOConfig

    same = (
        "learning_rate", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "init_kl_coef",
        "seed",
    )  # fmt: skip
    config = PPOConfig(
        model_name=model,
        **{name: getattr(settings, name) for name in same},
        adap_kl_ctrl=steer is None,
        target=settings.kl_target,
        log_with=runs.board(),
        project_kwargs={"project_dir": str(out), "logging_dir": str(Path(out) / "runs")},
    )
    adapters = runs.lora(settings.lora_r, "CAUSAL_LM")
    prompts = prompts() if callable(prompts) else prompts
    if settings.chat is None and any(HUMAN in prompt for prompt in prompts):
        settings = replace(settings, chat=False)
    of = {"values": recorded(values), "lambda": lam.tolist(), "prompts": runs.rows_hash(prompts)}
    if steer is not None:
        of["steered"] = steer.settings
    record = settings.record(command="ppo", model=model, **of)
    inputs = inputs_of(model, values)
    run = runs.Run(out, record, resume=settings.resume, overwrite=settings.overwrite, inputs=inputs)
    if run.result is not None:
        return run.result
    references.reach(scorers)
    with runs.quiet(), run:
        trainer = _trainer(config, run.out, adapters, prompts, settings)
        if run.resumes:
            trainer.load_checkpoint(run.checkpoints)
            if steer is not None:
                steer.load(run.checkpoints)
        run.begin(trainer.current_step)
        total = settings.max_steps or settings.epochs * len(trainer.dataloader)
        done, show = trainer.current_step, settings.show_progress and runs.is_main()
        with (
            Stopping() as stopping,
            progress.bar("ppo", total=steps(total), unit="steps", done=done, show=show) as advance,
        ):
            tokens = _loop(trainer, scorers, lam, run, settings, advance, stopping, total, steer)
        _save(trainer, run)
    result = {"steps": trainer.current_step, "tokens": tokens}
    if steer is not None:
        result |= steer.result()
    if runs.is_main():
        result |= summary(_logged(run), names)
    return run.finish(result)


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Each value at the beginning and at the end of a run: the mean over a tenth of the steps, and its standard error;
    the KL at the end, and the speed, where the rows have them."""
    k = max(1, len(rows) // 10)

    def mean(part: Sequence[dict[str, Any]], name: str) -> list[float | None]:
        x = np.array([row["values"][name] for row in part])
        # Steps' means are independent, except for the policy's drift within the tenth; a single step has no error.
        return [float(x.mean()), float(standard_error(x)) if len(x) > 1 else None]

    table = {name: {"first": mean(rows[:k], name), "last": mean(rows[-k:], name)} for name in names}
    result: dict[str, Any] = {"values": table}
    for name, part in (("kl", rows[-k:]), ("tokens_per_second", rows)):
        if all(row.get(name) is not None for row in part):
            result[name] = float(np.mean([row[name] for row in part]))
    return result


def _loop(trainer, scorers, lam, run, settings: PPOSettings, advance, stopping, total: int, steer) -> int:
    """Train until the end; returns the tokens seen."""
    from fastalign import rewards

    started, tokens = time.perf_counter(), 0
    names, text = [reward.name for reward in scorers], Text(trainer.tokenizer)
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    until, save_steps, drawing["max_new_tokens"] = settings.until, settings.save_steps, settings.max_new_tokens
    while trainer.current_step < total:
        for batch in trainer.dataloader:
            began = time.perf_counter()
            queries = list(batch["input_ids"])
            responses = trainer.generate(queries, return_prompt=False, **drawing)
            pairs = zip(queries, responses, strict=True)
            batch["response"] = [text.continuation(query.tolist(), response.tolist()) for query, response in pairs]
            scores = rewards.score(scorers, batch["query"], batch["response"])  # (n, m)
            if steer is not None:
                lam = steer.weights(trainer, batch["query"], scores)
            combined = scores.astype(np.float64) @ lam
            stats = trainer.step(queries, responses, _tensors(combined))
            seconds = time.perf_counter() - began
            means, count = _over_processes(trainer, scores, combined, sum(map(len, queries)) + sum(map(len, responses)))
            step, tokens = trainer.current_step, tokens + count
            values = dict(zip(names, means[:-1], strict=True))
            run.log(
                {
                    "step": step,
                    "values": values,
                    "score": means[-1],
                    "kl": stats["objective/kl"],
                    "kl_coef": stats["objective/kl_coef"],
                    "loss/policy": float(stats["ppo/loss/policy"]),
                    "loss/value": float(stats["ppo/loss/value"]),
                    "entropy": float(stats["ppo/policy/entropy"]),
                    "response_tokens": stats["tokens/responses_len_mean"],
                    "seconds": seconds,
                    "tokens_per_second": count / seconds,
                }
            )
            trainer.log_stats(stats, batch, _tensors(combined))
            if trainer.config.log_with is not None:
                trainer.accelerator.log({f"values/{name}": mean for name, mean in values.items()}, step=step)
            figures = {**values, "λ·R": means[-1], "KL": stats["objective/kl"], "loss": float(stats["ppo/loss/total"])}
            said = "  ".join(f"{name} {figure:.3f}" for name, figure in figures.items())
            advance(1, f"{count / seconds:,.0f} tokens/s  {said}")
            stopped = stopping.requested(trainer.accelerator)
            if stopped or (step % save_steps == 0 and step < total):
                trainer.save_checkpoint(run.checkpoints)
                if steer is not None:
                    steer.save(run.checkpoints)
            if stopped:
                stopping.end()
            spent = until is not None and until(time.perf_counter() - started, tokens)
            if step >= total or spent or (steer is not None and steer.holds):
                return tokens
    return tokens


def _trainer(config, out: Path, adapters, prompts: Sequence[str], settings: PPOSettings):
    import torch

    from fastalign.rewards.encoding import context_length
    from fastalign.train import AutoModelForCausalLMWithValueHead, PPOTrainer

    loaded, tokenizer = runs.load_policy(config.model_name, settings.dtype, out)
    rows = prompt_rows(prompts, tokenizer, settings.chat)
    limit, new = context_length(loaded.config, tokenizer), settings.max_new_tokens
    for i, row in enumerate(rows):
        if limit is not None and len(row["input_ids"]) + new > limit:
            rule = f"prompt and max_new_tokens must fit the model's {limit} tokens"
            raise UserError(f"prompts: row {i}: {rule}, got {len(row['input_ids'])} + {new}")
    torch.manual_seed(config.seed)  # the value head is new
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(loaded, peft_config=adapters)
    return PPOTrainer(config, policy, None, tokenizer, dataset=rows)


def prompt_rows(prompts: Sequence[str], tokenizer: Any, chat: bool | None) -> list[dict[str, Any]]:
    """Rows of a PPO data set: "input_ids", with the chat template if requested, and "query", the text."""
    import torch

    encoded = Text(tokenizer).encode(prompts, chat="auto" if chat is None else chat)
    return [{"input_ids": torch.tensor(ids), "query": prompt} for ids, prompt in zip(encoded, prompts, strict=True)]


def _tensors(scores: np.ndarray) -> list:
    import torch

    return [torch.tensor(score, dtype=torch.float32) for score in scores.tolist()]


def _over_processes(trainer, scores: np.ndarray, combined: np.ndarray, tokens: int) -> tuple[list[float], int]:
    """Means of the m values and of λ·R over all processes' rollouts, and the number of their tokens."""
    import torch

    sums = np.concatenate([scores.sum(0, dtype=np.float64), [combined.sum(), len(scores), tokens]])
    sums = trainer.accelerator.reduce(torch.tensor(sums, dtype=torch.float32, device=trainer.accelerator.device), "sum")
    *totals, rows, count = sums.tolist()
    return [total / rows for total in totals], int(count)


def _save(trainer, run) -> None:
    """Save the policy as a plain language model, with the value head beside it for PPO's own from_pretrained."""
    from fastalign.train.value_head import save_value_head

    if not trainer.is_peft_model:
        trainer.save_pretrained(run.out)
        return
    policy = trainer.policy
    if runs.is_main():
        runs.save(policy.pretrained_model, trainer.tokenizer, run.out)
        save_value_head({f"v_head.{name}": x for name, x in policy.v_head.state_dict().items()}, run.out)
    trainer.accelerator.wait_for_everyone()


def _logged(run) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in run.logs.read_text(encoding="utf-8").splitlines()]
