"""The native extension under sanitizers: its tests under AddressSanitizer and UBSan, threads under ThreadSanitizer.

    python tools/sanitize.py address|undefined|thread|all [--level baseline|avx2|avx512] [--short] [--in-turn]

Builds the extension with the sanitizer for one instruction set (by default the best one available) into build/sanitize.
It is loaded instead of the installed one, in a process that loads the sanitizer's library first. First the sanitizer
must detect a planted fault. address, undefined: the CPU tests of every op, of palettes and of soups, then mutated files
(tools/fuzz_soup.py). thread: Python threads that call all ops, soups and the solver's thread pool at once, compared
with the results of a single thread. For that the extension is built without OpenMP, because ThreadSanitizer does not
see OpenMP's barriers and reports races; the thread pool then uses std::thread. --short: a part of it, in half a minute;
--in-turn: one of the three sanitizers and one of the levels, changing every day. Needs g++ with the sanitizers'
libraries (Linux).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("address", "undefined", "thread")
LIBRARY = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
FOUND = 77  # the exit status if a sanitizer reports something
TESTS = (
    "buffers", "layouts", "token_logprobs", "token_logratios", "linear_token_logprobs", "linear_sample_tokens",
    "sample_tokens", "resample", "gae", "map_statistics", "layers", "shared_prompt", "palette_native", "palette_edges",
    "soup_kernel", "soup_tasks", "soup_memory",
)  # fmt: skip
SHORT = ("buffers", "layouts")
FILES, FEW_FILES = 2000, 60


def levels() -> list[str]:
    """The levels that this processor can run, the best first."""
    from fastalign.backend import native

    return native.available_isas()[::-1] if native else ["baseline"]


def in_turn() -> tuple[str, str]:
    """The day's sanitizer and level: a different pair every day until all have had a turn."""
    pairs = [(kind, level) for level in levels() for kind in KINDS]
    return pairs[int(time.time() // 86400) % len(pairs)]


def build(kind: str, level: str) -> Path:
    """The native extension for one level with the sanitizer in it; compiles what changed."""
    import pybind11

    made = runpy.run_path(str(ROOT / "setup.py"))
    folder = ROOT / "build" / "sanitize" / f"{kind}-{level}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        *(x for x in made["FLAGS"] if x not in ("-O3", "-fopenmp")),
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fPIC",
    ]
    flags += [f"-fsanitize={kind}", *["-fno-sanitize-recover=all"] * (kind == "undefined")]
    flags += ["-DFASTALIGN_ONE_LEVEL", "-DFASTALIGN_LEVEL=baseline", *made["LEVELS"][level]]
    flags += ["-DFASTALIGN_STD_THREADS"] if kind == "thread" else made["OPENMP"]
    flags += [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    newest_header = max(
        path.stat().st_mtime for path in (*(ROOT / "csrc").glob("*.h"), ROOT / "setup.py", Path(__file__))
    )

    def compiled(name: str) -> str:
        source, target = ROOT / "csrc" / f"{name}.cpp", folder / f"{name}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*made["COMMON"], *made["OPS"]]))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [
        "g++",
        "-shared",
        f"-fsanitize={kind}",
        *([] if kind == "thread" else made["OPENMP"]),
        *objects,
        "-o",
        str(module),
    ]
    subprocess.run(link, check=True)
    return module


def run(kind: str, module: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """A Python script in a process that has the sanitizer's library first; the script calls `use_build(module)`."""
    # With the C++ library, because exceptions pass through it.
    requested = (["g++", f"-print-file-name={name}"] for name in (LIBRARY[kind], "libstdc++.so.6"))
    libraries = [subprocess.run(each, capture_output=True, text=True, check=True).stdout.strip() for each in requested]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
        "TSAN_OPTIONS": f"exitcode={FOUND}:halt_on_error=1:report_thread_leaks=0:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1" if kind == "thread" else "2",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(ROOT / "tools"))),
    }
    # ThreadSanitizer does not support randomised addresses.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    command = [*fixed, sys.executable, str(script), "--module", str(module), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def use_build(module: Path) -> None:
    """Load this build of the extension in place of the installed one."""
    import torch  # its OpenMP first  # noqa: F401

    spec = importlib.util.spec_from_file_location("fastalign._C", module)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    sys.modules["fastalign._C"] = build
    import fastalign.backend

    if fastalign.backend.native is not build:
        raise SystemExit("the sanitised extension was not loaded")


def plant(kind: str) -> None:
    """A fault in the extension's own code, which the sanitizer must detect."""
    import torch

    from fastalign.backend import native
    from fastalign.ops.buffers import buffer

    x, y = torch.zeros(1000), torch.zeros(1000)
    longer = [(*buffer(each)[:1], 1064, "float32") for each in (y, x)]
    if kind == "address":  # 64 elements too many
        native.soup_memory([longer[0]], [longer[1]], [1.0], 1)
    elif kind == "undefined":  # rows times width overflows 64 bits
        native.rms_norm(buffer(x), buffer(y), buffer(x), buffer(y), 1 << 40, 1 << 40, 1.0, 0.0, 1)
    else:  # two threads write to one address
        ins = torch.randn(1 << 22)
        out = torch.empty_like(ins)
        calls = [
            threading.Thread(target=lambda: native.soup_memory([buffer(out)], [buffer(ins)], [1.0], 1))
            for _ in range(4)
        ]
        for each in calls:
            each.start()
        for each in calls:
            each.join()


