"""GPU cases of linear_token_logprobs: forward and backward as one call, and the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from fastalign.bench.gpu_common import KernelCase, Work
from fastalign.kernels import linear_token_logprobs as kernel
from torch import Tensor

from fastalign import reference
from fastalign.empty import ALL, ENTROPY

IGNORED = -100
STATISTICS = ("", "entropy", "statistics")
CHECKED = 512  # rows of a check, and entries of the weight's gradient


@dataclass(frozen=True)
class Setting:
    """One configuration of the head."""

    tokens: int = 8192
    width: int = 4096
    vocab: int = 151_936
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype | None = None
    frozen: bool = False
    statistics: int = 0
    softcap: float = 0.0
    bias: bool = False
    rank: int = 0
    grad_filter: float = 0.0
    backward: bool = True
    budget: int = 0  # bytes for tiles kept from the forward pass

    @property
    def name(self) -> str:
        parts = [
            "forward and backward" if self.backward else "forward",
            f"{self.tokens:,} × {self.width:,} × {self.vocab:,}",
        ]
        parts += [str(self.dtype)[6:], f"weight {str(self.weight_dtype)[6:]}" if self.weight_dtype else ""]
        parts += ["frozen" if self.frozen else "", STATISTICS[self.statistics], "bias" if self.bias else ""]
        parts += ["softcap" if self.softcap else "", f"adapter {self.rank}" if self.rank else ""]
        parts += ["filter 2^-12" if self.grad_filter else "", f"budget {self.budget >> 20:,} MB" if self.budget else ""]
        return " ".join(part for part in parts if part)


def cases() -> Iterator[KernelCase]:
    f16, f32, b16 = torch.float16, torch.float32, torch.bfloat16
    first = "≤ 60 ms and < 3.9 GiB (bare products 42 ms; TRL's aim 60–80 ms at about 6 GiB; Liger 192 ms, 6.1 GiB)"
    published = {
        Setting(): first,
        Setting(tokens=16_384, width=2048, vocab=248_320): "≤ 90 ms and 3.1 GB (CCE 92.6 ms)",
        Setting(vocab=131_072, statistics=ENTROPY): "Liger's CuTe kernel 50.2 ms",
    }
    more = [
        Setting(budget=4 << 30),
        Setting(backward=False),
        Setting(frozen=True),
        Setting(statistics=ALL),
        Setting(frozen=True, statistics=ALL, rank=16),
        Setting(statistics=ALL, vocab=128_256, softcap=30.0, bias=True),
        Setting(statistics=ENTROPY, budget=1 << 30),
        Setting(dtype=f16, vocab=128_256, budget=4 << 30),
        Setting(grad_filter=2.0**-12),
        Setting(rank=16, vocab=128_256),
        Setting(dtype=f16, vocab=128_256),
        Setting(dtype=f16, vocab=128_256, frozen=True),
        Setting(dtype=f32, tokens=2048, width=576, vocab=49_152),
        Setting(dtype=f32, tokens=2048, width=576, vocab=49_152, frozen=True, statistics=ALL),
        Setting(dtype=b16, weight_dtype=f32, tokens=2048, width=576, vocab=49_152),
        Setting(tokens=16, backward=False),
        Setting(tokens=64, backward=False),
        Setting(width=4090, vocab=50_257, tokens=2048),  # no row of the weight begins at a multiple of 16 bytes
    ]
    for setting in (*published, *more):
        yield KernelCase(setting.name, partial(_build, setting), streaming=False, published=published.get(setting, ""))


def _build(setting: Setting, device: str, small: bool) -> Work:
    tokens, width, vocab = setting.tokens, setting.width, setting.vocab
    if small:
        tokens, width, vocab = 40, 72, 700
    make = partial(torch.empty, device=device)
    hidden, weight = (
        make(tokens, width, dtype=setting.dtype),
        make(vocab, width, dtype=setting.weight_dtype or setting.dtype),
    )
    bias = make(vocab, dtype=weight.dtype) if setting.bias else None
    a = make(setting.rank, width, dtype=weight.dtype) if setting.rank else None
    b = make(vocab, setting.rank, dtype=weight.dtype) if setting.rank else None
    labels, grad = make(tokens, dtype=torch.int64), make(tokens)
    if device != "meta":
        for x, scale in (
            (hidden, 1.0),
            (weight, 3 * width**-0.5),
            (bias, 1.0),
            (a, width**-0.5),
            (b, 0.5),
            (grad, 1.0),
        ):
            if x is not None:
                x.normal_(0, scale)
        labels.random_(0, vocab)
    head = (hidden, weight, bias, a, b, labels, 2.0, 1.0, setting.softcap, 1.0, IGNORED)
    needs = [True] + [x is not None and not setting.frozen for x in (weight, bias, a, b)]
    grad_entropy = 0.1 * grad if setting.statistics else torch.zeros_like(grad)

    def run():
        unit = setting.backward and setting.frozen
        log_probs, row_max, row_sum, entropy, *_, kept, unit = kernel.forward(
            *head, setting.statistics, unit, setting.budget
        )
        if not setting.backward:
            return log_probs, entropy
        given = (grad, grad_entropy, row_max, row_sum, entropy, kept, unit)
        return log_probs, entropy, *kernel.backward(*given, *head, setting.grad_filter, needs)

    products = (
        1
        + setting.backward * (1 if setting.frozen else 3 - _kept_share(setting, hidden, weight, labels))
        + 2 * (setting.backward and setting.frozen and setting.statistics)
    )
    size = sum(x.numel() * x.element_size() for x in (hidden, weight, bias, a, b) if x is not None)
    least = (
        size
        + tokens * 20
        + setting.backward
        * sum(x.numel() * x.element_size() for x, need in zip((hidden, weight, bias, a, b), needs, strict=True) if need)
    )
    return Work(
        run,
        least,
        round(2 * products * tokens * width * vocab),
        peers=_peers(setting, hidden, weight, labels, grad) if device == "cuda" else {},
        check=partial(_check, setting, run, head, grad, grad_entropy),
    )


def _kept_share(setting: Setting, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Of the logits, which the backward pass then does not make."""
    fits, whole = (kernel.kept_size(hidden, weight, labels, 0.0, budget) for budget in (setting.budget, 1 << 60))
    return fits / whole


