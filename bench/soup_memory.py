"""Memory of a merge from a 0.3 GB model to a 12 GB one, anonymous pages and page cache apart; and its speed from a
cold disk.

    python bench/soup_memory.py [--sizes 0.3,1.2,12] [--cold 1.2] [--folder DIR] [--out bench/results/soup_memory.json]

Creates models in shards of 4 GB, one of random bfloat16 numbers and one of holes (zeros that take no disk space),
merges them in a separate process, and removes them: --folder needs twice the largest size. Before each merge the inputs
are dropped from the page cache. In turn with the merge, on two models without holes, the disk's own rate is measured by
a loop that reads, writes and flushes the same number of bytes and computes nothing; the bar is 70 % of it. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

BAR = 0.7  # of the disk's rate
ROUNDS = 3
BLOCK = 1 << 24
SHARD = 4_000_000_000
LAYERS, PARTS = 32, 7  # a large embedding, then this many equal matrices per layer


def tensors(nbytes: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and shapes of a bfloat16 model of about this many bytes."""
    width = 1024
    rows = nbytes // 2 // width
    each = int(rows * 0.92) // (LAYERS * PARTS)
    result = [("embed.weight", "BF16", (rows - each * LAYERS * PARTS, width))]
    return result + [(f"layers.{i}.{j}.weight", "BF16", (each, width)) for i in range(LAYERS) for j in range(PARTS)]


def make_model(folder: Path, nbytes: int, *, holes: bool) -> None:
    """Shards and index, of random numbers (the same 16 MB over and over) or of holes."""
    import torch

    from fastalign._base.files import write_json
    from fastalign.soup.checkpoint import INDEX, index_of, lay_out

    folder.mkdir(parents=True)
    block = torch.randn(BLOCK // 2, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8).numpy()
    layout = lay_out(tensors(nbytes), SHARD)
    for shard in layout:
        with open(folder / shard.file, "wb") as file:
            file.write(shard.header({"format": "pt"}))
            if holes:
                file.truncate(file.tell() + shard.nbytes)
                continue
            for first in range(0, shard.nbytes, BLOCK):
                file.write(block[: min(BLOCK, shard.nbytes - first)])
            file.flush()
            os.fsync(file.fileno())
    if len(layout) > 1:
        write_json(folder / INDEX, index_of(layout))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def meminfo(name: str) -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous pages, and of mapped file pages."""
    result = {"RssAnon": 0, "RssFile": 0}
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                name = line.partition(":")[0]
                if name in result:
                    result[name] = int(line.split()[1]) * 1024
    except OSError:
        pass
    return result["RssAnon"], result["RssFile"]


def merge(inputs: list[Path], out: Path) -> dict:
    """One merge in its own process: seconds, and peaks above the process's memory before it began."""
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", *map(str, inputs), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit("soup_memory: the merge did not start")
    before, cached = resident(worker.pid), meminfo("Cached")
    peaks, cache = list(before), cached
    worker.stdin.write("go\n")
    worker.stdin.flush()
    while worker.poll() is None:
        peaks = [max(pair) for pair in zip(peaks, resident(worker.pid), strict=True)]
        cache = max(cache, meminfo("Cached"))
        time.sleep(0.005)
    if worker.returncode:
        raise SystemExit("soup_memory: the merge failed")
    return {
        "seconds": float(worker.stdout.read().split()[-1]),
        "anonymous_mb": (peaks[0] - before[0]) / 1e6,
        "mapped_mb": (peaks[1] - before[1]) / 1e6,
        "page_cache_mb": (cache - cached) / 1e6,
    }


def worker(inputs: list[str], out: str) -> None:
    import torch

    from fastalign import soup

    # Threads and their stacks are not counted for the merge.
    soup.mix([{"x": torch.ones(1 << 20)}] * 2, [0.5, 0.5])
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    soup.merge(inputs, [0.5, 0.5], out, show_progress=False)
    print(time.perf_counter() - began)


def copy(inputs: list[Path], target: Path) -> float:
    """Seconds of a merge's disk work alone: read all inputs, write one of them, flush."""
    target.mkdir()
    began = time.perf_counter()
    for names in zip(*(sorted(one.glob("*.safetensors")) for one in inputs), strict=True):
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)) for path in names]
            into = stack.enter_context(open(target / names[0].name, "wb", buffering=0))
            while any(data := [file.read(BLOCK) for file in files]):
                into.write(data[0])
            os.fsync(into.fileno())
    return time.perf_counter() - began


