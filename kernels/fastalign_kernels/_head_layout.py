"""What the launches of the fused head share: its block sizes, and its tensors as the kernels take them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from fastalign.kernels._products import TYPES, on_nvidia, options
from fastalign.kernels._softmax import compute_type, transform_factors
from torch import Tensor
from triton.runtime import driver

from fastalign._base.dtypes import compute_dtype


class Blocks(NamedTuple):
    """Of one product: a tile's rows and columns, the width of one step of its sum; warps and pipeline stages."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


# 64 accumulators a thread: the softmax, its statistics and their gradients find room beside them. Exact float32 and
# float64 products are fused multiply-adds of each thread: smaller tiles.
BLOCKS = {
    torch.bfloat16: Blocks(128, 128, 64, 8, 3),
    torch.float16: Blocks(128, 128, 64, 8, 3),
    torch.float32: Blocks(64, 64, 16, 8, 3),
    torch.float64: Blocks(32, 32, 32, 8, 2),
}
TALL = (90, 100, 103)  # architectures with registers and 197 KB of shared memory for tiles of 256 rows
# Beside a gradient's tile Triton 3.5 spills addresses on Blackwell.
TALL_GRADIENT = TALL if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else (90,)
TALL_ROWS = 2048  # and that many rows at least
GROUP_BYTES = 16 << 20  # of hidden states that stay in the second-level cache
WORKSPACE = 64 << 20  # bytes of logits or their gradients, or the size of hidden in float32 if that is more
WORKSPACE_WIDTH = 4096  # as if hidden were that wide at least: each part reads and writes its whole gradient