def work() -> dict[str, Callable[[], list]]:
    """Calls that many threads may make at once, on tensors that all of them read, with their results."""
    import numpy as np
    import torch

    from fastalign import ops, palette
    from fastalign.soup.stream import mix_tensors

    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    logits, labels, hidden, weight = normal(24, 500), torch.arange(24), normal(24, 16), normal(500, 16)
    rewards = normal(20_000, 3).numpy()
    levels_ = np.stack([rewards.mean(0) + 0.02 * k for k in range(6)])

    def gradients():
        x = logits.clone().requires_grad_()
        ops.token_logprobs(x, labels).sum().backward()
        return [x.grad]

    def head_gradients():
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        ops.linear_token_logprobs(x, w, labels).sum().backward()
        return [x.grad, w.grad]

    def solved(palettes, groups=None):
        result = palette.solve(rewards, palettes, groups=groups)
        return [torch.from_numpy(np.array(x)) for x in (result.lam, result.levels)]

    return {
        "token_logprobs": gradients,
        "linear_token_logprobs": head_gradients,
        "token_logratios": lambda: [ops.token_logratios(logits, logits.flip(0), labels)],
        "sample_tokens": lambda: list(ops.sample_tokens(logits, seed=1, top_p=0.9)),
        "linear_sample_tokens": lambda: list(ops.linear_sample_tokens(hidden, weight, seed=1)),
        "resample": lambda: [ops.resample(logits, 5, method="systematic", seed=1)],
        "gae": lambda: list(ops.gae(logits, logits.flip(0), logits > -9)),
        "map_statistics": lambda: list(ops.map_statistics(torch.from_numpy(rewards), torch.zeros(64, 3))),
        "one palette": lambda: solved(levels_[1]),
        "palettes": lambda: solved(levels_),
        "palettes per prompt": lambda: solved(levels_, np.arange(20_000) // 50),
        "soup": lambda: mix_tensors([logits, logits.flip(0)], [[0.25, 0.75]], torch.float32),
    }


def hammer(threads: int, rounds: int, pool: int) -> None:
    """Runs `work` in many threads at once, each with a thread pool of size `pool`; all must give the serial results."""
    import torch

    torch.set_num_threads(1)
    calls = work()
    expected = {name: [x.clone() for x in call()] for name, call in calls.items()}
    # torch's own loops use one OpenMP thread; only the extension's thread pools use more.
    for name in ("fastalign.ops.map_statistics", "fastalign.palette.native"):
        sys.modules[name].threads = lambda: pool
    failed: list[str] = []
    begin = threading.Barrier(threads)

    def several(first: int) -> None:
        torch.set_num_threads(1)
        begin.wait()
        names = list(calls)
        for turn in range(rounds * len(names)):
            name = names[(first * 5 + turn) % len(names)]
            result = calls[name]()
            if not all(torch.equal(a, b) for a, b in zip(result, expected[name], strict=True)):
                failed.append(name)

    each = [threading.Thread(target=several, args=(first,)) for first in range(threads)]
    for one in each:
        one.start()
    for one in each:
        one.join()
    if failed:
        raise SystemExit(f"gave something else beside other threads: {', '.join(sorted(set(failed)))}")


def check(kind: str, level: str, short: bool) -> str | None:
    """The fault, or None."""
    module, here = build(kind, level), Path(__file__)
    caught = run(kind, module, here, kind, "--worker", "plant")
    if caught.returncode == 0 or (
        "Sanitizer" not in caught.stderr + caught.stdout and "runtime error" not in caught.stderr
    ):
        return f"the {kind} sanitizer did not see a fault planted for it:\n{caught.stderr[-2000:]}"
    if kind == "thread":
        done = [run(kind, module, here, kind, "--worker", "hammer", *["--short"] * short)]
    else:
        done = [run(kind, module, here, kind, "--worker", "tests", *["--short"] * short)]
        fuzz = ("--worker", "fuzz", "--files", FEW_FILES if short else FILES, "--seed", int(time.time() // 86400))
        done.append(run(kind, module, here.with_name("fuzz_soup.py"), *fuzz))
    wrong = [each for each in done if each.returncode]
    return "\n".join(_told(each.stdout)[-4000:] + _told(each.stderr)[:8000] for each in wrong) or None


def _told(text: str) -> str:
    """Without the interpreter's frames, most of each stack."""
    return "\n".join(
        line for line in text.splitlines() if not re.search(r"#\d+ .* (Objects|Python|Modules|Include)/", line)
    )


def worker(name: str, kind: str, module: Path, short: bool) -> int:
    use_build(module)
    if name == "plant":
        plant(kind)
    elif name == "hammer":
        hammer(threads=4, rounds=3 if short else 40, pool=3)
    else:
        import pytest

        files = [str(*(ROOT / "tests").rglob(f"test_{each}.py")) for each in (SHORT if short else TESTS)]
        chosen = "not triton and not reference and not blocks"  # what runs in the extension
        return int(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", "-k", chosen, *files]))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=(*KINDS, "all"), default="all")
    parser.add_argument("--level", choices=("baseline", "avx2", "avx512"))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument("--worker", choices=("plant", "hammer", "tests"), help=argparse.SUPPRESS)
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker, given.kind, given.module, given.short)
    kind, level = in_turn() if given.in_turn else (given.kind, given.level or levels()[0])
    for each in KINDS if kind == "all" else (kind,):
        wrong = check(each, level, given.short)
        if wrong:
            print(f"{each} ({level}):\n{wrong}", file=sys.stderr)
            return 1
        print(f"{each} ({level}): nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