def cold(root: Path, nbytes: int) -> dict:
    """Merge and plain copy in turn, both with their input out of the page cache."""
    inputs = [root / "a", root / "b"]
    times: dict[str, list[float]] = {"merge": [], "copy": [], "read": []}
    for turn in range(ROUNDS):
        for what in ("merge", "copy") if turn % 2 else ("copy", "merge"):
            os.sync()
            forget(root)
            out = root / "out"
            times[what].append(merge(inputs, out)["seconds"] if what == "merge" else copy(inputs, out))
            shutil.rmtree(out)
        forget(root)
        began = time.perf_counter()
        for path in root.rglob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass
        times["read"].append(time.perf_counter() - began)
    shares = [c / m for c, m in zip(times["copy"], times["merge"], strict=True)]
    return {
        "gb": nbytes / 1e9,
        "seconds": times,
        "share_of_copy": statistics.median(shares),
        "shares": shares,
        "bar": BAR,
        "read_gb_s": 2 * nbytes / 1e9 / statistics.median(times["read"]),
        "copy_gb_s": 3 * nbytes / 1e9 / statistics.median(times["copy"]),
    }


def models(root: Path, nbytes: int, *, holes: bool) -> Iterator[None]:
    make_model(root / "a", nbytes, holes=False)
    make_model(root / "b", nbytes, holes=holes)
    yield
    shutil.rmtree(root / "a")
    shutil.rmtree(root / "b")


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:-1], sys.argv[-1])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.3,1.2,12", help="of one model, in GB")
    parser.add_argument(
        "--cold", type=float, default=1.2, help="GB of the model that the disk's rate is taken with; 0 leaves it out"
    )
    parser.add_argument("--folder", type=Path, help="default a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soup_memory.json")
    given = parser.parse_args()
    from fastalign._base.files import write_json

    rows, disk = [], None
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        for size in (float(x) for x in given.sizes.split(",")):
            nbytes = int(size * 1e9)
            for _ in models(root, nbytes, holes=True):
                os.sync()
                forget(root)
                rows.append({"gb": size, **merge([root / "a", root / "b"], root / "out")})
                shutil.rmtree(root / "out")
                print(
                    f"two models of {size:g} GB: {rows[-1]['seconds']:.1f} s, anonymous "
                    f"{rows[-1]['anonymous_mb']:.0f} MB, mapped {rows[-1]['mapped_mb']:.0f} MB, page cache grew by "
                    f"{rows[-1]['page_cache_mb']:.0f} MB",
                    flush=True,
                )
        if given.cold:
            nbytes = int(given.cold * 1e9)
            for _ in models(root, nbytes, holes=False):
                disk = cold(root, nbytes)
    anonymous = [row["anonymous_mb"] for row in rows]
    print(f"anonymous memory, largest model against smallest: {anonymous[-1]:.0f} against {anonymous[0]:.0f} MB")
    if disk:
        verdict = "met" if disk["share_of_copy"] >= BAR else "MISSED"
        print(
            f"from a cold disk: {disk['share_of_copy']:.0%} of the disk's rate ({disk['copy_gb_s']:.2f} GB/s read and "
            f"written, reading alone {disk['read_gb_s']:.2f} GB/s); bar {BAR:.0%} {verdict}"
        )
    result = {
        "what": "memory and cold-disk rate of a linear merge of two models",
        "memory": rows,
        "cold": disk,
        "memory_limit": "512MB",
        "machine": platform.machine(),
        "threads": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(given.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
