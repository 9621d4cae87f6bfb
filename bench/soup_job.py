"""The job of bench_soup.py's processes, one of them with mergekit's Python: one merge, from file to file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def job(
    kind: str, models: list[str], rows: list, method: str, density: float, out: str, flush: bool
) -> Callable[[], None]:
    """A merge by "fastalign" or "mergekit", with everything imported."""
    return (_fastalign if kind == "fastalign" else _mergekit)(models, rows, method, density, out, flush)


def _fastalign(models, rows, method, density, out, flush):
    from fastalign import soup

    options = {"base": models[0], "parameters": {"density": density}} if method == "ties" else {}

    def work():
        soup.merge(models[bool(options) :], rows, out, method=method, sync=flush, show_progress=False, **options)

    return work


def _mergekit(models, rows, method, density, out, flush):
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
                kept = zip(models[1:], row, strict=True)
                config["models"] = [
                    {"model": model, "parameters": {"weight": weight, "density": density}} for model, weight in kept
                ]
                config["base_model"] = models[0]
            else:
                kept = zip(models, row, strict=True)
                config["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in kept]
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
