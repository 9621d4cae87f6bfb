"""The compile gate, the roofline and the byte counter: that they see what they are there to see. CI runs the gate and
the counter on every kernel."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from turns import on_its_day

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = on_its_day("compile_gate")
TOOLS = Path(__file__).parents[2] / "tools"

KERNELS = """
import json, sys
sys.path.insert(0, {tools!r})
import compile_gate
import torch, triton, triton.language as tl

@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    total = tl.zeros((M, N), tl.float32)
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    for first in range(0, K, STEP):
        left = tl.load(a + rows[:, None] * K + first + inner[None, :])
        right = tl.load(b + columns[:, None] * K + first + inner[None, :])
        total = tl.dot(left, right.T, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)

def launch(N, STEP, warps, stages):
    a, b = (torch.empty(size, 4096, device="meta", dtype=torch.bfloat16) for size in (128, N))
    c = torch.empty(128, N, device="meta")
    product[(1,)](a, b, c, 4096, M=128, N=N, STEP=STEP, num_warps=warps, num_stages=stages,
                  enable_fp_fusion=True)

@triton.jit
def walk(x, out, n, HEAVY: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at)
        for _ in tl.static_range(HEAVY):
            value = tl.exp2(value)
        tl.store(out + at, value)

found = dict()
import gpu_roofline
for heavy in (0, 40):
    x = torch.empty(1 << 20, device="meta")
    walked, = compile_gate.launched(
        lambda: walk[(1,)](x, x, 1 << 20, HEAVY=heavy, BLOCK=512, num_warps=4, enable_fp_fusion=True), "sm_90"
    )
    read = gpu_roofline.examine("walk", "", walked, "sm_90", None)
    found[f"walk {{heavy}}"] = (read.loop, read.per, read.share, read.unit, read.resident)
for name, shape in (("good", (64, 32, 4, 2)), ("spills", (256, 64, 1, 2)), ("shared", (256, 128, 8, 4))):
    for device in compile_gate.DEVICES:
        for kernel in compile_gate.launched(lambda: launch(*shape), device):
            report = compile_gate.inspect("product", name, kernel, device)
            found[f"{{name}} {{device}}"] = (report.faults(), report.tensor_core, report.load_bits)
before = compile_gate.page([], ["product spills 4 bytes", "walk does not compile: two\\nlines"])
triton.__version__ = "99.0"
found["page"] = compile_gate.page([report], [], before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """What the gate says of a kernel at three sizes, by "name device". In its own process, where nothing interprets."""
    script = tmp_path_factory.mktemp("gate") / "kernels.py"
    script.write_text(KERNELS.format(tools=str(TOOLS)))
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


DEVICES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@pytest.mark.parametrize("device", DEVICES)
def test_the_gate_passes_a_good_kernel(gate, device):
    faults, tensor_core, load_bits = gate[f"good {device}"]
    assert faults == []
    assert tensor_core and load_bits >= 128


@pytest.mark.parametrize("device", DEVICES)
def test_the_gate_fails_a_kernel_that_spills(gate, device):
    faults, *_ = gate[f"spills {device}"]
    assert any("spills" in fault and "product (spills)" in fault for fault in faults)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gate_fails_a_kernel_that_wants_too_much_shared_memory(gate, device):
    faults, *_ = gate[f"shared {device}"]
    assert any("shared memory" in fault for fault in faults)


def test_the_page_names_each_fault_below_its_triton(gate):
    newest, older, *faults = gate["page"].split("\n\n")[2].splitlines()
    assert newest == "- Triton 99.0: 1 kernels, 0 faults"
    assert older == f"- Triton {triton.__version__}: 0 kernels, 2 faults"
    assert faults == ["  - product spills 4 bytes", "  - walk does not compile: two"]
    assert "with Triton 99.0." in gate["page"] and "| product | product | shared | gfx950 |" in gate["page"]


def test_the_roofline_reads_a_loop_and_what_limits_it(gate):
    """A thread of 128 loads and stores 4 of 512 numbers a turn: by a few instructions, or with 160 exponentials."""
    loop, per, share, _, warps = gate["walk 0"]
    assert per % 32 == 0 and loop < per and share < 0.3 and warps == 64
    _, per, share, unit, _ = gate["walk 40"]
    # 16 a clock, while an H100's memory brings each multiprocessor 13.9 bytes.
    assert per == 32 and unit == "special" and share == pytest.approx(160 / 16 / (per / 13.9), rel=0.1)


@triton.jit
def _double(x, out, n, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    if AGAIN:
        value += tl.load(x + at, mask=at < n) - value
    tl.store(out + at, value + value, mask=at < n)


def test_bytes_are_counted_once_per_place_and_not_where_masked():
    spec = importlib.util.spec_from_file_location("bytes_moved", TOOLS / "bytes_moved.py")
    bytes_moved = importlib.util.module_from_spec(spec)
    sys.modules["bytes_moved"] = bytes_moved  # where its dataclasses look themselves up
    spec.loader.exec_module(bytes_moved)
    x = torch.randn(1000)
    for again, loaded in ((False, 4000), (True, 8000)):
        out = torch.empty_like(x)
        with bytes_moved.counted() as tally:
            _double[(4,)](x, out, 1000, AGAIN=again, BLOCK=256)
        torch.testing.assert_close(out, 2 * x)
        assert (tally.loaded, tally.stored) == (loaded, 4000)
        moved = bytes_moved.Moved("double", "", tally, 8000, streaming=True)
        assert moved.fault == again
