"""Whole jobs on an emulated GPU (emulated_gpu.py), in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytest.importorskip("triton")
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices that are written in Python", allow_module_level=True)


def test_jobs_on_a_gpu_give_what_they_give_on_the_cpu():
    """The sampler, the trainers, rewards, soups and palettes: a sixth of them each day."""
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("gpu_jobs.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("wrong", ["torch.ones(2, device='cuda') + torch.ones(2)", "float(memory(x.data_ptr()))"])
def test_the_emulated_gpu_refuses_what_a_gpu_refuses(wrong):
    code = (
        "import ctypes, torch; from emulated_gpu import emulated_gpu\n"
        "memory = lambda place: ctypes.c_float.from_address(place).value\n"
        "with emulated_gpu():\n"
        f"    x = torch.ones(2, device='cuda'); assert float((x + 1).sum()) == 4; print('so far'); {wrong}"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and done.stdout == "so far\n"
