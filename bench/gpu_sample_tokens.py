"""sample_tokens on the GPU: a batch of last logits, with and without filters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from fastalign.bench.gpu_common import KernelCase, Work

from fastalign import reference

CHECKED = 64  # rows checked, from the first on: a row's index is its stream
FILTERS = (
    {},
    {"temperature": 0.0},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 5000},
)


def cases() -> Iterator[KernelCase]:
    for options in FILTERS:
        yield case(256, 151_936, torch.bfloat16, options)
    for options in ({}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9}):
        yield case(256, 248_320, torch.bfloat16, options, rows_given=True)
        yield case(1024, 49_152, torch.float32, options)
        yield case(256, 128_256, torch.float16, options)
    yield case(1, 128_256, torch.bfloat16, {})
    yield case(1, 128_256, torch.bfloat16, {"top_k": 50, "top_p": 0.9})
    yield case(64, 49_152, torch.float64, {})
    yield case(64, 49_152, torch.float64, {"top_k": 50, "top_p": 0.9, "min_p": 0.05})


def case(rows: int, vocab: int, dtype: torch.dtype, options: dict, rows_given: bool = False) -> KernelCase:
    flat = options.get("top_k", 0) > 1000 or ("top_p" in options and "top_k" not in options)  # read many times

    def build(device: str, small: bool) -> Work:
        from fastalign.kernels.sample_tokens import sample

        count = min(rows, 2) if small else rows
        width = min(vocab, 20_001) if small and flat else vocab
        logits = (torch.randn(count, width, device=device) * 3).to(dtype)
        streams = torch.arange(count, device=device) if rows_given else None
        chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options

        def run():
            return sample(logits, *chosen.values(), 1, 0, streams)

        return Work(
            run,
            bytes=logits.nbytes + count * (12 if dtype != torch.float64 else 16) + (count * 8 if rows_given else 0),
            peers=peers(logits, options) if device == "cuda" else {},
            check=lambda: check(logits[:CHECKED], chosen, *(x[:CHECKED] for x in run())),
        )

    message = ", ".join(f"{name} {value}" for name, value in options.items()) or "no filter"
    name = f"{rows:,} × {vocab:,}, {str(dtype).removeprefix('torch.')}, {message}{', streams given' * rows_given}"
    return KernelCase(name, build, streaming=not (options.keys() - {"temperature"}))


def check(logits, options, ids, log_probs) -> None:
    """The log-probabilities are those of the distribution, and the ids are the reference's, except where rounding
    decides."""
    theirs, truth = reference.sample_tokens(logits.double(), *options.values(), 1, 0)
    agree = ids == theirs
    assert agree.double().mean() > 0.95, agree
    error = (log_probs - truth)[agree].abs().max()
    assert error < 1e-3, error
    if options["temperature"] > 0:
        assert reference.survivors(logits.double(), *options.values()).gather(1, ids[:, None]).double().mean() > 0.95


def peers(logits, options):
    if options.get("temperature") == 0.0:
        return {"argmax": lambda: logits.argmax(-1)}
    kinds = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}
    chain = {kind: options[name] for name, kind in kinds.items() if name in options}

    @functools.cache
    def warpers():
        if not chain:
            return []
        from transformers.generation import logits_process

        return [getattr(logits_process, kind)(value) for kind, value in chain.items()]

    def warped():
        scores = logits.float()
        for warper in warpers():
            scores = warper(None, scores)
        return scores.softmax(-1).multinomial(1)

    result = {"transformers' warpers + softmax + multinomial" if chain else "softmax + multinomial": warped}
    if options.keys() == {"top_k"}:

        def top():
            values, ids = logits.topk(options["top_k"])
            return ids.gather(1, values.float().softmax(-1).multinomial(1))

        result["topk + softmax + multinomial"] = top
    return result | flashinfer(logits, options) | vllm(logits, options)


def flashinfer(logits, options):
    known = ((), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"))
    if find_spec("flashinfer") is None or tuple(options) not in known:
        return {}
    values = tuple(options.values())

    def draw():
        from flashinfer import sampling

        p = logits.float().softmax(-1)
        if not values:
            return sampling.sampling_from_probs(p)
        more = {"filter_apply_order": "top_k_first"} if len(values) > 1 else {}
        return getattr(sampling, f"{'_'.join(options)}_sampling_from_probs")(p, *values, **more)

    return {"flashinfer": draw}


def vllm(logits, options):
    if find_spec("vllm") is None or not options or options.keys() - {"top_k", "top_p"}:
        return {}
    dtypes = {"top_k": torch.int32, "top_p": torch.float32}
    k, p = (
        torch.full((len(logits),), options[name], dtype=dtype, device=logits.device) if name in options else None
        for name, dtype in dtypes.items()
    )

    def draw():
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        probs = apply_top_k_top_p(logits.float(), k, p).softmax(-1)
        return probs.div_(torch.empty_like(probs).exponential_()).argmax(-1)

    return {"vLLM": draw}
