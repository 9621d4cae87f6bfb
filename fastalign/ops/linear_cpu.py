"""The fused head on the CPU: torch's matrix products by tiles of logits, and a kernel's pass over each tile.

A tile is tokens × part of the vocabulary; only one is in memory at a time, besides those kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastalign import backend
from fastalign._base.dtypes import compute_dtype
from fastalign.backend import threads
from fastalign.empty import ALL
from fastalign.ops import products
from fastalign.ops.buffers import buffer

TOKENS = 1024  # of a tile
VOCAB = 4096
NARROW_BYTES = 32 << 20  # for a tile's widened weight and its gradient: wide models with narrow weights get less VOCAB
NEG_INF = float("-inf")

P = ParamSpec("P")
R = TypeVar("R")


class Tiles:
    """The scored rows of `hidden`, and their tiles of logits, in the compute type."""

    weight: Tensor
    b: Tensor | None
    transform: tuple[float, float, float]

    count: int
    vocab: int
    width: int

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        labels: Tensor,
        adapter_scale: float,
        transform: tuple[float, float, float],
        index: Tensor | None,
    ):
        self.dtype: torch.dtype = compute_dtype(hidden.dtype)
        self.weight, self.b, self.transform = weight, b, transform
        self.hidden: Tensor = _rows(hidden, index).to(self.dtype).contiguous()
        labels = labels.reshape(-1)
        self.labels: Tensor = labels.contiguous() if index is None else labels.index_select(0, index)
        self.bias: Tensor | None = None if bias is None else bias.to(self.dtype).contiguous()
        self.low: Tensor | None = None if a is None else adapter_scale * (self.hidden @ a.to(self.dtype).T)
        self.count, self.vocab, self.width = len(self.labels), weight.shape[0], tile_width(weight)
        self._tile = torch.empty(min(self.count, TOKENS) * min(self.width, self.vocab), dtype=self.dtype)
        self._wide = torch.empty(self.width * weight.shape[1], dtype=self.dtype) if weight.dtype != self.dtype else None

    def columns(self) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """(begin, end, weight[begin:end], B[begin:end]) over the vocabulary; a widened weight is kept for one step."""
        for begin in range(0, self.vocab, self.width):
            end = min(begin + self.width, self.vocab)
            w = self.weight[begin:end]
            if self._wide is not None:
                w = self._wide[: w.numel()].view(w.shape).copy_(w)
            yield begin, end, w, None if self.b is None else self.b[begin:end].to(self.dtype)

    def rows(self) -> Iterator[slice]:
        for begin in range(0, self.count, TOKENS):
            yield slice(begin, min(begin + TOKENS, self.count))

    def room(self, rows: slice, columns: int) -> Tensor:
        """Memory for one tile, shared by all tiles that are not kept."""
        count = rows.stop - rows.start
        return self._tile[: count * columns].view(count, columns)

    def project(self, rows: slice, w: Tensor, b: Tensor | None, *, place: Tensor | None = None) -> Tensor:
        """A tile of logits without their bias, (rows, columns): in `place`, or in memory reused by the next one."""
        out = self.room(rows, len(w)) if place is None else place
        tile = products.linear_into(out, self.hidden[rows], w, kept=place is not None)
        return tile if b is None or self.low is None else tile.addmm_(self.low[rows], b.t())

    def describe(self, tile: Tensor, rows: slice, first: int) -> tuple[Any, ...]:
        """For the kernel: the tile, and its offsets in the rows and in the vocabulary."""
        labels, bias = buffer(self.labels), buffer(self.bias)
        return (buffer(tile), *tile.shape, labels, bias, rows.start, first, *self.transform)


def tile_width(weight: Tensor) -> int:
    """How many vocabulary entries a tile spans: fewer for wide models whose weight must be widened."""
    width = VOCAB
    if weight.dtype not in (torch.float32, torch.float64):
        while width > 512 and 2 * width * weight.shape[1] * 4 > NARROW_BYTES:
            width //= 2
    return width


def kept_size(weight: Tensor, labels: Tensor, memory_budget: int, dtype: torch.dtype) -> int:
    """Number of elements of `_Kept`'s store. Counts all labels: torch.compile needs a size that does not depend on how
    many are ignored."""
    if memory_budget == 0:
        return 0
    steps = -(-weight.shape[0] // tile_width(weight))
    return min(memory_budget // dtype.itemsize, labels.numel() * weight.shape[0]) + steps


class _Kept:
    """Tiles of the forward pass, all rows of each, in one tensor, followed by a flag per tile that is present."""

    def __init__(self, store: Tensor, count: int, weight: Tensor):
        self.width, self.vocab, self.count = tile_width(weight), weight.shape[0], count
        steps = -(-self.vocab // self.width) if store.numel() else 0
        # `take` changes only which tiles are still kept, never the results: autograd's version counter is not needed.
        store = store.data
        self.tiles, self.marks = store[: store.numel() - steps], store[store.numel() - steps :]

    def place(self, step: int) -> Tensor | None:
        """The memory in which that step's tile is kept, (count, its columns); None if the store is full."""
        begin, columns = step * self.width * self.count, min(self.width, self.vocab - step * self.width)
        if begin + columns * self.count > len(self.tiles) or not self.count:
            return None
        return self.tiles[begin : begin + columns * self.count].view(self.count, columns)

    def take(self, step: int) -> Tensor | None:
        """Gives the tile to the caller; a second backward pass through the same graph recomputes it."""
        tile = self.place(step)
        if tile is None or not self.marks[step]:
            return None
        self.marks[step] = 0
        return tile


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    """x (..., H) as (rows, H), only the rows in `index` if given; a view if possible."""
    if x.ndim < 3 or x.is_contiguous() or index is None:
        x = x.reshape(-1, x.shape[-1])
        return x if index is None else x.index_select(0, index)
    return x[torch.unravel_index(index, x.shape[:-1])]


