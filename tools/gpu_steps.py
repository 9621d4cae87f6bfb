"""What whole steps take of a GPU that need not be there: a decoded token, and a step of training, of a 1B Llama.

    TRITON_INTERPRET=1 python tools/gpu_steps.py

Each is traced on "meta" tensors (`gpu_costs`), in bfloat16; its bytes and operations are counted from the shapes.
Prints JSON, which `gpu_roofline.py` puts into its page. The interpreter runs the trials that choose how a layer is
computed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gpu_costs
import numpy as np
import torch
from fastalign.bench import shapes

from fastalign.backend import use_backend
from fastalign.decode.shared_prompt import SharedPromptEngine
from fastalign.decode.token_loop import Job
from fastalign.models.packing import NAME, halves, packed, packed_hidden, register
from fastalign.ops import linear_token_logprobs

PROMPT, OWN, COMPLETION = 256, 32, 128  # tokens


@dataclass(frozen=True)
class Step:
    """bytes: that must move; flops: of its products; launches, waits and peak memory (bytes): as traced."""

    name: str
    bytes: int
    flops: int
    launches: int
    waits: int
    peak: int


def step_of(name: str, size: int, flops: int, costs: gpu_costs.Traced) -> Step:
    return Step(name, size, flops, costs.launches, costs.waits.total(), costs.bytes)


def steps(shape: str = "1B") -> Iterator[Step]:
    with torch.device("meta"):
        model: Any = shapes.llama(shape, torch.bfloat16).eval()
    size = sum(p.numel() for p in model.parameters())
    for prompts in (1, 8, 64):
        yield decoded(model, size, prompts, 64)
    yield trained(model, size, pairs=16)


def decoded(model: Any, size: int, prompts: int, each: int) -> Step:
    config, rows = model.config, prompts * each
    with torch.no_grad(), use_backend("triton"):
        engine = SharedPromptEngine(model, rows)
        engine.prefill({p: list(range(3, 3 + PROMPT)) for p in range(prompts)})
        engine.admit([Job(p, c) for c in range(each) for p in range(prompts)])
        engine.place(0, torch.zeros(rows, dtype=torch.int64, device="meta"))
        engine.step()  # tries how the layers can be computed, and lays the prompts together
        engine.place(0, torch.zeros(rows, dtype=torch.int64, device="meta"))
        costs = gpu_costs.traced(engine.step)
    width = config.num_key_value_heads * config.head_dim
    keys = 2 * 2 * config.num_hidden_layers * width * (prompts * PROMPT + rows * OWN)
    attention = 4 * config.num_hidden_layers * rows * config.hidden_size * (PROMPT + OWN)
    embedding = config.vocab_size * config.hidden_size
    name = f"decode: one token of {prompts} × {each} candidates"
    return step_of(name, 2 * (size - embedding) + keys, 2 * (size - embedding) * rows + attention, costs)


def trained(model: Any, size: int, pairs: int) -> Step:
    """Forward and backward passes over packed pairs: a prompt with two completions each."""
    register()
    model.set_attn_implementation(NAME)
    length = PROMPT + COMPLETION
    ids = torch.arange(2 * pairs * length).reshape(2 * pairs, length)
    ids[pairs:, :PROMPT] = ids[:pairs, :PROMPT]
    pack = packed(ids.numpy(), np.ones(ids.shape), halves(2 * pairs), torch.device("meta"))
    labels = torch.zeros(2 * pairs * COMPLETION, dtype=torch.int64, device="meta")

    def step() -> None:
        hidden = packed_hidden(model, pack)
        picked = hidden.index_select(0, torch.zeros_like(labels))
        with use_backend("triton"):
            scores = linear_token_logprobs(picked, model.lm_head.weight, labels)
        scores.sum().backward()

    step()  # makes what is kept, and the gradients
    costs = gpu_costs.traced(step)
    config, tokens = model.config, pack.input_ids.shape[1]
    head = config.vocab_size * config.hidden_size
    name = f"train: {pairs} packed pairs of {PROMPT} + 2 × {COMPLETION} tokens, forward and backward"
    return step_of(name, 6 * size, 6 * (size - 2 * head) * tokens + 8 * head * len(labels), costs)


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(step) for step in steps()]))
