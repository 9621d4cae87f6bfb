"""GPU cases of linear_sample_tokens: one token a row from hidden states, at the sizes of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import linear_sample_tokens as kernel
from fastalign.kernels import sample_tokens as rows_kernel
from torch import Tensor

from fastalign import reference

SEED, OFFSET = 17, 3


def cases() -> Iterator[KernelCase]:
    b16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for count, width, vocab, dtype, temperature, softcap in (
        (1, 4096, 151_936, b16, 1.0, 0.0),
        (64, 4096, 151_936, b16, 1.0, 0.0),
        (256, 4096, 248_320, b16, 1.0, 0.0),
        (4096, 4096, 128_256, b16, 0.7, 0.0),
        (64, 4096, 151_936, b16, 0.0, 0.0),
        (64, 2304, 256_000, b16, 1.0, 30.0),
        (64, 4096, 128_256, f16, 1.0, 0.0),
        (64, 576, 49_152, f32, 1.0, 0.0),
    ):
        name = (
            f"{count:,} × {width:,} × {vocab:,} {str(dtype)[6:]} temperature {temperature}{' softcap' * (softcap != 0)}"
        )
        build = partial(_build, count, width, vocab, dtype, temperature, softcap)
        yield KernelCase(name, build, streaming=False)


def _build(
    count: int, width: int, vocab: int, dtype: torch.dtype, temperature: float, softcap: float, device: str, small: bool
) -> Work:
    if small:
        count, width, vocab = min(count, 20), 72, 700
    hidden = torch.empty(count, width, dtype=dtype, device=device)
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    if device != "meta":
        hidden.normal_()
        weight.normal_(0, 3 * width**-0.5)

    def run():
        return kernel.sample(hidden, weight, None, None, None, 1.0, temperature, softcap, 1.0, SEED, OFFSET, None)

    def check():
        ids, log_probs = run()
        streams = torch.arange(count, device=device)
        u = reference.uniform(SEED, streams, torch.full_like(streams, OFFSET))
        for rows in torch.arange(count, device=device).split(64):
            logits = reference.transform_logits(hidden[rows].double() @ weight.double().T, 1.0, softcap or None)
            if temperature == 0:
                assert (logits.gather(-1, ids[rows, None])[:, 0] >= logits.amax(-1) - 1e-4).all()
                continue
            p = (logits / temperature).softmax(-1)
            after, mass = (x.gather(-1, ids[rows, None])[:, 0] for x in (p.cumsum(-1), p))
            assert ((u[rows] <= after + 1e-4) & (u[rows] >= after - mass - 1e-4)).all()
            torch.testing.assert_close(log_probs[rows].double(), mass.log(), rtol=1e-3, atol=1e-3)

    least = (hidden.numel() + weight.numel()) * dtype.itemsize + count * 12
    peers = _peers(hidden, weight, temperature, softcap) if device == "cuda" else {}
    return Work(run, least, 2 * count * width * vocab, peers=peers, check=check)


def _peers(hidden: Tensor, weight: Tensor, temperature: float, softcap: float) -> dict[str, Callable]:
    """Write the logits, then sample."""

    def logits():
        x = hidden @ weight.T
        return softcap * torch.tanh(x / softcap) if softcap else x

    def plain():
        if temperature == 0:
            return logits().argmax(-1)
        return torch.multinomial((logits().float() / temperature).softmax(-1), 1)

    def gumbel():
        x = logits().float()
        return (x / max(temperature, 1e-6) - torch.empty_like(x).exponential_().log()).argmax(-1)

    return {
        "bare product": lambda: hidden @ weight.T,
        "torch": plain,
        "torch.compile": torch.compile(plain),
        "torch.compile, Gumbel": torch.compile(gumbel),
        "product, then our sample_tokens": lambda: rows_kernel.sample(
            logits(), temperature, 0, 1.0, 0.0, SEED, OFFSET, None
        ),
    }
