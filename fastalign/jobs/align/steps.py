"""The main job from file to file: sample -> score -> map -> select -> eval. Used by the commands and the demo.

Each step reads the previous step's file, writes its own atomically, and returns what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base import fingerprint, outputs, tables
from fastalign._base.devices import check_loading
from fastalign._base.errors import UserError
from fastalign._base.files import HTML, JSON, check_ending, check_target, read_json, write_json
from fastalign._base.units import counted
from fastalign._base.work_folder import WorkFolder, hold, sha256
from fastalign.data import palettes
from fastalign.data.conversations import transcript
from fastalign.data.sampling import KNOBS, SamplingOptions, check, check_knobs, check_more, check_ray
from fastalign.decode import elsewhere
from fastalign.decode.candidates import Candidates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastalign.decode import Estimate, Worth
    from fastalign.report import Report

SIDE = {">=": 1, "<=": -1, "==": 0}  # where levels may lie
GRID_LIMIT = 10_000  # points of `evaluate_grid`


class Model:
    """A model given by a name for `Sampler.from_pretrained`, loaded once, on first use."""

    def __init__(self, name: str, *, dtype: str = "auto", device: str = "auto", backend: str = "auto"):
        self.name: str = f"vllm:{name.removeprefix('vllm:')}" if backend == "vllm" else name
        if name.startswith("vllm:") and backend not in ("auto", "vllm"):
            raise UserError(f"backend {backend} is for models that fastalign runs: leave it out for {name}")
        self.loading: dict[str, str] = {"dtype": str(dtype), "device": device, "backend": backend}
        check_loading(str(dtype), device)

    @cached_property
    def sampler(self) -> Any:
        from fastalign.decode import Sampler

        return Sampler.from_pretrained(self.name, **self.loading)

    def at(self, folder: str | Path) -> Model:
        """Another model, in a folder, loaded in the same way."""
        return Model(str(folder), dtype=self.loading["dtype"], device=self.loading["device"])

    def release(self) -> None:
        """Give its memory back; the next use loads it again."""
        vars(self).pop("sampler", None)


def sample(
    model: str | Model,
    prompts: Sequence[Any],
    out: str | Path,
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    method: str = "whole",
    palette: str | Path | None = None,
    ess: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    worker_cpus: float | None = None,
    worker_gpus: float | None = None,
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Candidates:
    """Draw n candidates per prompt into a candidates file at `out`; with `ray`, on workers: see `jobs.ray.draw`.

    model: its name, or a `Model` with dtype, device and backend. method: "whole", or one of `decode.tilted`, which
    sample with the λ of a `palette` file and write a file of another kind; ess: at which "adaptive" stops.

    Finished batches are kept in `<out>.parts`. After an interruption the same call resumes from them and gives the same
    file as an uninterrupted run; with `resume` it fails if there is nothing to resume. A finished file with the same
    settings is reused. Raises UserError if the file or the parts were made with other settings or by another model of
    the same name, unless `overwrite` is set; if another run is writing `out`; and if `out` or `<out>.parts` is an
    input, or is not ours to write.
    """
    from fastalign.data.text import check_prompts
    from fastalign.decode import tilted

    job: dict[str, Any] = {"n": n, "max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    check(job)
    check_ray(ray, workers, worker_cpus, worker_gpus)
    out, prompts = Path(out), check_prompts(prompts, sampling.get("chat", "auto"))
    model = model if isinstance(model, Model) else Model(model, dtype=dtype, device=device, backend=backend)
    settings = {
        "model": model.name,
        "dtype": model.loading["dtype"],
        **{name: value for name, value in job.items() if name not in KNOBS},
    }
    if (on := model.loading["backend"]) not in ("auto", "vllm"):
        settings["backend"] = on
    kind, by = "candidates", {}
    if method != "whole":
        if palette is None:
            raise UserError(f"give --palette with --method {method}: it uses that file's λ")
        if ray is not None:
            raise UserError(f"Ray's workers support only --method whole: leave out --ray or --method {method}")
        tilted.check(method, n=n, ess=ess, memory_limit=sampling.get("memory_limit"))
        solution = palettes.read(palette, "lambda")
        kind, by = tilted.KINDS[method], {"values": solution["values"], "lam": solution["lambda"], "ess": ess}
        settings |= {"method": method, "values": by["values"], "lambda": by["lam"], "ess": ess}
    elif ess is not None:
        raise UserError("ess applies only to --method adaptive: give that method")
    tables.check_ending(out, noted=kind == "weighted")
    settings["prompts_sha256"] = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    settings["model_content"] = fingerprint.of_model(model.name)
    check_target(out)
    outputs.not_an_input(out, [model.name, palette])
    if not overwrite and _there(out, settings):
        return Candidates.from_parquet(out)

    if repeated := len(prompts) - len(set(prompts)):
        outputs.say(f"{repeated:,} of {counted(len(prompts), 'prompt')} repeat others, and are drawn for again")

    def draw(parts: WorkFolder, finished: set[int]) -> None:
        if ray is not None:
            from fastalign.jobs import ray as scale

            scale.draw(
                {"model": model.name, **model.loading, **job},
                prompts,
                parts,
                skip=finished,
                ray=ray,
                workers=workers,
                worker_cpus=worker_cpus,
                worker_gpus=worker_gpus,
                show_progress=show_progress,
            )
        elif method == "whole":
            _keep(parts, model.sampler.iter_batches(prompts, skip=finished, show_progress=show_progress, **job))
        else:
            more: dict[str, Any] = {"skip": finished, "show_progress": show_progress, **by, **job}
            _keep(parts, tilted.blocks(method, model.sampler, prompts, **more))

    joined = Candidates.concat if method == "whole" else tilted.joined
    with _parts(out, settings, overwrite=overwrite, resume=resume) as parts:
        if not overwrite and _there(out, settings):  # made since
            return Candidates.from_parquet(out)
        whole = joined(_drawn(parts, len(prompts), kind, draw))
        whole.settings["sampling"] = settings
        whole.save(out)
    return whole


def sample_more(
    out: str | Path,
    more: int,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Candidates:
    """Add `more` candidates per prompt to a finished candidates file, with its own model and settings: the same
    candidates that a run with the larger n would have drawn (up to the rounding of the model's arithmetic).

    After an interruption the same call resumes. overwrite: remove what an interrupted run of another kind left in
    `<out>.parts`; the file's own candidates stay. Raises UserError, one line, if the file is of another kind or its
    model has changed.
    """
    out, knobs = Path(out), {"batch_size": batch_size, "memory_limit": memory_limit}
    check_more(more)
    check_knobs(knobs)
    tables.check_ending(out, noted=True)
    whole = Candidates.from_parquet(out, kind="candidates")
    had = whole.settings.get("sampling")
    if had is None or not {"model", "model_content", "n", "dtype", "max_new_tokens", "seed"} <= had.keys():
        raise UserError(f"{out}: says nothing of how it was sampled, so no more can be added")
    if fingerprint.of_model(had["model"]) != had["model_content"]:
        raise UserError(f"{out} was made with another model at {had['model']}, whose files have changed since")
    own = ("model", "n", "dtype", "backend", "prompts_sha256", "model_content")
    job = {name: value for name, value in had.items() if name not in own}
    job |= {"n": more, "first": had["n"]} | {name: value for name, value in knobs.items() if value is not None}
    model = Model(had["model"], dtype=had["dtype"], device=device, backend=had.get("backend", "auto"))

    def draw(parts: WorkFolder, finished: set[int]) -> None:
        _keep(parts, model.sampler.iter_batches(whole.prompts, skip=finished, show_progress=show_progress, **job))

    with _parts(out, {**had, "more": more}, overwrite=overwrite, resume=resume) as parts:
        if outputs.recorded(out, "sampling") != had:
            raise UserError(f"{out}: another run has written it since this one began: add to it again")
        added = Candidates.concat(_drawn(parts, len(whole.prompts), "candidates", draw))
        both = whole.joined(added)
        both.settings = {**whole.settings, "n": had["n"] + more, "sampling": {**had, "n": had["n"] + more}}
        both.save(out)
    return both


@contextmanager
def _held(out: str | Path) -> Iterator[WorkFolder]:
    """`<out>.parts`, locked against another run that writes `out`."""
    out = Path(out)
    with hold(out.with_name(out.name + ".parts"), writes=out, keeps="batches") as parts:
        yield parts


@contextmanager
def _parts(out: Path, settings: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[WorkFolder]:
    """`<out>.parts`, with the finished batches of an interrupted run with the same settings; removed when the block
    succeeds."""
    with _held(out) as parts:
        kept = parts.whole()
        if kept:
            try:
                outputs.check_same(parts.path, parts.job, settings, knobs=KNOBS)
                outputs.say(f"{out}: resuming from the {len(kept)} batches that an interrupted run finished")
            except UserError:
                if not overwrite:
                    raise
                kept = []
        elif resume:
            outputs.say(f"{out}: nothing to resume, this run begins")
        parts.begin(parts.job if kept and parts.job else settings, anew=not kept)
        yield parts
        parts.remove()


def _drawn(
    parts: WorkFolder, prompts: int, kind: str, draw: Callable[[WorkFolder, set[int]], None]
) -> list[Candidates]:
    """The parts for all prompts; `draw` draws the missing ones."""
    finished = {int(i) for path in parts.whole() for i in Candidates.from_parquet(path, kind=kind).prompt_ids}
    if len(finished) < prompts:
        draw(parts, finished)
    return [Candidates.from_parquet(path, kind=kind) for path in parts.whole()]


def _keep(parts: WorkFolder, batches: Iterable[tuple[list[int], Candidates]]) -> None:
    for indices, part in batches:
        path = parts.making(f"part-{min(indices):08d}.parquet")
        part.to_parquet(path)
        parts.made({path.name: sha256(path)})


def _there(out: Path, settings: dict) -> bool:
    """Whether `out` exists with these settings. Raises UserError if it exists with others."""
    if not out.exists():
        return False
    outputs.check_same(out, outputs.recorded(out, "sampling"), settings, knobs=KNOBS)
    outputs.say(f"{out}: already there, with the same settings")
    return True


# Of the steps that follow each takes `out` as it is where the same call made it; where it is there otherwise they
# raise UserError, unless `overwrite` is given: see `_base.outputs`.


def score(
    candidates: str | Path,
    rewards: Sequence[str],
    out: str | Path,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Candidates:
    """Score every candidate into a scored file at `out` (rewards already there are kept).

    rewards: names or references (`rewards.parse`); a local file that one names is an input of the job.
    prompt_column, response_column: of a file of another program, here and below; see `decode.elsewhere`.
    """
    from fastalign.rewards import references

    names, given = references.names(rewards), list(rewards)
    tables.check_ending(out)
    columns = elsewhere.Columns(prompt_column, response_column)
    inputs = {"candidates": candidates, **{path: path for path in references.contents(given)}}
    job = outputs.Job("score", inputs, {"rewards": given, **columns.named()})
    if (record := outputs.claim(out, job, overwrite=overwrite)) is None:
        return Candidates.from_parquet(out, kind="scored")
    from fastalign.rewards import score

    whole = elsewhere.read(candidates, kind=("candidates", "scored"), columns=columns)
    with _held(out):
        if outputs.claim(out, job, overwrite=overwrite) is None:  # made since
            return Candidates.from_parquet(out, kind="scored")
        values = score(given, *whole.pairs(), show_progress=show_progress)
        whole = whole.with_rewards(names, values)
        whole.settings["made"] = record
        whole.save(out)
    return whole


def solve_palette(
    scored: str | Path,
    out: str | Path,
    *,
    palette: str | None = None,
    quantile: float | None = None,
    values: Sequence[str] | None = None,
    joint: bool = False,
    rest: str | None = None,
    margin: float = 0.0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Solve for λ, write a palette file to `out`, and return it. plot: a folder for its figures, as SVG and PNG.

    palette (see `palette.parse_palette`) or quantile (of each value, over all candidates). values: which rewards;
    default all.
    joint: the dual log Z(λ) over all samples, which also reweights the prompts, instead of the per-prompt dual, which
    `select` realises. rest: what values not given are to reach, as in `palette.parse_palette`. margin: λ is for a point
    ("solved_for") beyond the palette by as many standard errors over the prompts, if that can be reached, so that other
    prompts reach the palette too.
    If the palette is infeasible, the file says so and contains the nearest reachable one, the groups of values that
    cannot be had together ("conflicts") and the certificate of the first, and λ is for a point just inside the nearest.
    """
    from fastalign.decode import estimate, worth
    from fastalign.palette import parse_palette, quantile_palette, solve
    from fastalign.palette.agreement import alike
    from fastalign.palette.quantile import check_quantile

    if (palette is None) == (quantile is None):
        raise UserError("give either palette or quantile")
    if quantile is not None:
        check_quantile("quantile", quantile)
    check_ending("out", out, JSON)
    columns = elsewhere.Columns(prompt_column, response_column)
    settings = {
        "palette": palette,
        "quantile": quantile,
        "values": None if values is None else list(values),
        "joint": joint,
        **({} if rest is None else {"rest": rest}),
        **({} if not margin else {"margin": margin}),
        **columns.named(),
    }
    job = outputs.Job("map", {"scored": scored}, settings)
    plot = None if plot is None else Path(plot)
    if (record := outputs.claim(out, job, overwrite=overwrite, figures=plot)) is None:
        return palettes.read(out, *palettes.WHOLE)
    whole = elsewhere.read(scored, kind="scored", columns=columns._replace(values=values))
    names = list(values or whole.rewards)
    grid = whole.reward_array(names)
    flat = np.ascontiguousarray(grid.reshape(-1, len(names)))
    groups = None if joint else np.repeat(np.arange(len(grid)), grid.shape[1])
    if palette is not None:
        target, sense = parse_palette(palette, names, flat, rest=rest)
    elif quantile is not None:
        target, sense = quantile_palette(flat, quantile), [">="] * len(names)
    solution = first = solve(flat, target, groups=groups, sense=sense)
    before = flat.mean(axis=0, dtype=np.float64)
    solved_for, free = target, _free(target, sense, flat)
    asked = [j for j, nothing in enumerate(free) if not nothing]
    for line in alike([names[j] for j in asked], grid[..., asked]):
        outputs.say(line)
    conflicts: list[list[int]] = []
    proof = first
    if first.nearest is not None:  # infeasible
        conflicts, proof = _conflicts(flat, target, groups, sense, asked, first)
        solution, solved_for = just_inside(first.nearest, flat, groups, sense)
    elif margin:
        side = np.array([0 if nothing else SIDE[each] for nothing, each in zip(free, sense, strict=True)])
        step = margin * side * np.nan_to_num(estimate(grid, first.lam, warn=False).stderr[0])
        for share in (1.0, 0.5, 0.25):
            further = solve(flat, target + share * step, groups=groups, sense=sense)
            if further.feasible and not further.nearly_infeasible:
                solution, solved_for = further, target + share * step
                break
    result = {
        "kind": "palette",
        "version": 1,
        "values": names,
        "palette": target.tolist(),
        "feasible": bool(first.feasible),
        "nearest": None if first.nearest is None else first.nearest.tolist(),
        "scaling": None if first.scaling is None else float(first.scaling),
        "conflicts": [[names[j] for j in conflict] for conflict in conflicts],
        "certificate": _certificate(proof, grid),
        "sense": sense,
        "free": free,
        "solved_for": solved_for.tolist(),
        "lambda": solution.lam.tolist(),
        "before": before.tolist(),
        "levels": solution.levels.tolist(),
        "kl": float(solution.kl),
        "ess": float(solution.ess),
        "nearly_infeasible": bool(solution.nearly_infeasible),
        "kkt_residual": float(solution.kkt_residual),
        "duality_gap": float(solution.duality_gap),
        "iterations": int(solution.iterations),
        "dual": "joint" if joint else "per_prompt",
        "n": len(flat),
        "candidates": grid.shape[1],
        "worth": worth(grid, solution.lam).to_json(),
    }
    with outputs.making(out, result, record, figures=plot):
        if plot is not None:
            from fastalign.jobs.pareto import plot_palette

            plot_palette(grid, result, plot)
    return result


def just_inside(
    nearest: np.ndarray, flat: np.ndarray, groups: np.ndarray | None, sense: Sequence[str]
) -> tuple[Any, np.ndarray]:
    """The solution for a point just inside the nearest one (m,) that the rewards `flat` (n, m) can reach, and that
    point."""
    from fastalign.palette import solve
    from fastalign.palette.feasibility import INWARD

    before = flat.mean(axis=0, dtype=np.float64)
    levels = before + INWARD * (nearest - before)
    return solve(flat, levels, groups=groups, sense=sense), levels


def _conflicts(
    flat: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray | None,
    sense: Sequence[str],
    asked: Sequence[int],
    whole: Any,
) -> tuple[list[list[int]], Any]:
    """Of an infeasible palette: the values none of which can be reached even alone, or else values that cannot be
    reached together, of which none can be left out; and the solution that proves the first of these. whole: the
    palette's own solution."""
    from fastalign.palette import solve

    def only(kept: Sequence[int]) -> Any:
        there = np.isin(np.arange(len(target)), kept)
        sides = [side if wanted else ">=" for side, wanted in zip(sense, there, strict=True)]
        return solve(flat, np.where(there, target, flat.min(axis=0)), groups=groups, sense=sides)

    single = {j: only([j]) for j in asked}
    if alone := [j for j in asked if not single[j].feasible]:
        return [[j] for j in alone], single[alone[0]]
    conflict, proof = list(asked), whole
    for j in asked:
        rest = [k for k in conflict if k != j]
        if not (found := only(rest)).feasible:
            conflict, proof = rest, found
    return [conflict], proof


def _certificate(solution: Any, grid: np.ndarray) -> dict[str, Any] | None:
    """Of an infeasible palette: weights w and a bound with Σ w·level ≤ bound < Σ w·palette for every reweighting of the
    candidates (P, N, m), if it is proved."""
    if solution.certificate is None or not np.isfinite(solution.certificate).all():
        return None
    w = np.asarray(solution.certificate, dtype=np.float64)
    bound = (grid.astype(np.float64) @ w).max(axis=1).mean()
    return {"weights": w.tolist(), "bound": float(bound)}


def _free(target: np.ndarray, sense: Sequence[str], flat: np.ndarray) -> list[bool]:
    """Whether a value has no target: no candidate is beyond its level."""
    ends = {">=": flat.min(axis=0), "<=": flat.max(axis=0)}
    return [
        side in ends and bool(level == ends[side][j]) for j, (level, side) in enumerate(zip(target, sense, strict=True))
    ]


def select(
    scored: str | Path,
    palette: str | Path,
    out: str | Path,
    *,
    k: int = 1,
    method: str = "resample",
    seed: int,
    prompt_column: str | None = None,
    response_column: str | None = None,
    overwrite: bool = False,
) -> Candidates:
    """Select k candidates per prompt under p_λ and write them to `out`; for particles, by their weights."""
    tables.check_ending(out)
    columns = elsewhere.Columns(prompt_column, response_column)
    settings = {"k": k, "method": method, "seed": seed, **columns.named()}
    job = outputs.Job("select", {"scored": scored, "palette": palette}, settings)
    if (record := outputs.claim(out, job, overwrite=overwrite)) is None:
        return Candidates.from_parquet(out, kind="selected")
    from fastalign.decode import select

    whole = elsewhere.read(scored, kind=("scored", "weighted"), columns=columns)
    solution = palettes.read(palette, "lambda")
    palettes.check_carried(palette, solution, whole.rewards)
    grid, lam = whole.reward_array(solution["values"]), np.array(solution["lambda"])
    if whole.log_weights is not None and method != "best":
        grid, lam = _weights_of(scored, whole, solution)[..., None], np.ones(1)
    picks = select(grid, lam, k=k, method=method, seed=seed)
    picked = whole.take(picks)
    picked.settings["selection"] = {
        "method": method,
        "seed": seed,
        "values": solution["values"],
        "lambda": solution["lambda"],
        "feasible": solution.get("feasible") is not False,
    }
    picked.settings["made"] = record
    picked.save(out)
    return picked


def _weights_of(path: str | Path, whole: Candidates, solution: Mapping[str, Any]) -> np.ndarray:
    """(P, N) log weights of a file of particles, which must have been drawn by this palette's λ."""
    _check_lam(f"{path}: its particles were drawn", whole.settings.get("sampling", {}), solution)
    assert whole.log_weights is not None  # of particles
    return whole.log_weights


def _check_lam(what: str, used: Mapping[str, Any], solution: Mapping[str, Any]) -> None:
    """Raises UserError unless the settings are those of this palette's λ. what: of the message, before "by"."""
    if (used.get("values"), used.get("lambda")) != (solution["values"], solution["lambda"]):
        raise UserError(f"{what} by another palette's λ, {used.get('lambda')}; give that palette")


def worth_of(solution: Mapping[str, Any], where: str = "worth") -> Worth | None:
    """What a palette file's content says of numbers of candidates, where it says so."""
    from fastalign.decode import Worth

    return None if solution.get("worth") is None else Worth.from_json(solution["worth"], where)


def predicted_need(palette: str | Path, n: int, *, prompts: int | None = None) -> str:
    """One line: the expected effective sample size of n candidates per prompt for a palette file, and how many are
    needed."""
    from fastalign.decode import needed
    from fastalign.decode.worth import TRUSTED_ESS

    solution = palettes.read(palette, "kl")
    if (worth := worth_of(solution, f"{palette}: worth")) is not None:
        return f"{palette}: {worth.tell(n, prompts=prompts)}"
    if solution.get("dual") == "joint":  # its KL is of the prompts too
        return f"{palette}: does not say how many candidates it needs; run `fastalign map` again"
    kl = solution["kl"]
    return (
        f"{palette}: KL {kl:.2f} nats: {n:,} candidates a prompt are worth at most {max(1.0, n * math.exp(-kl)):,.1f} "
        f"effective ones, {TRUSTED_ESS:.0f} need at least {needed(kl):,}; `fastalign map` again says more"
    )


def pilot(
    model: Model,
    prompts: Sequence[str],
    palette: str | Path,
    n: int,
    *,
    max_new_tokens: int,
    seed: int,
    **sampling: Unpack[SamplingOptions],
) -> str:
    """`predicted_need` from a few candidates of the model itself; sampling: as in `decode.pilot`."""
    from fastalign.decode import pilot

    solution = palettes.read(palette, "lambda")
    result = pilot(
        model.sampler,
        prompts,
        solution["values"],
        lam=solution["lambda"],
        max_new_tokens=max_new_tokens,
        seed=seed,
        **sampling,
    )
    return f"pilot: {result.worth.tell(n, prompts=len(prompts))}"


def expected(
    scored: str | Path,
    solution: Mapping[str, Any],
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
) -> Estimate:
    """The expected result of resampling with λ: an `Estimate` with one row. solution: the "values" and "lambda" of a
    palette file, or of a selected file's settings["selection"].

    For particles, by their weights; `kl` and `ess` then describe only the weights, not the distance to the model.
    """
    from fastalign.decode import estimate

    columns = elsewhere.Columns(prompt_column, response_column)
    whole = elsewhere.read(scored, kind=("scored", "weighted"), columns=columns)
    grid = whole.reward_array(solution["values"])
    if whole.log_weights is None:
        return estimate(grid, solution["lambda"], warn=False)
    grid = np.concatenate([_weights_of(scored, whole, solution)[..., None], grid], axis=2)
    result = estimate(grid, [1.0] + [0.0] * (grid.shape[2] - 1), warn=False)
    return result._replace(values=result.values[:, 1:], stderr=result.stderr[:, 1:])


def read_grid(text: str, names: Sequence[str]) -> np.ndarray:
    """(K, m) weights from "positive=0:4:5,harmless=1": start:stop:count, or a number; unnamed rewards get 0."""
    axes: dict[str, np.ndarray] = {}
    for field in text.split(","):
        name, _, span = (part.strip() for part in field.partition("="))
        if name not in names or name in axes:
            raise UserError(f"lam-grid must name rewards among {', '.join(names)}, once each, got {name!r}")
        try:
            parts = span.split(":")
            if len(parts) == 1:
                axes[name] = np.array([float(span)])
            else:
                start, stop, count = parts
                if int(count) > GRID_LIMIT:  # before it is made
                    raise UserError(f"lam-grid must have at most {GRID_LIMIT:,} points, got {int(count):,} for {name}")
                with np.errstate(invalid="ignore"):  # infinite ends are refused below
                    axes[name] = np.linspace(float(start), float(stop), int(count))
        except UserError:
            raise
        except (ValueError, OverflowError):
            raise UserError(f"lam-grid must give start:stop:count or a number for {name}, got {span!r}") from None
        if not axes[name].size or not np.isfinite(axes[name]).all():
            raise UserError(f"lam-grid must give one finite number or more for {name}, got {span!r}")
    if math.prod(len(axis) for axis in axes.values()) > GRID_LIMIT:
        raise UserError(
            f"lam-grid must have at most {GRID_LIMIT:,} points, got {' × '.join(str(len(a)) for a in axes.values())}"
        )
    columns = np.meshgrid(*(axes.get(name, np.zeros(1)) for name in names), indexing="ij")
    return np.stack([column.ravel() for column in columns], axis=1)


def evaluate_grid(
    scored: str | Path,
    lam_grid: str,
    out: str | Path,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write realised values with 95 % intervals, KL and effective sample size for each λ of a grid (`read_grid`) to a
    JSON file."""
    check_ending("out", out, JSON)
    columns = elsewhere.Columns(prompt_column, response_column)
    job = outputs.Job("eval", {"scored": scored}, {"lam_grid": lam_grid, **columns.named()})
    if (record := outputs.claim(out, job, overwrite=overwrite)) is None:
        return read_json(out, kind="lam_grid")
    from fastalign.decode import estimate
    from fastalign.decode.estimates import TRUSTED_ESS

    whole = elsewhere.read(scored, kind="scored", columns=columns)
    names = list(whole.rewards)
    estimates = estimate(whole.reward_array(names), read_grid(lam_grid, names), warn=False)
    low, high = estimates.interval(0.95)

    def numbers(row: np.ndarray) -> list[float | None]:
        return [float(x) if np.isfinite(x) else None for x in row]

    rows = [
        {
            "lambda": estimates.lam[i].tolist(),
            "values": estimates.values[i].tolist(),
            "low": numbers(low[i]),
            "high": numbers(high[i]),
            "kl": float(estimates.kl[i]),
            "ess": float(estimates.ess[i]),
            "needed": list(estimates.worth[i].needed()),
            "doubtful": bool(estimates.ess[i] < min(TRUSTED_ESS, whole.n)),
        }
        for i in range(len(estimates.lam))
    ]
    result = {
        "kind": "lam_grid",
        "version": 1,
        "values": names,
        "prompts": estimates.prompts,
        "n": estimates.n,
        "rows": rows,
    }
    result["made"] = record
    write_json(out, result)
    return result


def evaluate(
    scored: str | Path,
    selected: str | Path,
    palette: str | Path,
    out: str | Path,
    *,
    html: str | Path | None = None,
    figures: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Compare the selected texts with the palette: a JSON file at `out`, a page at `html`; returns the Report.

    figures: a folder for each figure as SVG and PNG.
    settings: additional rows for the report's table of settings.
    """
    check_ending("out", out, JSON)
    if html is not None:
        check_ending("html", html, HTML)
    if not tables.keeps_note(selected):
        rule = "must be a Parquet or Arrow file of `fastalign select`, which says which candidates were selected"
        raise UserError(f"{selected}: {rule}; a {Path(selected).suffix} file does not")
    columns = elsewhere.Columns(prompt_column, response_column)
    job = outputs.Job("eval", {"scored": scored, "selected": selected, "palette": palette}, columns.named())
    beside: dict[str, Any] = {
        "files": [] if html is None else [Path(html)],
        "figures": None if figures is None else Path(figures),
    }
    record = outputs.claim(out, job, overwrite=overwrite, **beside)
    from fastalign import report

    whole = elsewhere.read(scored, kind="scored", columns=columns)
    picked = Candidates.from_parquet(selected, kind="selected")
    assert picked.picked is not None  # of this kind
    solution = palettes.read(palette, "palette", "lambda", "levels", "kl", "ess", "feasible")
    palettes.check_carried(palette, solution, whole.rewards)
    if picked.prompts != whole.prompts:
        raise UserError(f"{selected}: its prompts are not those of {scored}")
    for texts, picks, all_texts in zip(picked.texts, picked.picked, whole.texts, strict=True):
        if list(texts) != [all_texts[j] if j < len(all_texts) else None for j in picks]:
            raise UserError(f"{selected}: its texts were not selected from {scored}")
    used = picked.settings.get("selection", {})
    if "lambda" in used:
        _check_lam(f"{selected}: its texts were selected", used, solution)
    result = report.build(
        values=solution["values"],
        rewards=whole.reward_array(solution["values"]),
        selected=picked.picked,
        palette=solution,
        prompts=[transcript(prompt) for prompt in whole.prompts],
        texts=whole.texts,
        settings={**whole.settings.get("sampling", {}), **used, **(settings or {})},
    )
    if record is None:
        return result
    with outputs.making(out, result.to_json(), record, **beside):
        if html is not None:
            result.to_html(html)
        if figures is not None:
            from fastalign.jobs.pareto import save_figures

            save_figures(result.figures(), figures)
    return result
