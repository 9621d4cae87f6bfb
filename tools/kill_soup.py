"""Kills merges and runs them again: each time the result must be the same, byte for byte.

    python tools/kill_soup.py [--kills 200] [--seed 0]

Makes two models of 12 MB and a LoRA adapter, and merges them into two outputs each: by weighted sums, by TIES, as a
stack of layers of both, and the adapter into the first model. Every other merge is killed at a random moment, the rest
once a random number of shards is finished. After every SIGKILL each file with a shard's name must be
complete, and a folder with the output's name must be complete. A process that never uses its threads forks the merges,
so that each starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROWS = [[0.5, 0.5], [0.1, 0.9]]
SHARD = "2MB"


def make_models(root: Path) -> None:
    """0.safetensors, 1.safetensors, and adapter/ of rank 2 for the first."""
    import torch
    from safetensors.torch import save_file

    from fastalign.soup.lora.made import write_adapter

    for i in range(2):
        torch.manual_seed(i)
        tensors = {f"h.{j}.weight": torch.randn(125, 200) for j in range(120)}
        save_file(tensors | {"embedded.ids": torch.arange(9)}, root / f"{i}.safetensors")
    draw = torch.Generator().manual_seed(2)
    factors = {
        f"h.{j}": (torch.randn(2, 200, generator=draw), torch.randn(125, 2, generator=draw), False)
        for j in range(0, 120, 2)
    }
    write_adapter(root / "adapter", factors, {}, {"format": "pt"})


def linear(root: Path, out: Path) -> None:
    from fastalign import soup

    soup.merge([root / "0.safetensors", root / "1.safetensors"], ROWS, out, max_shard_size=SHARD, show_progress=False)


def ties(root: Path, out: Path) -> None:
    from fastalign import soup

    base, tuned = root / "0.safetensors", root / "1.safetensors"
    options = {"method": "ties", "parameters": {"density": 0.3, "normalize": False}}
    soup.merge([tuned], [[1.0], [0.5]], out, base=base, max_shard_size=SHARD, show_progress=False, **options)


def stack(root: Path, out: Path) -> None:
    from fastalign import soup

    pieces = [(root / "0.safetensors", 0, 80), (root / "1.safetensors", 40, 120)]
    soup.merge([pieces], [[1.0], [0.5]], out, normalize=False, max_shard_size=SHARD, show_progress=False)


def lora(root: Path, out: Path) -> None:
    from fastalign import soup

    base, adapter = root / "0.safetensors", root / "adapter"
    soup.apply_adapters(base, [adapter], [[1.0], [-0.5]], out, max_shard_size=SHARD, show_progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".fastalign-work"
    }


def start(merge, root: Path, out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            merge(root, out)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def whole(merge, root: Path, out: Path) -> float:
    """The seconds of one uninterrupted merge."""
    began = time.perf_counter()
    if os.waitpid(start(merge, root, out), 0)[1] != 0:
        raise SystemExit("kill_soup: a merge that nobody killed failed")
    return time.perf_counter() - began


def wait_for(folder: Path, shards: int, pid: int) -> None:
    """Return once the folder has that many finished shards, or the process has ended."""
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while len(list(folder.rglob("*.safetensors"))) < shards and os.waitid(os.P_PID, pid, ended) is None:
        time.sleep(0)


def kill(merge, root: Path, kills: int, draw: random.Random) -> dict:
    """Kill `kills` merges and return counts. Raises AssertionError if a file that should be complete is not."""
    name = merge.__name__
    out, beside = root / f"{name}-out", root / f".{name}-out.soup"
    takes = whole(merge, root, root / name)
    wanted = files(root / name)
    count = sum(path.endswith(".safetensors") for path in wanted)
    seen = {"killed": 0, "finished": 0, "partial": 0, "shards": []}
    while seen["killed"] < kills:
        pid = start(merge, root, out)
        if seen["killed"] % 2:
            wait_for(beside, draw.randrange(1, count), pid)
        else:
            time.sleep(draw.random() * takes)
        os.kill(pid, signal.SIGKILL)
        seen["killed"] += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        shards = list(beside.rglob("*.safetensors"))
        assert all(path.read_bytes() == wanted[str(path.relative_to(beside))] for path in shards), (
            "a shard is not whole"
        )
        seen["shards"].append(len(shards))
        seen["partial"] += any(beside.rglob("*.partial"))
        if out.exists():
            assert files(out) == wanted and not beside.exists(), "the output is not what one run makes"
            shutil.rmtree(out)
            seen["finished"] += 1
    whole(merge, root, out)
    assert files(out) == wanted, "the last run's output is not what one run makes"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root)
        kinds = (linear, ties, stack, lora)
        result = {
            merge.__name__: kill(merge, root, given.kills * (i + 1) // len(kinds) - given.kills * i // len(kinds), draw)
            for i, merge in enumerate(kinds)
        }
    for name, seen in result.items():
        print(
            f"{name}: {seen['killed']} killed, {seen['partial']} of them while a file was half written, with "
            f"{len(set(seen['shards']))} different numbers of finished shards; {seen['finished']} times whole in "
            "between; always the same bytes",
            file=sys.stderr,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
