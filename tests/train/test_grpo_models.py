"""One GRPO step of every causal language model of transformers has the gradient of a plain forward pass."""

import random

import pytest
import torch
from causal_models import build, model_types
from grpo_setup import trainer
from turns import by_the_day

from fastalign.losses import group_advantages
from fastalign.train import GRPOTrainer
from fastalign.train.dropout import disable_dropout

RATE = 1e-2
# Their gradients are random beside dropout's, or they do not run on token ids alone.
LEFT_OUT = {"big_bird", "gemma4_unified_assistant", "phimoe", "reformer", "xlstm"}


def drawn(prompts, trainer):
    """Groups of four, with prompts and completions of several lengths."""
    draw = random.Random(0)
    ids = [[draw.randrange(5, 300) for _ in range(5 + group)] for group in range(len(prompts) // 4)]
    return {
        "prompt_ids": [ids[i // 4] for i in range(len(prompts))],
        "completion_ids": [[draw.randrange(5, 300) for _ in range(3 + i % 3)] for i in range(len(prompts))],
        "logprobs": None,
    }


def score(completions, **others):
    return [float(i * 7 % 5) for i in range(len(completions))]


def plain_loss(model, rollouts):
    scores = torch.tensor(score(rollouts["completion_ids"]), dtype=torch.float64)
    advantages = group_advantages(scores.view(-1, 4, 1), how="grpo").flatten().tolist()
    loss, tokens = 0.0, sum(map(len, rollouts["completion_ids"]))
    for prompt, ids, advantage in zip(rollouts["prompt_ids"], rollouts["completion_ids"], advantages, strict=True):
        row = torch.tensor([[*prompt, *ids]])
        logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        log_probs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)[range(len(ids)), ids]
        loss = loss - ((log_probs - log_probs.detach()).exp() * advantage).sum() / tokens
    return loss


@pytest.mark.parametrize("name", by_the_day([name for name in model_types() if name not in LEFT_OUT], 24))
def test_its_gradient_is_the_plain_ones(name, tmp_path):
    try:
        model, plain = build(name), build(name)
    except Exception as error:  # each class has its own reason
        pytest.skip(f"not built small: {error}")
    plain.load_state_dict(model.state_dict())
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "disable_dropout": True}
    options |= {"lr_scheduler_type": "constant"}
    more = {"rollout_func": drawn}
    trainer(GRPOTrainer, None, tmp_path, model=model, rewards=[score], more=more, **options).train()
    disable_dropout(plain.train())
    plain_loss(plain, drawn([""] * 8, None)).backward()
    for (part, ours), p in zip(model.named_parameters(), plain.parameters(), strict=True):
        if p.grad is not None:
            apart = (p.data - RATE * p.grad - ours.data).abs().max() / RATE
            assert apart <= 5e-3 * p.grad.abs().max() + 1e-4, part
