"""The native extension, as csrc/bindings.cpp defines it. Every argument is positional."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from fastalign.ops.buffers import Buffer, Rows

_Tile: TypeAlias = tuple[object, ...]  # tile, rows, cols, labels, bias, row, first, temperature, softcap, logit_scale
_Rewards: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None, int]
# n, in_types, in_files, in_offsets, out_files, out_offsets, weights
_Segment: TypeAlias = tuple[
    int, Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[float]
]
_Digest: TypeAlias = tuple[int, int]  # 64 bits each, low and high
_Seen: TypeAlias = list[tuple[int, int, int]]  # count, segment, first
# (failed, writing, errno, segment, file), digests, inputs, outputs
_Told: TypeAlias = tuple[tuple[bool, bool, int, int, int], list[_Digest], _Seen, _Seen]

def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def first_bad_label(buffer: Buffer, vocab: int, ignore_index: int, /) -> int: ...
def token_logprobs_forward(
    log_probs: Buffer,
    max: Buffer,
    sum: Buffer,
    entropy: Buffer | None,
    mean_logits: Buffer | None,
    log_sum_sq_probs: Buffer | None,
    is_top1: Buffer | None,
    logits: Rows,
    labels: Buffer,
    ignore_index: int,
    temperature: float,
    softcap: float,
    threads: int,
    /,
) -> None: ...
def token_logratios_forward(
    log_ratios: Buffer,
    policy_max: Buffer,
    policy_sum: Buffer,
    ref_max: Buffer,
    ref_sum: Buffer,
    policy: Rows,
    ref: Rows,
    labels: Buffer,
    ignore_index: int,
    temperature: float,
    threads: int,
    /,
) -> None: ...
def token_logprobs_backward(
    grad_logits: Buffer,
    grad_log_probs: Buffer,
    grad_entropy: Buffer | None,
    max: Buffer,
    sum: Buffer,
    entropy: Buffer | None,
    logits: Rows,
    labels: Buffer,
    ignore_index: int,
    temperature: float,
    softcap: float,
    threads: int,
    /,
) -> None: ...
def release_pages(buffer: Buffer, itemsize: int, /) -> None: ...
def head_forward(
    tile: _Tile,
    stats: Buffer,
    all: bool,
    rescale: Buffer | None,
    threads: int,
    /,
) -> None: ...
def head_backward(
    tile: _Tile,
    logits: Buffer | None,
    rows: Buffer,
    filter: float,
    kept: Buffer,
    threads: int,
    /,
) -> None: ...
def map_statistics(out: np.ndarray, rewards: _Rewards, lam: np.ndarray, threads: int, /) -> None: ...
def map_newton(
    found: tuple[np.ndarray, ...],
    rewards: _Rewards,
    asked: tuple[np.ndarray | None, ...],
    tol: float,
    lam_max: float,
    threads: int,
    /,
) -> int: ...
def sample_tokens(
    ids: Buffer,
    log_probs: Buffer,
    logits: Rows,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    offset: int,
    streams: Buffer | None,
    streams_width: int,
    threads: int,
    /,
) -> None: ...
def shared_attention(
    out: Buffer,
    keys: Buffer,
    values: Buffer,
    query: Rows,
    key: Rows,
    value: Rows,
    prompts: list[tuple[Buffer, Buffer, int, int]],
    order: Buffer,
    lengths: Buffer,
    kv: int,
    group: int,
    room: int,
    window: int,
    scaling: float,
    softcap: float,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    y: Buffer,
    rstd: Buffer,
    x: Buffer,
    weight: Buffer,
    rows: int,
    width: int,
    eps: float,
    offset: float,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    dx: Buffer,
    dweight: Buffer | None,
    dy: Buffer,
    x: Buffer,
    rstd: Buffer,
    weight: Buffer,
    rows: int,
    width: int,
    offset: float,
    threads: int,
    /,
) -> None: ...
def silu_gate(out: Buffer, gate: Rows, up: Rows, threads: int, /) -> None: ...
def silu_gate_backward(
    dgate: Buffer,
    dup: Buffer,
    dout: Buffer,
    gate: Buffer,
    up: Buffer,
    n: int,
    threads: int,
    /,
) -> None: ...
def rotate(
    out: Buffer,
    x: Rows,
    cosine: Buffer,
    sine: Buffer,
    tokens: int,
    heads: int,
    inverse: bool,
    threads: int,
    /,
) -> None: ...
def gae(
    advantages: Buffer,
    returns: Buffer,
    rewards: Rows,
    values: Rows,
    mask: Buffer,
    gamma: float,
    lam: float,
    threads: int,
    /,
) -> None: ...
def resample(
    ids: Buffer,
    log_weights: Rows,
    k: int,
    method: int,
    mask: Buffer | None,
    seed: int,
    threads: int,
    /,
) -> None: ...
def allocate(file: int, bytes: int, /) -> int: ...
def write_behind(file: int, /) -> None: ...
def soup_files(
    segments: list[_Segment],
    out_type: int,
    chunk: int,
    threads: int,
    digesting: bool,
    /,
) -> _Told: ...
def soup_digest(data: bytes | bytearray | memoryview | np.ndarray, position: int, /) -> _Digest: ...
def soup_digest_file(file: int, bytes: int, threads: int, /) -> tuple[int, _Digest]: ...
def soup_dots(
    segment: _Segment, centered: bool, chunk: int, threads: int, /
) -> tuple[bool, bool, int, int, int, list[float]]: ...
def soup_tasks(
    segment: _Segment,
    choices: list[tuple[int, int, int, bool, float, float, bool, bool, float, int]],
    out_type: int,
    lam: float,
    elect: bool,
    normalize: bool,
    seed: int,
    row: int,
    chunk: int,
    threads: int,
    digesting: bool,
    /,
) -> _Told: ...
def soup_memory(
    outs: list[Buffer],
    ins: list[Buffer],
    weights: Sequence[float],
    threads: int,
    /,
) -> None: ...