def _scattered(x: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    """The inverse of `_rows`, with zeros in rows that `index` omits."""
    if index is None:
        return x.view(shape)
    out = x.new_zeros(shape)
    out.view(-1, *x.shape[1:]).index_copy_(0, index, x)
    return out


def _index(mask: Tensor) -> Tensor | None:
    """The indices where `mask` is true, or None if it is true everywhere."""
    return None if bool(mask.all()) else mask.nonzero().flatten()


def _plain(implementation: Callable[P, R]) -> Callable[P, R]:
    """Disables the caller's autocast, which would round the products, and gradient recording."""

    def run(*args: P.args, **options: P.kwargs) -> R:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return implementation(*args, **options)

    return run


@_plain
def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    adapter_scale: float,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    statistics: int,
    unit: bool,
    memory_budget: int,
) -> tuple[Tensor, ...]:
    index = _index(labels.reshape(-1) != ignore_index)
    tiles = Tiles(hidden, weight, bias, a, b, labels, adapter_scale, (temperature, softcap, logit_scale), index)
    store = torch.empty(kept_size(weight, labels, memory_budget, tiles.dtype), dtype=tiles.dtype)
    kept = _Kept(store, tiles.count, weight)
    stats = torch.zeros(7, tiles.count, dtype=tiles.dtype)
    stats[0] = stats[6] = NEG_INF
    gradient = _UnitGradient(tiles, a, adapter_scale) if unit else None
    for step, (first, _, w, b_part) in enumerate(tiles.columns()):
        place = kept.place(step)
        kept.marks[step : step + 1] = 0 if place is None else 1
        for rows in tiles.rows():
            tile = tiles.project(rows, w, b_part, place=None if place is None else place[rows])
            backend.native.head_forward(
                tiles.describe(tile, rows, first),
                buffer(stats),
                statistics > 0,
                None if gradient is None else buffer(gradient.rescale[: len(tile)]),
                threads(),
            )
            if gradient is not None:
                gradient.add(tile, rows, w, b_part)
            del tile  # the next one may be elsewhere
    row_max, row_sum, label_logit, weighted, squares, total, before = stats.unbind()
    log_sum = row_sum.double().log().to(tiles.dtype)
    empty = (row_sum == 0) & (row_max == NEG_INF)
    results = [((label_logit - row_max) - log_sum).masked_fill(empty, 0), row_max.clone(), row_sum.clone()]
    if statistics:
        results.append((log_sum - weighted / row_sum).masked_fill(empty, 0))
    if statistics == ALL:
        results += [
            total / weight.shape[0],
            (squares.double().log().to(tiles.dtype) - 2 * log_sum).masked_fill(empty, 0),
            (label_logit >= row_max) & (label_logit > before) & ~empty & ~row_sum.isnan(),
        ]
    results = [_scattered(x, index, labels.shape) for x in results]
    nothing = results[0].new_empty(*labels.shape, 0)
    results += [nothing.clone() for _ in range(6 - len(results))]
    if statistics != ALL:
        results.append(nothing.bool())
    if gradient is None:
        return (*results, store, hidden.new_empty(0, dtype=tiles.dtype))
    return (*results, store, _scattered(gradient.finish(stats, empty), index, hidden.shape))


