"""Builds fastalign._C from csrc/: each op once per instruction set, everything else for the oldest processors.

Metadata is in pyproject.toml. Without a C++ compiler that works the package is installed with its reference backend
only, and one line says so.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
OPS = [
    "gae", "layer", "linear_logprobs", "map_newton", "map_statistics", "resample", "sample_tokens", "shared_attention",
    "soup", "soup_tasks", "token_logprobs", "token_logratios",
]  # fmt: skip
COMMON = ["bindings", "isa", "soup_digest", "soup_files", "soup_io", "soup_task_files", "thread_pool"]

LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# -Wno-psabi: no function with wide vectors as arguments is called from another file.
FLAGS = ["-std=gnu++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi",
         "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas", *OPENMP]  # fmt: skip
LINK = ["-shared", "-fPIC", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
PROBE = """#include <Python.h>
#include <optional>
std::optional<int> probe() { return PY_MAJOR_VERSION; }
"""


class BuildPerLevel(build_ext):
    """Compiles what changed, in parallel, into build/objects/<level>, and links one module."""

    def run(self):
        compiler = os.environ.get("CXX") or ("g++" if shutil.which("g++") else "c++")
        if lacking := self.lacking(compiler.split()):
            print(
                f"fastalign: {lacking}: installing without the native extension. "
                "Install g++ and Python's headers and run `pip install -e .` (or reinstall) for the fast path.",
                file=sys.stderr,
            )
            self.extensions = []
            return
        self.cxx = compiler.split()
        super().run()

    def lacking(self, compiler):
        """What keeps this compiler from building the extension, found on a few lines of its kind; None where nothing.

        An error in our own sources must still fail the build.
        """
        if shutil.which(compiler[0]) is None:
            return f"no C++ compiler found ({compiler[0]})"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(PROBE)
            flags = [*FLAGS, *list(LEVELS.values())[-1], *(f"-I{path}" for path in self.include_dirs), *LINK]
            command = [*compiler, *flags, str(source), "-o", f"{folder}/probe.so"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        return f"{compiler[0]} cannot build it ({said[0].strip() if said else f'exit code {done.returncode}'})"

    def build_extension(self, ext):
        import pybind11

        includes = [f"-I{path}" for path in (*self.include_dirs, *ext.include_dirs, pybind11.get_include())]
        jobs = [(CSRC / f"{name}.cpp", "common", []) for name in COMMON]
        jobs += [
            (CSRC / f"{name}.cpp", level, [*flags, f"-DFASTALIGN_LEVEL={level}"])
            for name in OPS
            for level, flags in LEVELS.items()
        ]
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
        newest_header = max(path.stat().st_mtime for path in [*CSRC.glob("*.h"), Path(__file__)])

        def compile_one(job):
            source, level, flags = job
            target = Path("build/objects") / tag / level / f"{source.stem}.o"
            if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
                target.parent.mkdir(parents=True, exist_ok=True)
                beside = target.with_suffix(f".{os.getpid()}.o")
                self.call([*self.cxx, *FLAGS, *flags, "-fPIC", *includes, "-c", str(source), "-o", str(beside)])
                os.replace(beside, target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        self.call([*self.cxx, *LINK, *OPENMP, *objects, "-o", str(module), "-s"])

    @staticmethod
    def call(command):
        subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    setup(ext_modules=[Extension("fastalign._C", sources=[])], cmdclass={"build_ext": BuildPerLevel})
