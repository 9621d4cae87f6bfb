"""GPU cases of whole jobs beside the kernels': the head under autocast and on a second device, decoding many
candidates, and training steps of DPO and GRPO, at the shape of a model of 1B parameters with random weights."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from fastalign.bench import dpo_job, grpo_job, shapes
from fastalign.bench.gpu_common import KernelCase, Work

from fastalign.ops import head, linear_token_logprobs

ROUNDS = 3  # of calls that take seconds
PROMPT, NEW = 256, 64  # tokens
AT_ONCE = 512  # rows of generate
TRAINING = {
    "dpo": (dpo_job.job, {}, 24 * 300),
    "grpo": (
        grpo_job.job,
        {"prompts": 8, "words": 96, "completions": 8, "new": NEW, "at_once": 64, "steps": 2},
        2 * 8 * (128 + 8 * NEW),
    ),
}  # job, options, about how many tokens it trains on


def cases() -> Iterator[tuple[str, KernelCase]]:
    for prompts in (8, 1, 64):
        yield "decode", KernelCase(f"{prompts} × 64, {NEW} new, 1B bfloat16", partial(_decode, prompts))
    for op in TRAINING:
        yield op, KernelCase("1B bfloat16", partial(_training, op))
    yield "autocast", KernelCase("forward and backward 8,192 × 4,096 × 151,936 float32 as bfloat16", _autocast)
    if torch.cuda.device_count() != 1:
        yield "second device", KernelCase("forward and backward 512 × 576 × 49,152, the first one current", _second)


def _decode(prompts: int, device: str, small: bool) -> Work:
    from fastalign.data.sampling import SamplingSettings
    from fastalign.decode import Sampler

    n, new, shape = (3, 4, "tiny") if small else (64, NEW, "1B")
    settings = SamplingSettings(n=n, max_new_tokens=new, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (prompts, 24 if small else PROMPT), generator=generator)

    @functools.cache
    def sampler() -> Any:
        made = Sampler(*shapes.model_of(shape))
        made.ends = frozenset()  # every candidate has the same length
        return made

    def run():
        return sampler().draw(ids.tolist(), settings)

    @torch.no_grad()
    def generate():
        model = sampler().model
        return [
            model.generate(
                part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, num_return_sequences=n,
                max_new_tokens=new, min_new_tokens=new,
            )
            for part in ids.to(model.device).split(max(1, AT_ONCE // n))
        ]  # fmt: skip

    @torch.no_grad()
    def check():
        tokens, log_probs = run()
        for prompt, drawn, scores in list(zip(ids, tokens, log_probs, strict=True))[:2]:
            rows = torch.cat([prompt.expand(n, -1), torch.tensor(drawn)], 1).to(sampler().model.device)
            logits = sampler().model(rows).logits[:, len(prompt) - 1 : -1].float()
            truth = -F.cross_entropy(logits.transpose(1, 2), rows[:, len(prompt) :], reduction="none")
            apart = (truth.cpu() - torch.tensor(scores)).abs().mean()
            assert apart < (1e-4 if sampler().model.dtype == torch.float32 else 0.1), apart

    peers = {"transformers generate": generate} | ({"vLLM": _vllm(sampler, ids, n, new)} if find_spec("vllm") else {})
    size = shapes.parameters(shape)
    least, products = 2 * size * new, 2 * size * prompts * (n * new + ids.shape[1])
    return Work(run, least, products, peers if device == "cuda" else {}, check, ROUNDS)


def _vllm(sampler: Callable[[], Any], ids: torch.Tensor, n: int, new: int) -> Callable[[], Any]:
    @functools.cache
    def engine():
        import vllm

        with tempfile.TemporaryDirectory() as folder:
            sampler().model.save_pretrained(folder)
            return vllm.LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.4)

    def call():
        import vllm

        one = vllm.SamplingParams(n=n, max_tokens=new, ignore_eos=True, detokenize=False)
        return engine().generate([{"prompt_token_ids": row} for row in ids.tolist()], one, use_tqdm=False)

    return call


def _training(op: str, device: str, small: bool) -> Work:
    job, options, tokens = TRAINING[op]
    least = {"prompts": 2, "words": 8, "completions": 2, "new": 4, "at_once": 4, "steps": 1}
    less = least if op == "grpo" else {"pairs": 4}
    options = options | (less if small else {}) | {"shape": "tiny" if small else "1B"}
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    @functools.cache
    def made(kind: str) -> Callable[[], dict]:
        return job(kind, dict(options), tempfile.mkdtemp())

    def check():
        ours, theirs = (made(kind)() for kind in ("fastalign", "trl"))
        for a, b in zip(*(one.get("known") or one["losses"] for one in (ours, theirs)), strict=True):
            assert abs(a - b) <= (1e-3 if device == "cpu" else 0.05) * max(1.0, abs(b)), (a, b)

    peers = {"TRL": lambda: made("trl")()} if device == "cuda" else {}
    return Work(lambda: made("fastalign")(), 0, 6 * shapes.parameters(options["shape"]) * tokens, peers, check, ROUNDS)


def _autocast(device: str, small: bool) -> Work:
    tokens, width, vocab = (40, 72, 700) if small else (8192, 4096, 151_936)
    hidden, weight = (torch.randn(*shape, device=device) for shape in ((tokens, width), (vocab, width)))
    weight *= 3 * width**-0.5
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.arange(tokens, device=device) % vocab

    def whole(score: Callable[[], torch.Tensor]) -> Any:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            scores = score()
        return scores, *torch.autograd.grad(scores.sum(), (hidden, weight))

    def ours():
        return linear_token_logprobs(hidden, weight, labels)

    def plain():
        return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    def check():
        with torch.autocast(hidden.device.type, torch.bfloat16):
            dtype = head.autocast_type(hidden.device, hidden.dtype)  # on a CPU its own
        rounded = linear_token_logprobs(hidden.to(dtype), weight.to(dtype), labels)
        torch.testing.assert_close(whole(ours)[0], rounded, rtol=1e-5, atol=1e-4)

    least = 2 * weight.nbytes + 2 * hidden.nbytes
    peers = {"torch": partial(whole, plain)} if device == "cuda" else {}
    return Work(partial(whole, ours), least, 2 * 4 * tokens * width * vocab, peers, check)


def _second(device: str, small: bool) -> Work:
    tokens, width, vocab = (40, 72, 700) if small else (512, 576, 49_152)
    other = "cuda:1" if device == "cuda" else device
    first = [torch.randn(*shape, device=device) for shape in ((tokens, width), (vocab, width))]
    second = [x.to(other) for x in first]

    def whole(hidden, weight):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        labels = torch.arange(tokens, device=hidden.device) % vocab
        scores = linear_token_logprobs(hidden, weight, labels)
        grads = torch.autograd.grad(scores.sum(), (hidden, weight))
        return [x.to(device) for x in (scores, *grads)]  # for which the first device waits

    def check():
        for here, there in zip(whole(*first), whole(*second), strict=True):
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)

    peers = {"on the first device": partial(whole, *first)} if device == "cuda" else {}
    return Work(partial(whole, *second), 2 * sum(x.nbytes for x in first), 2 * 4 * tokens * width * vocab, peers, check)