class _UnitGradient:
    """d log p(label) / d hidden, by the online softmax: dz/dx of the label times its weight, minus the mean over p."""

    def __init__(self, tiles: Tiles, a: Tensor | None, adapter_scale: float):
        self.tiles, self.a, self.adapter_scale = tiles, a, adapter_scale
        self.total = torch.zeros(tiles.count, tiles.weight.shape[1], dtype=tiles.dtype)
        self.low = None if a is None else torch.zeros(tiles.count, a.shape[0], dtype=tiles.dtype)
        self.rescale = torch.empty(TOKENS, dtype=tiles.dtype)

    def add(self, tile, rows, w, b):
        rescale = self.rescale[: len(tile), None]
        products.add_grad_input(self.total[rows].mul_(rescale), tile, w)
        if b is not None:
            self.low[rows].mul_(rescale).addmm_(tile, b)

    def finish(self, stats, empty):
        temperature, softcap, logit_scale = self.tiles.transform
        row_sum, label_logit = stats[1], stats[2]
        slope = 1 - (label_logit * (temperature / softcap)).square() if softcap else torch.ones_like(label_logit)
        for rows in self.tiles.rows():
            labels = self.tiles.labels[rows]
            for total, of in ((self.total, self.tiles.weight), (self.low, self.tiles.b)):
                if of is not None:
                    total[rows].div_(-row_sum[rows, None])
                    total[rows].addcmul_(of.index_select(0, labels).to(total.dtype), slope[rows, None])
            if self.low is not None:
                self.total[rows].addmm_(self.low[rows], self.a.to(self.low.dtype), alpha=self.adapter_scale)
        return self.total.mul_(logit_scale / temperature).masked_fill_(empty[:, None], 0)


@_plain
def backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    entropy: Tensor,
    kept: Tensor,
    unit: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    adapter_scale: float,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    grad_filter: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden.dtype)
    if entropy.shape != labels.shape:  # not requested
        entropy = grad_entropy = torch.zeros_like(row_max)
    small = torch.stack([x.reshape(-1).to(dtype) for x in (grad_log_probs, grad_entropy, row_max, row_sum, entropy)])
    scored = labels.reshape(-1) != ignore_index
    if unit.numel() and not any(needs[1:]) and not bool((small[1] * scored != 0).any()):
        g = grad_log_probs.to(dtype).unsqueeze(-1)
        return (g * unit).masked_fill_(g == 0, 0).to(hidden.dtype), *(hidden.new_empty(0) for _ in range(4))
    alive = scored & ((small[0] != 0) | (small[1] != 0))
    index = _index(alive)
    tiles = Tiles(hidden, weight, bias, a, b, labels, adapter_scale, (temperature, softcap, logit_scale), index)
    small = small if index is None else small.index_select(1, index)
    kept = _Kept(kept, int(scored.sum()), weight)
    among = None if tiles.count == kept.count else alive[scored].nonzero().flatten()  # the scored rows among the kept
    grads = _gradients(tiles, small, kept, among, a, adapter_scale, grad_filter, needs)
    if grads[0] is not None:
        grads[0] = _scattered(grads[0].to(hidden.dtype), index, hidden.shape)
    pairs = zip(grads, (hidden, weight, bias, a, b), strict=True)
    return tuple(hidden.new_empty(0) if grad is None or x is None else grad.to(x.dtype) for grad, x in pairs)


