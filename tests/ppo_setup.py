"""What the PPO tests share: a tiny policy, its rollouts, a trainer."""

from __future__ import annotations

import torch
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign.train.ppo import PPOConfig, PPOTrainer
from fastalign.train.value_head import AutoModelForCausalLMWithValueHead


def policy(kind="llama", dtype=torch.float64, seed=0, peft=None, scale=20.0):
    """A tiny policy whose value head is far from 0."""
    torch.manual_seed(seed)
    base = tiny_causal_lm(tiny_tokenizer(), kind=kind, dtype=dtype, seed=seed, scale=scale)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=peft, v_head_init_strategy="normal")
    return model


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def rollouts(count=4, seed=0, lengths=None):
    """Ragged queries and responses (a response of one token among them), and scores."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [(3 + i % 3, 1 if i == 1 else 2 + i % 4) for i in range(count)]
    draw = lambda n: torch.randint(3, 250, (n,), generator=generator)  # noqa: E731
    queries, responses = [draw(q) for q, _ in lengths], [draw(r) for _, r in lengths]
    scores = [torch.tensor(float(x)) for x in torch.randn(count, generator=generator)]
    return queries, responses, scores


def trainer(model=None, ref_model=None, *, rate=1.0, optimizer="sgd", dataset=None, collator=None, **options):
    """A trainer with plain SGD, so that a step's change of the weights is its gradient."""
    model = policy() if model is None else model
    options = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "learning_rate": rate} | options
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    return PPOTrainer(
        PPOConfig(**options),
        model,
        ref_model,
        tiny_tokenizer(),
        dataset=dataset,
        data_collator=collator,
        optimizer=kind([p for p in model.parameters() if p.requires_grad], lr=rate),
    )


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
