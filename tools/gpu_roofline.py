"""Predicts each Triton kernel's speed from its machine code, for GPUs that need not be present: docs/gpu_roofline.md.

    python tools/gpu_roofline.py [OP ...] [--target sm_90 ...] [--page FILE]

A kernel is compiled as the compile gate does it. Of its machine code the loop is read that moves the most bytes, or
that multiplies: how many clocks of a multiprocessor its instructions take, by the unit that is busiest with them,
against the clocks in which the memory brings its bytes, or the tensor cores make its products. Below 1 the memory, or
the tensor cores, are the limit; above it the instructions are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import compile_gate  # first: it turns Triton's interpreter off
import gpu_costs
import triton
from triton.runtime.jit import JITFunction

from fastalign._base.files import atomic_write


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets and CUDA's tables of throughput: bytes/s of memory, dense bfloat16 operations/s, clock
    in Hz, multiprocessors, bytes of shared memory of one, and how many lanes of each unit of one work in a clock."""

    name: str
    bandwidth: float
    products: float
    clock: float
    processors: int
    shared: int
    lanes: dict[str, int]


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 2.04e12, 312e12, 1.41e9, 108, 164 << 10,
                 {"issue": 128, "FP32": 64, "integer": 64, "FP64": 32, "special": 16}),
    "sm_90": Gpu("H100 SXM", 3.35e12, 989e12, 1.83e9, 132, 228 << 10,
                 {"issue": 128, "FP32": 128, "integer": 64, "FP64": 64, "special": 16}),
    "sm_100": Gpu("B200", 8.0e12, 2250e12, 1.85e9, 148, 228 << 10,
                  {"issue": 128, "FP32": 128, "integer": 64, "FP64": 64, "special": 16}),
}  # fmt: skip
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
UNITS = {
    "special": r"MUFU|F2F|F2I|I2F",
    "FP64": r"DADD|DMUL|DFMA|DSETP|DMNMX",
    "FP32": r"FADD2?|FMUL2?|FFMA2?",
    "integer": r"IADD3?|IADD64|VIADD\w*|LOP3|ISETP|SEL|FSEL|FMNMX3?|FSETP|SHF|PRMT|IMNMX|VIMNMX\w*|LEA|IMAD",
}
PRODUCTS = r"HMMA|HGMMA|UTCHMMA|QGMMA|IMMA|DMMA"
LAUNCH = 5e-6  # seconds of the host
TF32 = 1 / 6  # of bfloat16's rate: half of it, and three products for one


@dataclass(frozen=True)
class Kernel:
    """loop: instructions; per: what one turn of it moves or makes, in bytes of a thread or operations of a block;
    share: the clocks that its instructions take over those that its bytes or products take, None if it has neither."""

    op: str
    case: str
    device: str
    name: str
    loop: int
    per: int
    products: bool
    share: float | None
    unit: str
    rate: float  # of its products against bfloat16's
    registers: int
    spills: int
    warps: int
    resident: int
    limit: str


@dataclass(frozen=True)
class Case:
    """One case on one device: seconds, and by what."""

    op: str
    name: str
    device: str
    bytes: int
    flops: int
    launches: int
    peak: int
    seconds: float
    limit: str


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    return [(int(address, 16), text.strip()) for address, text in found if not text.strip().startswith("NOP")]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop: from where a branch goes back to, to the branch."""
    place = {address: i for i, (address, _) in enumerate(code)}
    result = []
    for i, (address, text) in enumerate(code):
        to = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if to and int(to[1], 16) < address and int(to[1], 16) in place:
            result.append([text for _, text in code[place[int(to[1], 16)] : i + 1]])
    return result


def mnemonic(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def moved(body: list[str]) -> int:
    """Bytes of global memory that one thread loads and stores."""
    total = 0
    for name in map(mnemonic, body):
        if re.match(r"(LDG|LDGSTS|STG)\b", name):
            size = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", name)
            total += int(size[1] or size[2]) // 8 if size else 4
    return total


def clocks(body: list[str], gpu: Gpu) -> dict[str, float]:
    """Of a multiprocessor, in which a warp's instructions pass each of its units."""
    names = Counter(mnemonic(text).split(".")[0] for text in body)
    counts = {"issue": names.total()}
    for unit, pattern in UNITS.items():
        counts[unit] = sum(count for name, count in names.items() if re.fullmatch(pattern, name))
    return {unit: 32 * count / gpu.lanes[unit] for unit, count in counts.items()}