def _gradients(
    tiles: Tiles,
    small: Tensor,
    kept: _Kept,
    among: Tensor | None,
    a: Tensor | None,
    adapter_scale: float,
    grad_filter: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the scored rows of hidden, of weight, bias, A and B; None if not needed."""
    to_hidden, to_weight, to_bias, to_a, to_b = needs
    dtype, count, filtered = tiles.dtype, tiles.count, grad_filter > 0
    d_hidden = torch.zeros(count, tiles.weight.shape[1], dtype=dtype) if to_hidden else None
    d_low = torch.zeros(count, a.shape[0], dtype=dtype) if a is not None and (to_a or to_hidden) else None
    d_weight = _HeadGradient(tiles, tiles.weight) if to_weight else None
    d_b = _HeadGradient(tiles, tiles.b) if to_b and tiles.b is not None else None
    d_bias = torch.zeros(tiles.vocab, dtype=dtype) if to_bias else None
    for step, (first, end, w, b_part) in enumerate(tiles.columns()):
        taken = kept.take(step)
        for rows in tiles.rows():
            logits, columns = None, None
            if taken is None:
                tile = tiles.project(rows, w, b_part)
            else:
                room = tiles.room(rows, end - first)
                tile = taken[rows] if among is None else torch.index_select(taken, 0, among[rows], out=room)
                logits = buffer(tile)  # with their bias
            seen = torch.zeros(threads(), end - first if filtered else 0, dtype=torch.bool)
            backend.native.head_backward(
                tiles.describe(tile, rows, first), logits, buffer(small), grad_filter, buffer(seen), threads()
            )
            if filtered:
                columns = seen.any(0).nonzero().flatten()
                columns = columns if 2 * len(columns) <= end - first else None  # else the copies cost what they save
                tile = tile if columns is None else tile.index_select(1, columns)
            for total, head in ((d_hidden, w), (d_low, b_part)):
                if total is not None and head is not None:
                    products.add_grad_input(
                        total[rows], tile, head if columns is None else head.index_select(0, columns)
                    )
            for total, x in ((d_weight, tiles.hidden), (d_b, tiles.low)):
                if total is not None and x is not None:
                    total.add(tile, x[rows], columns, first, end, fresh=rows.start == 0)
            if d_bias is not None:
                part, sums = d_bias[first:end], tile.sum(0)
                part.add_(sums) if columns is None else part.index_add_(0, columns, sums)
            del tile
        if taken is not None:
            backend.native.release_pages(buffer(taken), taken.itemsize)
        for total in (d_weight, d_b):
            if total is not None:
                total.close(first, end)
    d_a = None
    if d_low is not None and a is not None:
        d_low *= adapter_scale
        if d_hidden is not None:
            d_hidden.addmm_(d_low, a.to(dtype))
        if to_a:
            d_a = d_low.T @ tiles.hidden
    d_head = [None if total is None else total.grad for total in (d_weight, d_b)]
    return [d_hidden, d_head[0], d_bias, d_a, d_head[1]]


class _HeadGradient:
    """The gradient of weight or of B: summed in the compute type over all rows, then rounded once."""

    def __init__(self, tiles: Tiles, of: Tensor):
        rows = min(tiles.width, tiles.vocab)
        self.grad = torch.empty(of.shape, dtype=of.dtype)
        self._wide = None if of.dtype == tiles.dtype else torch.empty(rows, of.shape[1], dtype=tiles.dtype)
        if tiles.count == 0:
            self.grad.zero_()
            self._wide = None

    def _part(self, first, end):
        return self.grad[first:end] if self._wide is None else self._wide[: end - first]

    def add(self, tile, x, columns, first, end, fresh):
        part = self._part(first, end)
        if columns is None:
            products.add_grad_weight(part, tile, x, beta=0 if fresh else 1)
        else:
            part = part.zero_() if fresh else part
            part.index_add_(0, columns, tile.t() @ x)

    def close(self, first, end):
        if self._wide is not None:
            self.grad[first:end].copy_(self._wide[: end - first])