def _check(setting: Setting, run: Callable, head: tuple, grad: Tensor, grad_entropy: Tensor) -> None:
    """The first rows' results and hidden gradient, and a slice of the weight's gradient, to which all rows
    contribute."""
    hidden, weight, bias, a, b, labels = head[:6]
    log_probs, entropy, *grads = run()
    wide = lambda x: None if x is None else x.double()  # noqa: E731
    eps = torch.finfo(hidden.dtype if hidden.dtype == weight.dtype else torch.float32).eps
    close = partial(torch.testing.assert_close, check_dtype=False)
    adapter = None if a is None else (wide(a), wide(b), 2.0)
    some = torch.zeros(min(CHECKED, len(weight)), weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(labels), CHECKED):
        rows = slice(start, start + CHECKED)
        x, w = wide(hidden[rows]).requires_grad_(), wide(weight)[: len(some)].requires_grad_()
        rest = wide(weight)[len(some) :]
        truth = reference.linear_token_logprobs(
            x, torch.cat([w, rest]), labels[rows], wide(bias), 1.0, setting.softcap or None, 1.0, IGNORED, adapter
        )
        low = 0 if a is None else 30 * eps  # the adapter's first product is rounded
        close(log_probs[rows], truth["log_probs"], rtol=1e-5 + low, atol=1e-4 + low)
        if setting.statistics:
            close(entropy[rows], truth["entropy"], rtol=1e-5 + low, atol=1e-4 + low)
        if not setting.backward:
            continue
        loss = truth["log_probs"] @ grad[rows].double()
        if setting.statistics:
            loss = loss + truth["entropy"] @ grad_entropy[rows].double()
        loss.backward()
        some += w.grad
        if not setting.grad_filter:
            _near(grads[0][rows], x.grad, 4 * max(eps, torch.finfo(hidden.dtype).eps) + low + 1e-5)
    if setting.backward and not setting.frozen:
        _near(
            grads[1][: len(some)],
            some,
            (0.05 if setting.grad_filter else 4 * eps) + 30 * eps * bool(setting.rank) + 1e-5,
        )


