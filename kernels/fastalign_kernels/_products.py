"""Products of a tile of gradients with the head or the hidden states, accumulated in the compute type.

Where every block counts the vendor's library multiplies. `product` is for what it cannot do: leave out blocks of the
tile that are all 0, and join parts of an online softmax on the way. Its blocks to visit come as lists in memory, so
that its loop has no branch and the loads run ahead.
"""

import torch
import triton
import triton.language as tl
from fastalign.kernels._head import in_groups
from fastalign.kernels._softmax import compute_type
from torch import Tensor
from triton.runtime import driver

from fastalign._base.whole_sums import whole_sums

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
ADDS_IN_PLACE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)  # float32 += bfloat16 @ bfloat16


@triton.jit(do_not_specialize=["rows", "inner", "row_blocks", "list_row", "group"])
def product_tiles(
    out, a, b, b_index, limit, blocks, counts, rescale, unscale,
    rows, columns, inner, row_blocks, list_row, group, out_row, a_row, a_step, b_row, b_step,
    ADD: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """out (rows, columns) [+]= a (rows, inner) @ b (inner, columns), over the listed blocks of `inner` alone.

    `a` holds whole tiles, 0 past the end of `inner`, so that nothing is masked: b's last row is read again there.
    """
    row_block, column_block = in_groups(tl.program_id(0), row_blocks, tl.cdiv(columns, BLOCK_N), group)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_read = n if EVEN else tl.minimum(n, columns - 1)
    steps = tl.load(counts + row_block) * (LISTED // BLOCK_K)
    if ADD and rescale is None and steps == 0:
        return
    stop = tl.minimum(tl.load(limit), inner) if limit is not None else inner
    m_read = tl.minimum(m, rows - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE)
    for step in range(0, steps):
        listed = tl.load(blocks + row_block * list_row + step // (LISTED // BLOCK_K)).to(tl.int64)
        k = listed * LISTED + step % (LISTED // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(a + m[:, None] * a_row + k[None, :] * a_step)
        at = tl.minimum(k, stop - 1)
        if b_index is not None:
            at = tl.load(b_index + at)
        y = tl.load(b + at[:, None] * b_row + n_read[None, :] * b_step)
        acc = tl.dot(x.to(DOT), y.to(DOT), acc, out_dtype=COMPUTE)
    to = out + m_read[:, None] * out_row + n[None, :]
    keep = (m < rows)[:, None] if EVEN else (m < rows)[:, None] & (n < columns)[None, :]
    if unscale is not None:
        acc *= tl.load(unscale)
    if ADD:
        old = tl.load(to, mask=keep, other=0).to(COMPUTE)
        if rescale is not None:
            old *= tl.load(rescale + m_read)[:, None]
        acc += old
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep)


def on_nvidia(device: torch.device) -> bool:
    return device.type != "cpu" and driver.active.get_current_target().backend == "cuda"


def options(dot: torch.dtype, device: torch.device) -> dict:
    """How kernels with products of that type are compiled. Float32 as the sum of three TF32 products, which NVIDIA's
    tensor cores take and which lose no more than float32's own rounding."""
    exact = dot == torch.float32 and on_nvidia(device)
    return {"enable_fp_fusion": True, "default_dot_input_precision": "tf32x3" if exact else "ieee"}


def alive_lists(alive: Tensor) -> tuple[Tensor, Tensor]:
    """Of marks (row block, block): which blocks are marked, row by row, and how many."""
    alive = alive.contiguous()
    return torch.argsort(alive, dim=1, descending=True, stable=True).int(), alive.sum(1, dtype=torch.int32)


def product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    listed: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    *,
    add: bool,
    dot: torch.dtype,
    blocks,
    sizes: tuple[int, int],
    b_index: Tensor | None = None,
    limit: Tensor | None = None,
    unscale: Tensor | None = None,
    rescale: Tensor | None = None,
) -> None:
    """out [+]= a @ b, of shape (rows, inner, columns), leaving out the blocks of `inner` that are not listed.

    sizes: of a row block and of a listed block. b_index: where the rows of b lie. limit: a count in memory that ends
    `inner`. rescale (row,): by what `out` is multiplied before.
    """
    rows, inner, columns = shape
    row_blocks = triton.cdiv(rows, sizes[0])
    block_n = min(blocks.columns, max(16, triton.next_power_of_2(columns)))
    block_k = min(blocks.width, sizes[1])
    index, counts = listed
    product_tiles[(row_blocks * triton.cdiv(columns, block_n),)](
        out, a, b, b_index, limit, index, counts, rescale if add else None, unscale,
        rows, columns, inner, row_blocks, index.stride(0), 8, out.stride(0),
        *a.stride(), *b.stride(),
        ADD=add, DOT=TYPES[dot], COMPUTE=compute_type(dot), EVEN=columns % block_n == 0,
        BLOCK_M=sizes[0], BLOCK_N=block_n, BLOCK_K=block_k, LISTED=sizes[1],
        # Three stages break Triton 3.9's compiler for gfx950.
        num_warps=blocks.warps, num_stages=blocks.stages if on_nvidia(out.device) else min(blocks.stages, 2),
        **options(dot, out.device),
    )  # fmt: skip


@whole_sums()
def library_add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's type, by the vendor's library; a and b may be narrower, of one type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif ADDS_IN_PLACE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


@whole_sums()
def library_product(out: Tensor, a: Tensor, b: Tensor, unscale: Tensor | None) -> None:
    """out = a @ b · unscale, summed in float32 (float64), rounded once."""
    if a.dtype == out.dtype and unscale is None and (a.device.type != "cpu" or out.dtype.itemsize > 2):
        torch.mm(a, b, out=out)
        return
    found = library_wide(a, b)
    out.copy_(found if unscale is None else found.mul_(unscale))


@whole_sums()
def library_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64)."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    if a.dtype == wide or a.device.type == "cpu":
        return a.to(wide) @ b.to(wide)
    return torch.mm(a, b, out_dtype=wide)
