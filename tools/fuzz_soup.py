"""Feeds mutated safetensors files to the soups, under AddressSanitizer: no crash, no hang, no read out of bounds, one
line each.

    python tools/fuzz_soup.py [--files 10000] [--seed 0]

Runs the files through a native extension built with the sanitizer (tools/sanitize.py). Valid files are mixed in memory
and merged with a twin of other numbers, by a weighted sum, as a stack, and by the other methods in turn; every fourth
is truncated between check and merge.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import sanitize

# 7, so that each is truncated too.
METHODS = ("slerp", "ties", "dare_linear", "karcher", "della", "breadcrumbs_ties", "model_stock")
MOST_SECONDS = 120  # for one file; a hang ends the run with a traceback
WORDS = b'null -1 1e3 true " { } [ ] , 18446744073709551616 F16 \\u0000'.split()
SAME_WIDTH = {
    "F32": ("I32", "U32"),
    "F16": ("BF16", "I16"),
    "I64": ("F64", "U64"),
    "U8": ("F8_E4M3", "F8_E5M2", "BOOL"),
}


def good() -> bytes:
    """A valid file: several types, one tensor without elements, one at an odd offset."""
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    tensors = {
        "h.0.a": torch.randn(3, 5),
        "h.1.b": torch.randn(7).half(),
        "embed": torch.randn(40, 33),
        "embed.ids": torch.arange(4),
        "norm.none": torch.empty(0, 4),
        "norm.bytes": torch.arange(5, dtype=torch.uint8),
    }
    return save(tensors, metadata={"format": "pt"})


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The file with a damaged header: random bytes or, for one in four, JSON that may still be valid."""
    length = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.25:
        return _as_json(data, length, draw)
    kept = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        kind, at = draw.randrange(6), draw.randrange(min(8 + length, len(kept)))
        if kind == 0:
            kept[at] = draw.randrange(256)
        elif kind == 1:
            kept[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            kept[8:8] = kept[8 : 8 + draw.randrange(40)]
        elif kind == 3:
            kept[at : at + draw.randrange(4)] = draw.choice(WORDS)
        elif kind == 4:
            del kept[draw.randrange(len(kept)) :]
        else:
            digits = [i for i in range(8, min(8 + length, len(kept))) if 48 <= kept[i] <= 57]
            if digits:
                kept[draw.choice(digits)] = 48 + draw.randrange(10)
        if len(kept) < 9:
            break
    return bytes(kept)


def _as_json(data: bytes, length: int, draw: random.Random) -> bytes:
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(draw.randrange(1, 4)):
        name = draw.choice([name for name in header if name != "__metadata__"])
        entry, kind = header[name], draw.randrange(7)
        if kind == 0:
            entry["dtype"] = draw.choice(SAME_WIDTH.get(entry["dtype"], ("F32",)))
        elif kind == 1:
            draw.shuffle(entry["shape"])
        elif kind == 2:
            entry["shape"] = [1, *entry["shape"]]
        elif kind == 3 and entry["shape"]:
            entry["shape"][draw.randrange(len(entry["shape"]))] = draw.choice((0, 1, 7, 2**31, 2**62, 2**64, -1, 0.5))
        elif kind == 4:
            entry["data_offsets"][draw.randrange(2)] += draw.choice((-4, -1, 1, 4, 2**40))
        elif kind == 5:
            header = dict(draw.sample(list(header.items()), len(header)))
        else:
            header[name + draw.choice(("", "'", "\n", "\0", "é" * 200))] = header.pop(name)
    text = json.dumps(header).encode() + b" " * draw.randrange(9)
    return struct.pack("<Q", len(text)) + text + body


def write_twin(found, path: Path, draw: random.Random) -> Path:
    """The same file with other bytes in its floating-point tensors."""
    from fastalign.soup.checkpoint import FLOATS

    twin = path.with_name(f"twin-{path.name}")
    shutil.copyfile(path, twin)
    with open(twin, "r+b") as file:
        for tensor in (found[name] for name in found):
            if tensor.dtype in FLOATS:
                file.seek(tensor.offset)
                file.write(draw.randbytes(tensor.nbytes))
    return twin


def attempt(path: Path, scratch: Path, number: int, draw: random.Random) -> str:
    """The outcome of one file: "refused", "refused later" or "merged". Any other error is raised."""
    from fastalign import soup
    from fastalign._base.errors import UserError
    from fastalign.soup import plan
    from fastalign.soup.methods import METHODS as KINDS

    def told(error: Exception) -> None:
        line = str(error)
        if "\n" in line or len(line) > 900:
            raise AssertionError(f"not one clear line: {line!r}")

    try:
        result = soup.open_checkpoint(path)
    except UserError as error:
        told(error)
        return "refused"
    size = path.stat().st_size
    if not all(8 <= result[name].offset <= size - result[name].nbytes for name in result):
        raise AssertionError(f"{path}: a tensor lies beyond the file")
    out, method, cut = scratch / "out", METHODS[number % len(METHODS)], number % 4 == 0
    twin = write_twin(result, path, draw)
    kind, refused = KINDS[method], 0
    parameters = {"density": 0.5} if "density" in kind.parameters else None
    weights = None if kind.weights == "none" else [0.25, 0.75]
    try:
        soup.mix([path, twin], [0.25, 0.75])
        made = [
            plan.make([path, twin], [0.5, 0.5], out / "linear", dtype="float32"),
            plan.make(
                [path, twin],
                weights,
                out / method,
                method=method,
                base=path if kind.base == "yes" else None,
                parameters=parameters,
            ),
        ]
        try:
            made.append(plan.make([[(path, 0, 2), (twin, 1, 2), (path, 0, 1)]], [1.0], out / "stack"))
        except UserError as error:  # its layers' names may be damaged
            told(error)
        if cut:
            os.truncate(path, size - 1 - size // 3)
        for one in made:
            try:
                soup.execute(one, show_progress=False)
            except (UserError, OSError) as error:
                told(error)
                refused += 1
        if cut and result.nbytes and refused < len(made):
            raise AssertionError(f"{path}: was cut short, and nobody noticed")
    except (UserError, OSError) as error:
        told(error)
        return "refused later"
    finally:
        shutil.rmtree(out, ignore_errors=True)
        twin.unlink()
    return "refused later" if refused else "merged"


def fuzz(files: int, seed: int, scratch: Path, *, watch: bool = False) -> Counter:
    """The number of files per outcome. watch: end the process if one takes MOST_SECONDS."""
    data, draw, outcomes = good(), random.Random(seed), Counter()
    for number in range(files):
        path = scratch / f"{number}.safetensors"
        path.write_bytes(mutated(data, draw))
        if watch:
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        outcomes[attempt(path, scratch, number, draw)] += 1
        path.unlink()
    faulthandler.cancel_dump_traceback_later()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=("fuzz",), help=argparse.SUPPRESS)
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        sanitize.use_build(given.module)
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(fuzz(given.files, given.seed, Path(scratch), watch=True)))
        return 0
    module = sanitize.build("address", sanitize.levels()[0])
    result = sanitize.run(
        "address", module, Path(__file__), "--worker", "fuzz", "--files", given.files, "--seed", given.seed
    )
    if result.returncode:
        print(result.stderr[-6000:], file=sys.stderr)
        return 1
    counts = json.loads(result.stdout.splitlines()[-1])
    message = ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
    print(
        f"{given.files:,} mutated files under AddressSanitizer: {message}; no crash, no hang, no access out of bounds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