def _near(found: Tensor, truth: Tensor, error: float) -> None:
    """By relative norm: each entry is a sum of many rounded terms."""
    off = (found.double() - truth).norm() / truth.norm()
    assert off < error, f"relative error {off:.2e}, {error:.2e} allowed"


def _peers(setting: Setting, hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> dict[str, Callable]:
    """Peers' per-token log-probabilities (with statistics: and entropies) and their gradients."""
    if setting.grad_filter or setting.rank or setting.softcap or setting.bias or setting.weight_dtype:
        return {}
    x = hidden.detach().requires_grad_(setting.backward)
    w = weight.detach().requires_grad_(setting.backward and not setting.frozen)

    def plain(x, w):
        logits = F.linear(x, w).float()
        scores = -F.cross_entropy(logits, labels, reduction="none")
        if not setting.statistics:
            return (scores,)
        log_p = logits.log_softmax(-1)
        return scores, -(log_p.exp() * log_p).sum(-1)

    def whole(score):
        def call():
            with torch.set_grad_enabled(setting.backward):
                result = score(x, w)
                if setting.backward:
                    wanted = [t for t in (x, w) if t.requires_grad]
                    factors = [grad.to(result[0].dtype), 0.1 * grad][: len(result)]
                    return torch.autograd.grad(result, wanted, factors)
                return result

        return call

    result = {
        "bare products": _bare(setting, hidden, weight),
        "torch": whole(plain),
        "torch.compile": whole(torch.compile(plain)),
    }
    if find_spec("trl"):
        requested = ("entropy",) if setting.statistics else ()

        def trl(x, w):
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction

            return ChunkedLogProbFunction.apply(x, w, None, labels, 1.0, 8192, None, 1.0, requested)[
                : 1 + len(requested)
            ]

        result["TRL"] = whole(trl)
    if find_spec("liger_kernel") and not setting.statistics:

        def liger(x, w):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return (liger_fused_linear_cross_entropy(x, w, labels).expand(len(labels)),)

        # It computes gradients only for a loss with equal weights: its time is compared, not its numbers.
        result["Liger-Kernel (equal weights)"] = whole(liger)
    if find_spec("liger_kernel"):

        def scaled(x, w):
            from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

            result = LigerFusedLinearScaledCrossEntropyFunction.apply(
                x, w, labels, 1.0, IGNORED, 1, bool(setting.statistics)
            )
            return (-result[0], result[1]) if setting.statistics else (-result,)

        result["Liger-Kernel, scaled"] = whole(scaled)
    if find_spec("quack") and not setting.statistics:

        def quack(x, w):
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            return (chunked_linear_cross_entropy(x, w, labels, reduction="sum").expand(len(labels)),)

        result["QuACK (equal weights)"] = whole(quack)
    if find_spec("cut_cross_entropy") and not setting.statistics:

        def cut(x, w, **options):
            from cut_cross_entropy import linear_cross_entropy

            return (-linear_cross_entropy(x, w, labels, reduction="none", **options),)

        result["Cut Cross-Entropy"] = whole(cut)
        result["Cut Cross-Entropy, exact"] = whole(partial(cut, filter_eps=None))
    return result


def _bare(setting: Setting, hidden: Tensor, weight: Tensor) -> Callable:
    """The floor: the products alone (logits; with gradients those of hidden and weight), a part at a time."""
    part = 16_384

    def call():
        total = torch.empty_like(hidden)
        for first in range(0, len(weight), part):
            w = weight[first : first + part]
            logits = hidden @ w.T
            if setting.backward:
                torch.mm(logits, w, out=total)
                if not setting.frozen:
                    logits.T @ hidden
        return total

    return call
