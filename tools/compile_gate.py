"""Compiles every Triton kernel in its shipped configurations, for GPUs that need not be present, and inspects the
result.

    python tools/compile_gate.py [OP ...] [--target sm_90 ...] [--in-turn] [--table FILE]

A kernel is launched on "meta" tensors with a driver that only names the target, so exactly what the launcher would
launch is compiled: the same specialisation, block sizes, warps and stages. Fails, naming the kernel, on
    what does not compile;
    a spill of registers to memory, in the SASS (a store to local memory) or in AMD's metadata;
    products of the tensor cores that ptxas had to serialise (its warnings C7510 and C7515);
    shared memory beyond what one block of the device may have.
The table has registers, shared memory, tensor-core instructions and the widest global load of each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastalign import kernels
from fastalign._base.files import atomic_write


@dataclass(frozen=True)
class Device:
    """A GPU to compile for; shared: maximum bytes of shared memory per block."""

    target: GPUTarget
    shared: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10),
    "gfx950": Device(GPUTarget("hip", "gfx950", 64), 160 << 10),
}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses. Spills: bytes of memory, of a thread."""

    op: str
    case: str
    kernel: str
    device: str
    registers: int
    spills: int
    shared: int
    tensor_core: str
    load_bits: int
    warps: int
    fused: bool  # multiply-adds
    serialised: str  # the assembler's warning

    def faults(self) -> list[str]:
        where = f"{self.op}: {self.kernel} ({self.case}) on {self.device}"
        result = []
        if self.serialised:
            result.append(f"{where} waits for each product of the tensor cores: {self.serialised}")
        if not self.fused:
            result.append(f"{where} is compiled without fused multiply-adds")
        if self.spills:
            result.append(f"{where} spills {self.spills} bytes of registers")
        if self.shared > DEVICES[self.device].shared:
            result.append(
                f"{where} wants {self.shared:,} bytes of shared memory, {DEVICES[self.device].shared:,} is all"
            )
        return result


class _Driver:
    """Takes the place of the GPU's driver, and knows only the target."""

    def __init__(self, device: str):
        self.device = device

    def get_current_target(self) -> GPUTarget:
        return DEVICES[self.device].target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0


def launched(run: Callable[[], object], device: str) -> list:
    """The kernels that `run` launches, compiled for `device` but not run."""
    result = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        result.append(launch(self, *args, grid=grid, warmup=True, **kwargs))
        return result[-1]

    JITFunction.run = compile_only
    driver.set_active(_Driver(device))
    try:
        run()
    finally:
        JITFunction.run = launch
    return result


def inspect(op: str, case: str, kernel, device: str) -> Report:
    """Read the compiled kernel."""
    read = _nvidia if DEVICES[device].target.backend == "cuda" else _amd
    metadata = kernel.metadata
    return Report(
        op,
        case,
        metadata.name,
        device,
        shared=metadata.shared,
        warps=metadata.num_warps,
        fused=metadata.enable_fp_fusion,
        **read(kernel),
    )


@lru_cache(maxsize=1)  # the disassembler is slow
def dumped(cubin: bytes, what: str) -> str:
    """A cubin's "resource-usage" or "sass"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        return subprocess.run([path, f"--dump-{what}", file.name], check=True, capture_output=True, text=True).stdout


def _nvidia(kernel) -> dict:
    usage = dumped(kernel.asm["cubin"], "resource-usage")
    sass = dumped(kernel.asm["cubin"], "sass")
    loads = re.findall(r"\b(?:LDG|LDGSTS)((?:\.\w+)+)", sass)
    widths = [int((re.search(r"\.(64|128|256)\b", suffix) or [0, 32])[1]) for suffix in loads]
    bulk = 1024 if re.search(r"\bUTMALDG|\bUBLKCP", sass) else 0
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # The assembler's own moves to local memory are spills.
        "spills": 4 * len(re.findall(r"\bSTL\b|\bSTL\.", sass)),
        "tensor_core": ", ".join(
            name for name in ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "IMMA", "DMMA") if re.search(rf"\b{name}\b", sass)
        ),
        "load_bits": max([*widths, bulk], default=0),
        "serialised": _serialised(kernel),
    }


def _serialised(kernel) -> str:
    """The assembler's warning that it serialises asynchronous products, if there is one."""
    ptx = kernel.asm["ptx"]
    if "wgmma" not in ptx:
        return ""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = int(re.sub(r"\D", "", target[1]))
        command = [ptxas_of(arch), f"--gpu-name={target[1]}", source, "-o", f"{source}.o"]
        said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        return f"ptxas: {said.stderr.strip()[:120]}"
    found = re.search(r"C75(10|15).*", said.stderr)
    return found[0][:120] if found else ""


