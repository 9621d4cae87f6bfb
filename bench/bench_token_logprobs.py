"""token_logprobs against TRL's selective_log_softmax and plain log_softmax + gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.common import Case
from fastalign.ops import token_logprobs


def cases() -> Iterator[Case]:
    from trl.trainer.utils import selective_log_softmax

    def plain(logits, labels):
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    for vocab in (49_152, 151_936):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            logits = (torch.randn(4, 128, vocab) * 3).to(dtype)
            labels = torch.randint(0, vocab, (4, 128))
            name = f"512 × {vocab:,} {str(dtype).removeprefix('torch.')}"

            def check(logits=logits, labels=labels):
                truth = plain(logits[:1].double(), labels[:1])
                error = (token_logprobs(logits[:1], labels[:1]) - truth).abs().max()
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
                {trl: forward(selective_log_softmax), torchs: forward(plain)}, {trl: 7}, size, check,
            )  # fmt: skip
            yield Case(
                f"{name}, forward + backward", both(token_logprobs),
                {trl: both(selective_log_softmax), torchs: both(plain)}, {trl: 10}, 3 * size,
            )  # fmt: skip
