"""Every Triton kernel compiles for every target without a spill, and moves no more bytes than it must."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import fastalign.bench
import pytest
from turns import on_its_day

from fastalign import kernels

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


def test_every_kernel_has_its_tests_and_its_gpu_cases():
    cases = {module.name.removeprefix("gpu_") for module in pkgutil.iter_modules(fastalign.bench.__path__)}
    for op in kernels.names():
        assert op in cases, f"bench/gpu_{op}.py"
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert len(kernels.names()) >= 9


TOOLS = [pytest.param(f"{name}.py", marks=on_its_day(name)) for name in ("compile_gate", "bytes_moved")]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_kernel_passes(tool):
    """Both take every fourth case, other ones each day, and the gate takes each to one target: without --in-turn they
    take all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / tool, "--in-turn"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
