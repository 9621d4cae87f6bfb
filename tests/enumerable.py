"""A model so small that every text it can write is enumerated: p0 and p_λ exactly."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from fastalign import rewards
from fastalign.decode import Sampler

LETTERS, END, BEGIN, LIMIT = "abcd", 4, 5, 4
PROMPT = "_"


class Letters:
    """One token a letter; END is written as nothing."""

    eos_token_id, pad_token_id, chat_template = END, BEGIN, None

    def __call__(self, texts, **_):
        return {"input_ids": [[BEGIN] for _ in texts]}

    def decode(self, ids, **_):
        return "".join(LETTERS[i] for i in ids if i < len(LETTERS))


def sampler() -> Sampler:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=BEGIN,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config).eval()
        head = torch.nn.Linear(16, 6)  # with a bias, so that BEGIN is never drawn again
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight * 12)
        head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, -0.7, -1e9]))
    model.lm_head = head
    return Sampler(model, Letters())


def worth(text: str) -> float:
    """Not a sum over letters, and its beginnings tell of it without deciding it."""
    return text.count("a") - 0.5 * text.count("c") + 1.5 * ("db" in text) - 0.8 * text.endswith("a")


WORTH = rewards.from_function(lambda prompts, texts: [worth(text) for text in texts], "worth")


@torch.no_grad()
def law(model) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Every sequence (END included where it ends so) and its probability under the model."""
    whole = torch.tensor([[BEGIN, *ids] for ids in itertools.product(range(5), repeat=LIMIT)])
    logp = model(input_ids=whole).logits.log_softmax(-1)[:, :-1].gather(2, whole[:, 1:, None]).squeeze(2).double()
    result = {}
    for ids, steps in zip(whole[:, 1:].tolist(), logp.tolist(), strict=True):
        length = ids.index(END) + 1 if END in ids else LIMIT
        result[tuple(ids[:length])] = sum(steps[:length])
    return list(result), np.exp(np.array(list(result.values())))
