"""python -m bench.commits REF [pytest's arguments]: every benchmark of this checkout, with its build against that of
the commit REF.

REF is built in a temporary worktree. Each case runs in two processes, one per build, in turn (`--against`); the ratio
is REF's time over ours. A case that REF cannot run is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

HERE = Path(__file__).resolve().parent
# One process per case: other plugins would take seconds in each.
ALONE, PLUGIN = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, ("-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider")
# In the other build's process, its ends of the pipes: the number of calls to make, and the seconds per call.
questions: TextIO | None = None
answers: TextIO | None = None


def alone() -> dict[str, str]:
    """The environment for our own pytest, independent of a pytest that calls it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | ALONE


class OtherBuild:
    """The same benchmark in a process with another build of fastalign. folder: contains the package, and is named after
    the commit."""

    def __init__(self, folder: str, item: pytest.Item):
        self.name, self.errors = Path(folder).name, tempfile.TemporaryFile("w+")
        command = [sys.executable, "-W", "ignore", __file__, "--serve", f"{item.path}::{item.name}"]
        pipe, environment = subprocess.PIPE, alone() | {"PYTHONPATH": folder}
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
        )

    def seconds(self, repeats: int) -> float:
        try:
            print(repeats, file=self.process.stdin, flush=True)
            return float(self.process.stdout.readline())
        except (OSError, ValueError):
            self.errors.seek(0)
            pytest.skip(f"not at {self.name}: {self.errors.read()[-500:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def answer(seconds: Callable[[int], float]) -> None:
    """Time our call on request."""
    for repeats in questions:
        print(seconds(int(repeats)), file=answers, flush=True)


def serve(test: str) -> int:
    import fastalign.bench  # the other build's, before pytest finds this checkout's

    fastalign.bench.__path__[:] = [str(HERE)]
    from fastalign.bench import commits

    commits.questions, commits.answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what pytest prints
    return pytest.main([test, *PLUGIN, "--benchmark-disable", "-rs"])


def main(ref: str, arguments: list[str]) -> int:
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", f"{ref}^{{commit}}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if commit.returncode:
        print(f"{ref} is not a commit of this repository", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tree, build = Path(folder, "tree"), Path(folder, commit.stdout.strip())
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), ref], check=True)
        try:
            command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(build)]
            subprocess.run(command, cwd=tree, check=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
        os.environ |= ALONE
        options = [*PLUGIN, "--benchmark-only", "--benchmark-quiet", "-rs", "--against", str(build)]
        return pytest.main([str(HERE), *options, *arguments])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2]))
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m bench.commits REF [pytest's arguments]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
