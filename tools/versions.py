"""python tools/versions.py [NAME ...]: fastalign with other versions of torch, transformers, TRL and numpy.

Each combination is a fresh environment, into which the wheel is installed and where `versions_smoke.py` runs every seam
once. Writes docs/versions.md from docs/versions.json; combinations that are not run keep their results. `--all` also
runs those with torch builds of several GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
TORCH = "torch==2.13.0"
COMBINATIONS = {  # name -> requirements beside the wheel
    "newest": [TORCH],
    "TRL 1.15": [TORCH, "trl==1.15.*"],
    "TRL 1.14": [TORCH, "trl==1.14.*"],
    "TRL 1.13": [TORCH, "trl==1.13.*"],
    "transformers 5.24": [TORCH, "transformers==5.24.*"],
    "transformers 5.23": [TORCH, "transformers==5.23.*"],
    "transformers 5.22": [TORCH, "transformers==5.22.*"],
    "numpy 1.26": [TORCH, "numpy==1.26.*", "pyarrow<26"],  # 26 imports NumPy 2 alone
    "torch 2.9": ["torch==2.9.*"],
    "torch, newest": ["torch"],
}
LARGE = ("torch 2.9", "torch, newest")  # CUDA builds, where the platform's default is one
SHOWN = ("torch", "transformers", "trl", "numpy", "python")
TITLES = {
    "install": "TRL's trainers on our head", "dpo": "DPO", "grpo": "GRPO", "distill": "distillation",
    "reward": "reward models", "ppo": "PPO", "sampler": "sampling", "soup": "soups", "heads": "fused heads",
}  # fmt: skip
LIST = """import importlib.metadata as m, json, platform
print(json.dumps({n: m.version(n) for n in %r} | {"python": platform.python_version()}))"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(COMBINATIONS)}; default: all small ones"
    )
    parser.add_argument("--all", action="store_true", help="also those with large builds of torch")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in COMBINATIONS]:
        parser.error(f"unknown combination {unknown[0]!r}: one of {', '.join(COMBINATIONS)}")
    names = options.names or [name for name in COMBINATIONS if options.all or name not in LARGE]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)], check=True)
        (wheel,) = Path(folder).glob("fastalign-*.whl")
        for name in names:
            print(name, flush=True)
            results[name] = tried(wheel, COMBINATIONS[name], Path(folder) / "environment")
            print(json.dumps(results[name]), flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results), encoding="utf-8")
    if any(result["error"] or any(result["checks"].values()) for result in (results[name] for name in names)):
        sys.exit(1)


def tried(wheel: Path, requirements: list[str], place: Path) -> dict:
    """What runs in a fresh environment."""
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    result: dict = {"date": date.today().isoformat(), "versions": {}, "checks": {}, "error": None}
    for wanted in (
        requirements[:1],
        [*requirements, str(wheel), "trl", "peft", "datasets"],
    ):  # torch first: its build stays
        done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if done.returncode:
            return result | {"error": last_line(done.stderr)}
    listed = [name for name in SHOWN if name != "python"]
    result["versions"] = json.loads(subprocess.check_output([python, "-c", LIST % listed], text=True))
    done = subprocess.run([python, ROOT / "tools" / "versions_smoke.py"], capture_output=True, text=True)
    if done.returncode:
        return result | {"error": last_line(done.stderr)}
    return result | {"checks": json.loads(done.stdout.splitlines()[-1])}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def page(results: dict) -> str:
    """docs/versions.md."""
    head = ["combination", *SHOWN, *TITLES.values(), "tried on"]
    lines = [
        "# Versions", "",
        "What runs with which versions of other packages: `python tools/versions.py` makes an environment for each",
        "row, installs the wheel and runs every seam once on tiny models. ✓ runs; – does not, see below the table.",
        "Other versions are likely to work; these were tried.", "",
        f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}",
    ]  # fmt: skip
    notes = []
    for name in (name for name in COMBINATIONS if name in results):
        result = results[name]
        marks = ["✓" if check in result["checks"] and result["checks"][check] is None else "–" for check in TITLES]
        cells = [name, *(result["versions"].get(one, "") for one in SHOWN), *marks, result["date"]]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- {name}: {result['error']}"] * bool(result["error"])
        notes += [f"- {name}, {TITLES[check]}: {error}" for check, error in result["checks"].items() if error]
    return "\n".join([*lines, *([""] + notes if notes else []), ""])


if __name__ == "__main__":
    main()