def ptxas_of(arch: int) -> str:
    """The assembler that Triton takes; before 3.6 there was one for all."""
    return (nvidia.get_ptxas(arch) if signature(nvidia.get_ptxas).parameters else nvidia.get_ptxas()).path


def _amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    loads = re.findall(r"\b(?:global_load|buffer_load)_(?:dwordx(\d)|dword|u?short|u?byte)", text)
    return {
        "registers": field("vgpr_count"),
        # Scalar registers are moved to lanes of vector registers first, which costs no memory.
        "spills": field("private_segment_fixed_size"),
        "tensor_core": "MFMA" if "v_mfma" in text else "",
        "load_bits": max((32 * int(width or 1) for width in loads), default=0),
        "serialised": "",
    }


def reports(ops: list[str], turns: list[str] | None, device: str) -> tuple[list[Report], list[str]]:
    """Every kernel of every case of the ops (default: all) on one device, each distinct compilation once; and what does
    not compile.

    turns: every fourth case, different ones each day, is compiled for one of these devices in turn; None: every case
    for every device.
    """
    from fastalign.bench.gpu_common import cases

    result, broken, seen = [], [], set()
    today = int(time.time() // 86400) % 4
    for i, (op, case) in enumerate(cases()):
        if (ops and op not in ops) or (turns and (i % 4 != today or turns[i // 4 % len(turns)] != device)):
            continue
        try:
            found = launched(case.build("meta", False).run, device)
        except Exception as error:  # the compiler's own, of any kind
            broken.append(f"{op}: {case.name} on {device} does not compile: {type(error).__name__}: {error}")
            continue
        for kernel in found:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                result.append(inspect(op, case.name, kernel, device))
    return result, broken


TOLD = re.compile(r"^- Triton (\S+): [\d,]+ kernels, \d+ faults(?:\n  - .+)*", re.MULTILINE)


def page(found: list[Report], faults: list[str], before: str = "") -> str:
    """Markdown: a line for each Triton with which the page was made, its faults below it, and one for each kernel, with
    the newest of them. before: the page as it stands."""
    summary = f"- Triton {triton.__version__}: {len(found):,} kernels, {len(faults)} faults"
    told = "\n".join([summary, *(f"  - {fault.splitlines()[0]}" for fault in faults)])
    lines = {m[1]: m[0] for m in TOLD.finditer(before)} | {triton.__version__: told}
    newest, *others = sorted(lines, key=lambda version: [int(x) for x in re.findall(r"\d+", version)[:3]], reverse=True)
    head = [
        "# GPU kernels compiled",
        "",
        "`python tools/compile_gate.py`:",
        "",
        *(lines[x] for x in (newest, *others)),
        "",
    ]
    if newest != triton.__version__:
        return "\n".join(head) + before[before.index("\nRegisters") :]
    rows = [
        f"Registers and the like are those with Triton {newest}.",
        "",
        "| op | kernel | case | device | warps | registers | spills | shared memory | tensor cores | widest load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        load = "bulk" if r.load_bits > 256 else f"{r.load_bits} bits"
        rows.append(
            f"| {r.op} | {r.kernel} | {r.case} | {r.device} | {r.warps} | {r.registers} | {r.spills} | "
            f"{r.shared:,} | {r.tensor_core or '-'} | {load} |"
        )
    return "\n".join(head + rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels to compile; all by default")
    parser.add_argument("--target", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="every fourth case, different ones each day, for one target each: a sixteenth of all",
    )
    parser.add_argument("--table", type=Path, help="write the page there, with a table of all kernels")
    options = parser.parse_args(argv)
    unknown = set(options.ops) - set(kernels.names())
    if unknown:
        parser.error(f"no kernel is named {', '.join(sorted(unknown))}; there are {', '.join(kernels.names())}")
    result, faults = [], []
    spawn = multiprocessing.get_context("spawn")  # one driver per process
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(options.target)), mp_context=spawn) as pool:
        turns = options.target if options.in_turn else None
        for part in pool.map(partial(reports, options.ops, turns), options.target):
            found, broken = part
            faults += broken
            for report in found:
                result.append(report)
                faults += report.faults()
                print(
                    f"{report.device:8} {report.op:24} {report.kernel:24} {report.registers:4} registers "
                    f"{report.shared:8,} shared {report.tensor_core or '-':8} {report.load_bits:4} bits"
                    f"{'  SPILLS' if report.spills else ''}  {report.case}",
                    flush=True,
                )
    if options.table:
        before = options.table.read_text() if options.table.exists() else ""
        with atomic_write(options.table) as path:
            path.write_text(page(result, faults, before))
    print(f"{len(result)} kernels compiled with Triton {triton.__version__}, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
