"""token_logprobs against TRL's selective_log_softmax and plain log_softmax + gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastalign.bench.common import Case

from fastalign.ops import token_logprobs


def cases() -> Iterator[Case]:
    from trl.trainer.utils import selective_log_softmax

    def plain(logits, labels):
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    # One sequence of 512 tokens; and four of 128, where TRL's loop over sequences makes smaller temporaries.
    shapes = [(1, 512, 49_152), (4, 128, 49_152), (1, 512, 151_936)]
    for batch, length, vocab in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            logits = (torch.randn(batch, length, vocab) * 3).to(dtype)
            labels = torch.randint(0, vocab, (batch, length))
            name = f"{batch} × {length} × {vocab:,} {str(dtype).removeprefix('torch.')}"
            bars = batch == 1

            def check(logits=logits, labels=labels):
                part = logits[:1, :64], labels[:1, :64]
                error = (token_logprobs(*part) - plain(part[0].double(), part[1])).abs().max()
                assert error < 1e-5, error

            def forward(f, logits=logits, labels=labels):
                return lambda: f(logits, labels)

            def both(f, logits=logits, labels=labels):
                leaf = logits.detach().requires_grad_()

                def run():
                    leaf.grad = None
                    f(leaf, labels).sum().backward()

                return run

            size = logits.numel() * logits.element_size()
            trl, torchs = "TRL selective_log_softmax", "log_softmax + gather"
            yield Case(
                f"{name}, forward", forward(token_logprobs),
                {trl: forward(selective_log_softmax), torchs: forward(plain)}, {trl: 7} if bars else {}, size, check,
            )  # fmt: skip
            yield Case(
                f"{name}, forward + backward", both(token_logprobs),
                {trl: both(selective_log_softmax), torchs: both(plain)}, {trl: 10} if bars else {}, 3 * size,
            )  # fmt: skip