class Head:
    """What all kernels of the head are given: its tensors with their strides, and the rows that count."""

    def __init__(self, hidden, weight, bias, a, b, labels, adapter_scale, scored, temperature, softcap, logit_scale):
        self.compute, self.dot = compute_dtype(hidden.dtype), dot_type(hidden, weight)
        self.hidden, self.weight, self.a, self.b, self.adapter_scale = hidden, weight, a, b, adapter_scale
        self.rows, (self.vocab, self.width) = labels.numel(), weight.shape
        self.position = torch.argsort((~scored).reshape(-1).to(torch.uint8), stable=True)
        self.count = scored.sum()
        places, self.hidden_row = row_places(hidden)
        self.place = places[self.position]
        self.low = None
        if a is not None:
            scaled = (a.to(self.compute) * adapter_scale).to(self.dot)
            self.low = (hidden.to(self.dot) @ scaled.T).reshape(self.rows, len(a)).contiguous()
        self.labels = labels.reshape(-1).contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.to_cap, self.to_z, self.slope = transform_factors(temperature, softcap, logit_scale)
        self.softcap = softcap != 0
        self.use(fitting_blocks(self.dot, self.rows, self.width))

    def use(self, blocks: Blocks) -> None:
        """Take tiles of that shape."""
        self.blocks, self.row_blocks = blocks, triton.cdiv(self.rows, blocks.rows)
        self.group = max(1, GROUP_BYTES // (blocks.rows * self.width * self.hidden.dtype.itemsize))

    def use_tall(self, architectures: tuple[int, ...] = TALL) -> None:
        """Tiles of 256 rows, where the device feeds its tensor cores from the second-level cache too slowly for 128.

        Only for a product with its softmax and nothing more: what else is kept of each logit would not fit the
        registers.
        """
        more = self.softcap or self.bias is not None or self.low is not None or self.width % self.blocks.width
        many = self.dot.itemsize == 2 and self.rows >= TALL_ROWS
        if many and not more and architecture(self.hidden.device) in architectures:
            self.use(self.blocks._replace(rows=256, stages=4))

    def use_narrow(self) -> None:
        """Tiles of 64 columns, where more is kept of each logit."""
        self.use(self.blocks._replace(columns=min(self.blocks.columns, 64)))

    def arguments(self) -> dict:
        """Of forward_tiles and gradient_tiles."""
        rank = 0 if self.b is None else self.b.shape[1]
        b_row, b_step = (0, 0) if self.b is None else self.b.stride()
        return {
            "hidden": self.hidden, "weight": self.weight, "bias": self.bias, "low": self.low, "b": self.b,
            "labels": self.labels, "position": self.position, "place": self.place, "count": self.count,
            "rows": self.rows, "row_blocks": self.row_blocks, "group": self.group, "width": self.width, "rank": rank,
            "hidden_row": self.hidden_row, "hidden_step": self.hidden.stride(-1),
            "weight_row": self.weight.stride(0), "weight_step": self.weight.stride(1), "b_row": b_row, "b_step": b_step,
            "to_cap": self.to_cap, "to_z": self.to_z, "SOFTCAP": self.softcap,
            "DOT": TYPES[self.dot], "COMPUTE": compute_type(self.compute), "EVEN": self.width % self.blocks.width == 0,
            "BLOCK_M": self.blocks.rows, "BLOCK_N": self.blocks.columns, "BLOCK_K": self.blocks.width,
            "BLOCK_R": min(self.blocks.width, max(16, triton.next_power_of_2(rank))),
            "num_warps": self.blocks.warps, "num_stages": self.blocks.stages, **options(self.dot, self.hidden.device),
        }  # fmt: skip

    def part(self, columns: int, dtype: torch.dtype) -> int:
        """How much of the vocabulary a workspace (rows, part) of that type spans: a multiple of `columns`."""
        size = max(WORKSPACE, self.rows * max(self.width, WORKSPACE_WIDTH) * self.compute.itemsize)
        fits = max(1, size // (self.rows * dtype.itemsize * columns))
        return min(fits, triton.cdiv(self.vocab, columns)) * columns

    def workspace(self, part: int) -> Tensor:
        """For whole tiles of one part."""
        return self.weight.new_empty((self.row_blocks * self.blocks.rows, part), dtype=self.dot)

    def all_rows(self) -> Tensor:
        """hidden as a view (places, H): `place` says which of its rows count."""
        last = sum((n - 1) * s for n, s in zip(self.hidden.shape[:-1], self.hidden.stride()[:-1], strict=True))
        shape, strides = (last // self.hidden_row + 1, self.width), (self.hidden_row, self.hidden.stride(-1))
        return self.hidden.as_strided(shape, strides)

    def scored_rows(self) -> Tensor:
        """The hidden states (rows, H) in order of `position`, in the products' type; 0 past the count."""
        return self.past_zero(self.all_rows().index_select(0, self.place).to(self.dot))

    def past_zero(self, x: Tensor) -> Tensor:
        """x (rows, ..) with 0 past the count, in place."""
        past = torch.arange(self.rows, device=x.device) >= self.count
        return x.masked_fill_(past[:, None], 0)


def parts(begin: int, end: int, part: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each part of the vocabulary from begin to end."""
    for first in range(begin, end, part):
        yield first, min(first + part, end)


def dot_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products multiply: the tensors' type, if it is the same."""
    if hidden.dtype != weight.dtype or (hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"):
        return compute_dtype(hidden.dtype)  # Triton's interpreter multiplies bfloat16 as integers, and truncates to it
    return hidden.dtype


def fitting_blocks(dtype: torch.dtype, rows: int, width: int) -> Blocks:
    """Fewer rows where there are few, down to the least that the tensor cores take; shorter steps for an odd width."""
    blocks = BLOCKS[dtype]
    if width % blocks.width:  # loads of few bytes, each with its own address
        blocks = blocks._replace(width=min(blocks.width, 32))
    least = min(blocks.rows, max(16, triton.next_power_of_2(rows)))
    return blocks._replace(rows=least, warps=blocks.warps if least > 32 else min(blocks.warps, 4))


def architecture(device: torch.device) -> int:
    """NVIDIA's number for it, as 90; 0 for others' and for the interpreter."""
    if device.type == "cpu":
        return 0
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def entropy_fits(device: torch.device) -> bool:
    """Whether what an entropy and its gradient, or a filter, take fits the registers beside a tile of 128 columns."""
    return device.type == "cpu" or architecture(device) == 90


def adapter_fits(device: torch.device) -> bool:
    """Whether the product with an adapter fits there too."""
    return device.type == "cpu" or on_nvidia(device)


def row_places(x: Tensor) -> tuple[Tensor, int]:
    """Row i of x (..., H) begins `places[i] · stride` elements into it, whatever its strides."""
    dims = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    stride = math.gcd(*(s for n, s in dims if n > 1)) or 1
    places = torch.zeros((), dtype=torch.int64, device=x.device)
    for n, s in dims:
        places = places.unsqueeze(-1) + torch.arange(n, device=x.device) * (s // stride if n > 1 else 0)
    return places.reshape(-1), stride


def plain(launcher):
    """Without the caller's autocast, which would round the library's products, and without a tape."""

    def run(*args, **options):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return launcher(*args, **options)

    return run
