"""DPO and reward models from file to folder: what `fastalign train dpo` and `fastalign train reward` run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign._base import fingerprint, outputs
from fastalign._base.errors import UserError
from fastalign._base.files import check_input, check_target, write_json
from fastalign._base.work_folder import sha256
from fastalign.data import palettes, preferences
from fastalign.data.preferences import PreferencePairs
from fastalign.jobs import pairs, trainers
from fastalign.jobs import run as runs
from fastalign.jobs.settings import DPOOptions, DPOSettings, RewardOptions, RewardSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack


def read_pairs(
    data: str | os.PathLike[str],
    *,
    lam: Sequence[float] | Mapping[str, float] | None = None,
    palette: str | os.PathLike[str] | None = None,
    values: Sequence[str] | None = None,
    how: str = "best_worst",
    pairs_per_prompt: int = 1,
    seed: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> PreferencePairs:
    """Pairs from `data`: read from a file of pairs, or made from a scored file, by λ or separately by each of some
    values.

    lam: see `pairs.preference_pairs`. palette: a palette file as `fastalign map` writes it, for its λ. values: rewards
    of a scored file, whose names become the pairs' column "value". prompt_column, response_column: of scored candidates
    of another program, which are read as a scored file where they, lam, palette or values are given. Raises UserError
    for a scored file without any of these, or λ without a scored file.
    """
    kind = pairs.noted_kind(data)
    if kind in ("candidates", "selected"):
        raise UserError(f"{data}: must hold pairs or be a fastalign scored file, got kind {kind!r}")
    runs.check_counts(pairs_per_prompt=pairs_per_prompt)
    if lam is not None and palette is not None:
        raise UserError("give either lam or palette")
    asked = any(x is not None for x in (lam, palette, values, prompt_column, response_column))
    scored = pairs.scored_of(data, prompt_column=prompt_column, response_column=response_column) if asked else None
    if values is not None and scored is not None and (lam is not None or palette is not None):
        raise UserError("give values, a head for each, or lam or palette, for one head, not both")
    if scored is None and kind != "scored":
        if lam is not None or palette is not None:
            if Path(data).suffix:  # no data set by name
                check_input(data)
            raise UserError(f"give lam or palette with a scored file only: {data} contains pairs")
        loaded = preferences.load(data)
        lacking = [name for name in values or () if not any(name in row for row in loaded)]
        if lacking and not any("value" in row for row in loaded):
            raise UserError(f"{data}: must have a column 'value', or one for each value, lacks {', '.join(lacking)}")
        return _of_published(str(data), loaded, values)
    if palette is not None:
        solution = palettes.read(palette, "lambda")
        lam = dict(zip(solution["values"], solution["lambda"], strict=True))
    making: dict[str, Any] = {"how": how, "pairs_per_prompt": pairs_per_prompt, "seed": seed}
    if values is not None:
        return pairs.pairs_by_value(scored or data, values, **making)
    if lam is None:
        raise UserError(f"give lam or palette to make pairs from a scored file, which {data} is")
    return pairs.preference_pairs(scored or data, lam=lam, **making)


def _of_published(data: str, loaded: PreferencePairs, values: Sequence[str] | None) -> PreferencePairs:
    """Of data as they are published, the pairs of these values; of the first one if none are named."""
    form = loaded.settings.get("published")
    if form is None or len(form["values"]) < 2:
        return loaded
    if values is None:
        first, *others = form["values"]
        outputs.say(f"{data}: {form['name']}: pairs of {first}; it has {', '.join(others)} too")
        rows = [{name: x for name, x in row.items() if name != "value"} for row in loaded if row["value"] == first]
    else:
        for value in values:
            if value not in form["values"]:
                known = ", ".join(form["values"])
                raise UserError(f"{data}: the values of {form['name']} are {known}, it has no {value}")
        rows = [row for row in loaded if row["value"] in values]
    if not rows:
        raise UserError(f"{data}: no row prefers one response to another in {', '.join(values or [first])}")
    return PreferencePairs(rows, loaded.dropped, loaded.settings)


def train_dpo(
    model: str,
    pairs: PreferencePairs | Callable[[], PreferencePairs],
    out: str | os.PathLike[str],
    **options: Unpack[DPOOptions],
) -> dict[str, Any]:
    """Train a model on preference pairs by DPO or one of its family into the folder `out`; see `jobs.run`.

    pairs: the pairs, or a function that reads them, called once the other arguments are checked. options: see
    `DPOSettings`.
    Returns what is in <out>/result.json: steps, the last logged loss, accuracy and margin, tokens per second.
    """
    settings = DPOSettings(**options)
    pairs = pairs() if callable(pairs) else pairs
    adapters = runs.lora(settings.lora_r, "CAUSAL_LM")
    record = settings.record(command="dpo", model=model, pairs=runs.rows_hash(pairs))
    run = runs.Run(out, record, resume=settings.resume, overwrite=settings.overwrite, inputs=[model])
    if run.result is not None:
        return run.result
    with runs.quiet(), run:
        loaded, tokenizer = runs.load_policy(model, settings.dtype, run.out)
        rows = _as_trained(pairs, tokenizer, settings.chat)
        preferences.check_lengths(rows, tokenizer, settings.max_length)
        from fastalign.train import DPOConfig, DPOTrainer

        # Otherwise TRL may load the reference by the model's name, and a merged model has none.
        merged = adapters is None and fingerprint.base_of(Path(model).expanduser()) is not None
        with runs.one_line():
            args = DPOConfig(
                **trainers.arguments(run, settings.save_steps, settings.log_steps),
                beta=settings.beta, loss_type=settings.loss_types, max_length=settings.max_length,
                precompute_ref_log_probs=settings.precompute_ref or merged or None,
            )  # fmt: skip
            dataset = PreferencePairs(rows).to_dataset()
        make = partial(
            DPOTrainer, loaded, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters
        )
        shown = {"loss": "loss", "accuracy": "rewards/accuracies"}
        trainer, speed = trainers.train(run, "dpo", make, shown, settings.show_progress, settings.until)
        runs.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.out)
    names = shown | {"margin": "rewards/margins"}
    return _finish(run, trainer, pairs, len(pairs), speed, names)


def train_reward(
    model: str,
    pairs: PreferencePairs | Callable[[], PreferencePairs],
    out: str | os.PathLike[str],
    **options: Unpack[RewardOptions],
) -> dict[str, Any]:
    """Train a Bradley–Terry reward model into the folder `out`, and evaluate it on held-out prompts.

    pairs: as in `train_dpo`. options: see `RewardSettings`.
    Returns what is in <out>/result.json; <out>/report.json has the calibration table.
    """
    settings = RewardSettings(**options)
    report = settings.report
    from fastalign.report.reward import written

    pages = [] if report is None else written(report)
    for page in pages:
        check_target(page)
    pairs = pairs() if callable(pairs) else pairs
    adapters = runs.lora(settings.lora_r, "SEQ_CLS")
    record = settings.record(command="reward", model=model, pairs=runs.rows_hash(pairs))
    run = runs.Run(out, record, resume=settings.resume, overwrite=settings.overwrite, inputs=[model])
    if run.result is not None:
        if pages and run.result.get("report") != _digests(pages):
            raise UserError(f"report is written when a run ends, and that in {out} has ended: --overwrite trains again")
        return run.result
    for page in pages:
        if page.exists() and not settings.overwrite:
            raise UserError(f"{page}: exists; --overwrite replaces it")
    with runs.quiet(), run:
        from fastalign.train import RewardConfig, RewardTrainer

        tokenizer = _tokenizer(model)
        every = PreferencePairs(_as_trained(pairs, tokenizer, settings.chat))
        preferences.check_lengths(every, tokenizer, settings.max_length)
        train, test = every.split(settings.held_out, seed=settings.seed) if settings.held_out else (every, None)
        with runs.one_line():
            args = RewardConfig(
                **trainers.arguments(run, settings.save_steps, settings.log_steps),
                values=None if settings.values is None else list(settings.values), max_length=settings.max_length,
                center_rewards_coefficient=settings.center or None, per_device_eval_batch_size=2 * settings.batch_size,
            )  # fmt: skip
            dataset = train.to_dataset()
        make = partial(
            RewardTrainer, model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters
        )
        shown = {"loss": "loss", "accuracy": "accuracy"}
        trainer, speed = trainers.train(run, "reward", make, shown, settings.show_progress, settings.until)
        more: dict[str, Any] = {}
        measured = None if test is None else trainer.report(test.to_dataset(), settings=record)
        runs.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.out)
        if measured is not None:
            heads = measured.to_json()["values"]
            more["held_out"] = [{k: v for k, v in head.items() if k != "reliability"} for head in heads]
            if runs.is_main():
                write_json(run.out / "report.json", measured.to_json())
                if report is not None:
                    measured.write(report)
                    more["report"] = _digests(pages)
    return _finish(run, trainer, pairs, len(train), speed, shown | {"margin": "margin"}, more)


def _finish(
    run, trainer, pairs, count: int, speed: float, names: dict[str, str], more: dict | None = None
) -> dict[str, Any]:
    logged = [row for row in trainer.state.log_history if "loss" in row]
    last = {name: logged[-1][column] for name, column in names.items() if logged and column in logged[-1]}
    steps = trainer.state.global_step
    result = {
        "steps": steps,
        "pairs": count,
        "dropped": pairs.dropped,
        **last,
        "tokens": trainer._total_train_tokens,
        "tokens_per_second": speed,
        **(more or {}),
    }
    return run.finish(result)


def _as_trained(pairs: PreferencePairs, tokenizer, chat: bool | None) -> list[dict[str, Any]]:
    """The pairs' three columns and the others that trainers read, as messages if `chat` asks for them."""
    if chat is None:
        chat = (
            tokenizer.chat_template is not None and pairs.settings.get("sampling", {}).get("chat", "auto") is not False
        )
        chat = chat and not any("\n\nHuman:" in row["prompt"] for row in pairs if isinstance(row["prompt"], str))
    if chat and tokenizer.chat_template is None:
        raise UserError("chat needs a chat template, and the model's tokenizer has none")
    dropped = ("chosen_score", "rejected_score")
    rows = [{k: v for k, v in row.items() if k not in dropped} for row in pairs]
    return [preferences.as_chat(row) for row in rows] if chat else rows


def _tokenizer(model: str):
    from transformers import AutoTokenizer

    from fastalign._base.quiet import one_line_errors
    from fastalign.models.loading import resolve

    folder = resolve(model)
    with one_line_errors(model):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _digests(pages: Sequence[Path]) -> dict[str, str]:
    return {page.name: sha256(page) for page in pages if page.is_file()}