def examine(op: str, case: str, kernel, device: str, width: int | None) -> Kernel:
    """width: over how much a product of this launch sums, if that is known."""
    gpu, report = GPUS[device], compile_gate.inspect(op, case, kernel, device)
    code = instructions(compile_gate.dumped(kernel.asm["cubin"], "sass"))
    whole = [text for _, text in code]
    found = loops(code) or [whole]
    multiplying = [body for body in found if any(re.match(PRODUCTS, mnemonic(text)) for text in body)]
    rate, share, unit, per = 1.0, None, "", 0
    if multiplying:
        body = min(multiplying, key=len)  # the innermost
        size = constants(kernel)
        per = 2 * size["BLOCK_M"] * size["BLOCK_N"] * size["BLOCK_K"]
        rate = TF32 if str(size.get("DOT")) == "fp32" else 1.0
        needed = clocks(body, gpu)
        if width:  # what surrounds the loop, once a tile
            turns = width / size["BLOCK_K"]
            needed = {
                name: needed[name] + (all_of - needed[name]) / turns for name, all_of in clocks(whole, gpu).items()
            }
        unit = max(needed, key=lambda name: needed[name])
        share = report.warps * needed[unit] / (per / (rate * gpu.products / gpu.processors / gpu.clock))
    else:
        body = max(found, key=lambda body: (moved(body), -len(body)))
        body = body if moved(body) else whole
        per, needed = moved(body), clocks(body, gpu)
        unit = max(needed, key=lambda name: needed[name])
        if per:
            share = needed[unit] / (32 * per / (gpu.bandwidth / gpu.processors / gpu.clock))
    resident, limit = occupancy(report, gpu)
    return Kernel(
        op, case, device, report.kernel, len(body), per, bool(multiplying), share, unit, rate, report.registers,
        report.spills, report.warps, resident, limit,
    )  # fmt: skip


def constants(kernel) -> dict[str, object]:
    """The kernel's compile-time arguments by name."""
    names = kernel.src.fn.arg_names
    return {names[key[0]] if isinstance(key, tuple) else key: value for key, value in kernel.src.constants.items()}


