"""Distillation of candidates into a model, from file to folder: what `fastalign train distill` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import fingerprint, outputs
from fastalign._base.errors import UserError
from fastalign._base.files import check_input
from fastalign.data import palettes
from fastalign.data import rows as sources
from fastalign.data.conversations import EXTRAS, Conversation
from fastalign.data.dialogues import HUMAN
from fastalign.data.text import Text
from fastalign.jobs import pairs, trainers
from fastalign.jobs import run as runs
from fastalign.jobs.ppo import summary
from fastalign.jobs.settings import DistillOptions, DistillSettings
from fastalign.train.distill_data import weights_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DistillRows(list[dict[str, Any]]):
    """Rows of `train.DistillTrainer`. source: their name in messages; sampling: how their candidates were drawn, as
    `Candidates.settings["sampling"]` records it."""

    source: str = "rows"
    sampling: Mapping[str, Any] = {}


def read_rows(
    data: str | os.PathLike[str],
    *,
    lam: Sequence[float] | Mapping[str, float] | None = None,
    palette: str | os.PathLike[str] | None = None,
    values: Sequence[str] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> DistillRows:
    """Rows from `data`: those of a file as `train.DistillTrainer` takes them, or the candidates of a scored file, with
    the weights exp(λ · R).

    palette: a palette file as `fastalign map` writes it, for its λ. lam: a weight per reward, by name, or in the order
    of `values`, by default all rewards of the file. prompt_column, response_column: of scored candidates of another
    program, which are read as a scored file where they, lam or palette are given. Raises UserError for a scored file
    without any of these, or λ without a scored file.
    """
    if palette is not None and not (lam is None and values is None):
        raise UserError("give either values and lam, or palette")
    asked = any(x is not None for x in (lam, palette, prompt_column, response_column))
    scored = pairs.scored_of(data, prompt_column=prompt_column, response_column=response_column) if asked else None
    noted = pairs.noted_kind(data) is not None
    if scored is None and not noted:
        if not (palette is None and lam is None and values is None):
            if Path(data).suffix:  # no data set by name
                check_input(data)
            raise UserError(f"give lam or palette with a scored file only: {data} contains rows with weights")
        rows = DistillRows(sources.read(data, what="rows"))
        rows.source = str(data)
        return rows
    from fastalign.decode import Candidates

    whole = Candidates.from_parquet(data, kind="scored") if scored is None else scored
    if palette is not None:
        solution = palettes.read(palette, "lambda")
        palettes.check_carried(palette, solution, whole.rewards)
        values, lam = solution["values"], solution["lambda"]
    elif lam is None:
        raise UserError(f"give lam or palette to weigh the candidates of a scored file, which {data} is")
    names, lam = pairs.weights_by_name(lam, list(whole.rewards) if values is None else list(values))
    scores = whole.reward_array(names).astype(np.float64) @ lam  # (P, N)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    # Those of another program are texts without token ids.
    name, candidates = ("completion_ids", whole.token_ids) if noted else ("completions", whole.texts)
    rows = DistillRows(
        {"prompt": prompt, name: several, "weights": row.tolist()}
        for prompt, several, row in zip(whole.prompts, candidates, weights, strict=True)
    )
    rows.source, rows.sampling = str(data), whole.settings.get("sampling", {})
    return rows


def train_distill(
    model: str,
    rows: Sequence[Mapping[str, Any]] | Callable[[], Sequence[Mapping[str, Any]]],
    out: str | os.PathLike[str],
    *,
    warmup_steps: int | None = None,
    **options: Unpack[DistillOptions],
) -> dict[str, Any]:
    """Train a model on weighted candidates by `train.DistillTrainer`, into the folder `out`; see `jobs.run`.

    Args:
        rows: rows of `train.DistillTrainer`, or a function that reads them (`read_rows`), called once the other
            arguments are checked.
        warmup_steps: the learning rate is constant after these; None: it falls linearly to 0.
        options: see `DistillSettings`.

    Returns:
        The content of <out>/result.json: steps; the loss over the first and the last tenth of the steps, each with its
        standard error; prompts, candidates and "ess", the mean effective sample size of a prompt's candidates; tokens
        per second.

    Raises:
        UserError: one line, before anything is trained.
    """
    settings = DistillSettings(**options)
    schedule: dict[str, Any] = {}
    if warmup_steps is not None:
        schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup_steps}
    adapters = runs.lora(settings.lora_r, "CAUSAL_LM")
    rows = rows() if callable(rows) else rows
    source, sampling = getattr(rows, "source", "rows"), getattr(rows, "sampling", {})
    if not rows:
        raise UserError(f"{source}: must have at least one row, got none")
    weights = [weights_of(row, f"{source}: row {i}") for i, row in enumerate(rows)]
    record = settings.record(command="distill", model=model, rows=runs.rows_hash(rows), **schedule)
    run = runs.Run(out, record, resume=settings.resume, overwrite=settings.overwrite, inputs=[model])
    if run.result is not None:
        return run.result
    _say_which_model(source, sampling, model)
    with runs.quiet(), run:
        from fastalign.train import DistillConfig, DistillTrainer

        loaded, tokenizer = runs.load_policy(model, settings.dtype, run.out)
        encoded = _with_prompt_ids(rows, source, tokenizer, settings.chat, sampling)
        with runs.one_line():
            args = DistillConfig(**trainers.arguments(run, settings.save_steps, settings.log_steps), **schedule)
        make = partial(DistillTrainer, loaded, args, encoded, processing_class=tokenizer, peft_config=adapters)
        shown = {"loss": "loss", "ESS": "ess"}
        trainer, speed = trainers.train(run, "distill", make, shown, settings.show_progress, settings.until)
        runs.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.out)
    result = {
        "steps": trainer.state.global_step,
        "prompts": len(rows),
        "candidates": sum(map(len, weights)),
        "ess": float(np.mean([1 / (w**2).sum() for w in weights])),
        "tokens": trainer._total_train_tokens,
        "tokens_per_second": speed,
    }
    logged = [{"values": {"loss": row["loss"]}} for row in trainer.state.log_history if "loss" in row]
    if runs.is_main() and logged:
        result |= summary(logged, ["loss"])["values"]
    return run.finish(result)


def _say_which_model(source: str, sampling: Mapping[str, Any], model: str) -> None:
    drawn, content = sampling.get("model"), sampling.get("model_content")
    if drawn is not None and (drawn != model if content is None else content != fingerprint.of_model(model)):
        outputs.say(f"{source}: its candidates were drawn from another model, {drawn}, than {model}, which is trained")


def _with_prompt_ids(
    rows: Sequence[Mapping[str, Any]], source: str, tokenizer: Any, chat: bool | None, sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows with the prompts of candidates given as token ids as the sampler encoded them; prompts of texts become
    messages if `chat`."""
    wanted: bool | str = sampling.get("chat", "auto") if chat is None else chat
    prompts = [row.get("prompt") for row in rows]
    if chat is None and "chat" not in sampling and any(isinstance(one, str) and HUMAN in one for one in prompts):
        wanted = False
    text = Text(tokenizer)
    if wanted is True and not text.has_template:
        raise UserError("chat needs a chat template, and the model's tokenizer has none")
    options = {name: sampling[name] for name in EXTRAS if sampling.get(name)} if wanted else {}
    options |= options.pop("chat_template_kwargs", {})
    result = [dict(row) for row in rows]
    drawn = [row for row in result if row.get("completion_ids") is not None and row.get("prompt") is not None]
    try:
        prompt_ids = text.encode([row.pop("prompt") for row in drawn], chat=wanted, options=options) if drawn else []
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for row, ids in zip(drawn, prompt_ids, strict=True):
        row["prompt_ids"] = ids
    for row in result if wanted and text.has_template else ():
        if isinstance(prompt := row.get("prompt"), str):
            messages = prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]
            row["prompt"] = messages
    return result
