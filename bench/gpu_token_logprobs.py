"""GPU cases of token_logprobs: forward and backward apart, each dtype and each path of the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import token_logprobs as kernel
from torch import Tensor

from fastalign import empty, reference
from fastalign.ops.token_logprobs import OUTPUTS

TOKENS = 8192
IGNORED = -100
STATISTICS = ("", " entropy", " statistics")


def cases() -> Iterator[KernelCase]:
    b16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for vocab, dtype, softcap, statistics in (
        (151_936, b16, 0.0, 0),
        (151_936, b16, 0.0, empty.ENTROPY),
        (151_936, b16, 0.0, empty.ALL),
        (248_320, b16, 0.0, 0),
        (128_256, f16, 0.0, 0),
        (128_256, f16, 0.0, empty.ALL),
        (49_152, f32, 0.0, 0),
        (49_152, f32, 0.0, empty.ALL),
        (128_256, b16, 30.0, 0),
        (128_256, b16, 30.0, empty.ALL),
        (50_257, b16, 0.0, 0),  # no row but the first begins at a multiple of 16 bytes
        (50_257, b16, 0.0, empty.ALL),
    ):
        name = f"V {vocab:,} {str(dtype)[6:]}{' softcap' * (softcap != 0)}{STATISTICS[statistics]}"
        options = (vocab, dtype, softcap, statistics)
        yield KernelCase(f"forward {name}", partial(_forward, *options))
        if statistics != empty.ENTROPY:  # the backward pass does not know one from all
            yield KernelCase(f"backward {name}", partial(_backward, *options))
    yield KernelCase("backward in place V 151,936 bfloat16", partial(_backward, 151_936, b16, 0.0, 0, in_place=True))


def _inputs(vocab: int, dtype: torch.dtype, device: str, small: bool) -> tuple[Tensor, Tensor]:
    rows, vocab = (3, vocab // 16 + 5) if small else (TOKENS, vocab)
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    labels = torch.empty(rows, dtype=torch.int64, device=device)
    if device != "meta":
        logits.normal_(0, 3)
        labels.random_(0, vocab)
    return logits, labels


def _forward(vocab: int, dtype: torch.dtype, softcap: float, statistics: int, device: str, small: bool) -> Work:
    logits, labels = _inputs(vocab, dtype, device, small)

    def run():
        return kernel.forward(logits, labels, 1.0, softcap, IGNORED, statistics)

    def check():
        log_probs, _, _, *rest = run()
        result = (log_probs, *rest)[: (1, 2, 5)[statistics]]
        for rows in _chunks(logits):
            truth = reference.token_logprobs(logits[rows].double(), labels[rows], 1.0, softcap or None)
            for name, ours in zip(OUTPUTS, result, strict=False):
                torch.testing.assert_close(ours[rows].to(truth[name].dtype), truth[name], rtol=1e-5, atol=1e-5)

    per_row = 8 + 3 * 4 + (0, 4, 3 * 4 + 1)[statistics]
    return Work(
        run, _size(logits) + len(labels) * per_row, check=check, peers=_peers(logits, labels, softcap, statistics)
    )


def _backward(
    vocab: int, dtype: torch.dtype, softcap: float, statistics: int, device: str, small: bool, in_place: bool = False
) -> Work:
    logits, labels = _inputs(vocab, dtype, device, small)
    grad = torch.empty(len(labels), dtype=torch.float32, device=device)
    if device != "meta":
        grad.normal_()
    if device == "meta":
        forward = empty.token_logprobs(logits, labels, statistics=statistics)
    else:
        forward = kernel.forward(logits, labels, 1.0, softcap, IGNORED, statistics)
    _, row_max, row_sum, entropy, *_ = forward
    grad_entropy = 0.1 * grad
    small_ones = (grad, grad_entropy, row_max, row_sum, entropy)

    def run(out: Tensor | None = logits if in_place else None):
        return kernel.backward(*small_ones, logits, labels, 1.0, softcap, IGNORED, statistics, out=out)

    def check():
        given = logits.clone()
        result = run()
        for rows in _chunks(given):
            x = given[rows].double().requires_grad_()
            truth = reference.token_logprobs(x, labels[rows], 1.0, softcap or None)
            loss = truth["log_probs"] @ grad[rows].double()
            if statistics:
                loss = loss + truth["entropy"] @ grad_entropy[rows].double()
            loss.backward()
            torch.testing.assert_close(result[rows].double(), x.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)

    per_row = 8 + 3 * 4 + (statistics > 0) * 2 * 4
    peers = {} if in_place else _backward_peers(logits, labels, grad, grad_entropy, softcap, statistics)
    return Work(run, 2 * _size(logits) + len(labels) * per_row, check=check, peers=peers)


def _chunks(logits: Tensor) -> Iterator[slice]:
    for start in range(0, len(logits), 256):
        yield slice(start, start + 256)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _peers(logits: Tensor, labels: Tensor, softcap: float, statistics: int) -> dict[str, Callable]:
    """Peers' log-probabilities, and with `statistics` the entropy, as callables that take the logits."""
    if not logits.is_cuda or softcap:
        return {}

    def plain(x):
        log_p = torch.log_softmax(x.float(), -1)
        picked = log_p.gather(-1, labels[:, None])[:, 0]
        return (picked, -(log_p.exp() * log_p).sum(-1)) if statistics else picked

    result = {"torch": plain, "torch.compile": torch.compile(plain)}
    if find_spec("trl"):

        def trl(x):
            from trl.trainer import utils

            return (utils.selective_log_softmax_and_entropy if statistics else utils.selective_log_softmax)(x, labels)

        result["TRL"] = trl
    if find_spec("flash_attn") and not statistics:

        def flash_attention(x):
            from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

            return -cross_entropy_loss(x, labels)[0]

        result["Flash-Attention"] = flash_attention
    if find_spec("liger_kernel") and not statistics:
        # It writes the gradient over the logits in the same launch, so it gets its own copy.
        own = logits.clone()

        def liger(_):
            from liger_kernel.transformers.functional import liger_cross_entropy

            return -liger_cross_entropy(own, labels, reduction="none")

        result["Liger-Kernel (with gradient)"] = liger
    return {name: partial(call, logits) for name, call in result.items()}


def _backward_peers(
    logits: Tensor, labels: Tensor, grad: Tensor, grad_entropy: Tensor, softcap: float, statistics: int
) -> dict[str, Callable]:
    """Peers' backward pass alone: their forward pass runs here, and its graph is kept."""
    requested = logits.detach().requires_grad_() if logits.is_cuda else logits
    result = {}
    for name, call in _peers(requested, labels, softcap, statistics).items():
        if "Liger" not in name:
            result[name] = _Later(call, requested, (grad, grad_entropy) if statistics else (grad,))
    return result


class _Later:
    """The forward pass at the first call, the backward pass at each: memory is not allocated before its turn."""

    def __init__(self, call: Callable, logits: Tensor, grads: tuple[Tensor, ...]):
        self.call, self.logits, self.grads, self.outputs = call, logits, grads, None

    def __call__(self):
        if self.outputs is None:
            self.outputs = self.call()
        outputs = self.outputs if isinstance(self.outputs, tuple) else (self.outputs,)
        grads = [g.to(x.dtype) for g, x in zip(self.grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, self.logits, grads, retain_graph=True)