def occupancy(report: compile_gate.Report, gpu: Gpu) -> tuple[int, str]:
    """Warps that a multiprocessor holds at a time, and by what that is limited."""
    blocks = {
        "registers": REGISTERS // (-(-report.registers // 8) * 8 * 32 * report.warps),
        "shared memory": gpu.shared // (report.shared + 1024),
        "warps": WARPS // report.warps,
        "blocks": BLOCKS,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * report.warps, limit


def predictions(ops: list[str], device: str) -> tuple[list[Kernel], list[Case]]:
    """Of every case of the ops (default: all) on one device; each distinct kernel once."""
    from fastalign.bench.gpu_common import cases

    gpu, kernels, result = GPUS[device], {}, []
    widths: list[int | None] = []
    launch = JITFunction.run

    def recorded(self, *args, **options):
        widths.append(options.get("width"))
        return launch(self, *args, **options)

    for op, case in cases():
        if ops and op not in ops:
            continue
        work = case.build("meta", False)
        widths.clear()
        JITFunction.run = recorded
        try:
            launched = compile_gate.launched(work.run, device)
        finally:
            JITFunction.run = launch
        for kernel, width in zip(launched, widths, strict=True):
            if kernel.hash not in kernels:
                kernels[kernel.hash] = examine(op, case.name, kernel, device, width)
        mine = [kernels[kernel.hash] for kernel in launched]
        result.append(predicted(op, case.name, work, mine, gpu_costs.traced(work.run, int(device[3:])), device, gpu))
    return list(kernels.values()), result


def predicted(op, name, work, kernels: list[Kernel], costs: gpu_costs.Traced, device: str, gpu: Gpu) -> Case:
    limits = {"memory": work.bytes / gpu.bandwidth}
    multiplying, others = ([k for k in kernels if k.products == products] for products in (True, False))
    if work.flops:  # by the library too
        limits["tensor cores"] = work.flops / gpu.products / min((k.rate for k in multiplying), default=1.0)
        largest = max((k.per for k in multiplying), default=0)  # the others' products are thin
        multiplying = [k for k in multiplying if k.per == largest]
    for what, some in (("memory", others), ("tensor cores", multiplying)):
        slowest = max(some, key=lambda k: k.share or 0, default=None)
        if slowest and what in limits and (slowest.share or 0) > 1:
            limits[f"{slowest.unit} in {slowest.name}"] = limits[what] * (slowest.share or 0)
    limit = max(limits, key=lambda name: limits[name])
    return Case(
        op, name, device, work.bytes, work.flops, costs.launches, costs.bytes, limits[limit], limit
    )  # fmt: skip


PAGE = """# Predicted speed of the GPU kernels

Nobody measured these numbers: they are predictions by `python tools/gpu_roofline.py`, from each kernel's machine code
(Triton {version}) and these GPUs:

{gpus}

**Time** is the longest of a case's bytes, each input read once and each output written once, at the memory's rate; its
products at the tensor cores'; and the instructions of the slowest of its kernels, as if all of the bytes or products
passed its loop, which is too long where it reads a part. Float32 is multiplied as three products in TF32. Not in it are
launches (a few microseconds each where the host is slow), waits that too few warps cannot hide, and what a case reads
again from the second-level cache. `launches` and `memory`, the most held at a time beyond the inputs, are from
`tools/gpu_costs.py`.

**Share** is, of one turn of a kernel's main loop, the time of its instructions over the time of its bytes or products,
by the unit that is busiest: `issue` (four instructions a clock), `FP32`, `integer`, `FP64`, or `special` (exponentials,
conversions). Below 1 the instructions keep up. It is an upper bound: branches that are seldom taken count as taken, and
beside products, what surrounds the loop counts once a tile. A kernel without a loop is its own. `a turn`: bytes of a
thread, or operations of a block. `warps`: how many a multiprocessor, with room for 64, holds, and what limits them.

## Cases

{cases}
## Steps

A token of decoding, and a training step without its optimiser, of a Llama of 1B parameters in bfloat16 (16 layers of
width 2,048, 49,152 entries), traced by `tools/gpu_steps.py`. Time is the longer of its bytes at the memory's rate and
its products at the tensor cores'. `host` is what its launches take at 5 microseconds each: where that is longer, the
GPU waits for Python.

{steps}
## Kernels

{kernels}"""


def steps() -> list[dict]:
    """Of `gpu_steps`, in the interpreter, which this process has turned off."""
    command = [sys.executable, Path(__file__).with_name("gpu_steps.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def table_of_steps(found: list[dict], devices: list[str]) -> str:
    lines = [
        "| step | GB | TFLOP | launches | waits | memory, GB | host, ms | "
        f"{' | '.join(f'{d}, ms | by' for d in devices)} |",
        "| --- " * (7 + 2 * len(devices)) + "|",
    ]
    for one in found:
        times = []
        for gpu in (GPUS[device] for device in devices):
            limits = {"memory": one["bytes"] / gpu.bandwidth, "tensor cores": one["flops"] / gpu.products}
            limit = max(limits, key=lambda name: limits[name])
            times.append(f"{limits[limit] * 1e3:.3g} | {limit}")
        lines.append(
            f"| {one['name']} | {one['bytes'] / 1e9:.1f} | {one['flops'] / 1e12:.2f} | {one['launches']:,} | "
            f"{one['waits']} | {one['peak'] / 1e9:.2f} | {one['launches'] * LAUNCH * 1e3:.1f} | {' | '.join(times)} |"
        )
    return "\n".join(lines) + "\n"


def page(kernels: list[Kernel], found: list[Case]) -> str:
    devices = list(dict.fromkeys(case.device for case in found))
    gpus = "\n".join(
        f"- {device}: {gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.products / 1e12:,.0f} TFLOP/s in bfloat16, "
        f"{gpu.processors} multiprocessors at {gpu.clock / 1e9:.2f} GHz"
        for device, gpu in GPUS.items()
        if device in devices
    )
    lines = [
        f"| op | case | MB | TFLOP | launches | memory, MB | {' | '.join(f'{d}, ms | by' for d in devices)} |",
        "| --- " * (6 + 2 * len(devices)) + "|",
    ]
    by_case: dict[tuple[str, str], dict[str, Case]] = {}
    for case in found:
        by_case.setdefault((case.op, case.name), {})[case.device] = case
    for (op, name), on in by_case.items():
        one = next(iter(on.values()))
        flops = f"{one.flops / 1e12:,.2f}" if one.flops else ""
        times = [f"{on[d].seconds * 1e3:.3g} | {on[d].limit}" for d in devices]
        lines.append(
            f"| {op} | {name} | {one.bytes / 1e6:,.1f} | {flops} | {one.launches} | {one.peak / 1e6:,.1f} | "
            f"{' | '.join(times)} |"
        )
    rows = [
        "| op | kernel | case | device | loop | a turn | share | unit | registers | spills | warps | by |",
        "| --- " * 12 + "|",
    ]
    for k in kernels:
        per = f"{k.per / 1e6:.2f} MFLOP" if k.products else f"{k.per} bytes"
        share = "" if k.share is None else f"{k.share:.2f}"
        rows.append(
            f"| {k.op} | {k.name} | {k.case} | {k.device} | {k.loop} | {per} | {share} | {k.unit} | {k.registers} | "
            f"{k.spills} | {k.resident} | {k.limit} |"
        )
    tables = ("\n".join(part) + "\n" for part in (lines, rows))
    cases, each = tables
    of_steps = table_of_steps(steps(), devices)
    return PAGE.format(version=triton.__version__, gpus=gpus, cases=cases, steps=of_steps, kernels=each)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels to predict; all by default")
    parser.add_argument("--target", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--page", type=Path, help="write the page there")
    options = parser.parse_args(argv)
    kernels, found = [], []
    spawn = multiprocessing.get_context("spawn")  # one driver per process
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for some, cases in pool.map(partial(predictions, options.ops), options.target):
            kernels += some
            found += cases
            for case in cases:
                print(
                    f"{case.device:8} {case.op:24} {case.seconds * 1e3:10.4g} ms by {case.limit}  {case.name}",
                    flush=True,
                )
    if not found:
        parser.error(f"no kernel is named {', '.join(options.ops)}")
    if options.page:
        with atomic_write(options.page) as path:
            path.write_text(page(kernels, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
