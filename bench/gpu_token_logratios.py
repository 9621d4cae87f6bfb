"""GPU cases of token_logratios; its backward pass is token_logprobs', once a side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import token_logratios as kernel
from torch import Tensor

from fastalign import reference

TOKENS = 8192
IGNORED = -100


def cases() -> Iterator[KernelCase]:
    for vocab, dtype in (
        (151_936, torch.bfloat16),
        (248_320, torch.bfloat16),
        (128_256, torch.float16),
        (49_152, torch.float32),
        (50_257, torch.bfloat16),  # no row but the first begins at a multiple of 16 bytes
    ):
        yield KernelCase(f"V {vocab:,} {str(dtype)[6:]}", partial(_build, vocab, dtype))


def _build(vocab: int, dtype: torch.dtype, device: str, small: bool) -> Work:
    rows, vocab = (3, vocab // 16 + 5) if small else (TOKENS, vocab)
    policy, ref = (torch.empty(rows, vocab, dtype=dtype, device=device) for _ in range(2))
    labels = torch.empty(rows, dtype=torch.int64, device=device)
    if device != "meta":
        policy.normal_(0, 3)
        ref.normal_(0, 3)
        labels.random_(0, vocab)

    def run():
        return kernel.forward(policy, ref, labels, 1.0, IGNORED)

    def check():
        result = run()[0]
        for start in range(0, rows, 256):
            part = slice(start, start + 256)
            truth = reference.token_logratios(policy[part].double(), ref[part].double(), labels[part])
            torch.testing.assert_close(result[part].double(), truth, rtol=1e-5, atol=2e-5)

    moved = 2 * policy.numel() * policy.element_size() + rows * (8 + 5 * 4)
    return Work(run, moved, check=check, peers=_peers(policy, ref, labels))


def _peers(policy: Tensor, ref: Tensor, labels: Tensor) -> dict[str, Callable]:
    if not policy.is_cuda:
        return {}

    def plain():
        sides = (torch.log_softmax(x.float(), -1).gather(-1, labels[:, None])[:, 0] for x in (policy, ref))
        return next(sides) - next(sides)

    result = {"torch": plain, "torch.compile": torch.compile(plain)}
    if find_spec("trl"):

        def trl():
            from trl.trainer.utils import selective_log_softmax

            return selective_log_softmax(policy, labels) - selective_log_softmax(ref, labels)

        result["TRL"] = trl
    return result
