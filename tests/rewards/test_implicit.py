"""DPO's implicit reward, by reference and in Python."""

import numpy as np
import pytest
from test_reward_models import PROMPTS, RESPONSES, TEMPLATE, llama, mean_logprob, tokenizer

from fastalign import UserError, rewards


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
def test_it_is_the_ratio_of_the_responses_probabilities(tmp_path, template):
    import torch

    tok, models = tokenizer(template), []
    for i, name in enumerate(("tuned", "base")):
        model = llama("causal")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 0.3 * i)
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
        models.append(model)
    reference = f"implicit[model={tmp_path / 'tuned'},reference={tmp_path / 'base'},beta=0.5]"
    scores = rewards.score(reference, PROMPTS, RESPONSES)[:, 0]
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores, strict=True):
        target = tok(response, add_special_tokens=False)["input_ids"]
        written = f"user {prompt} <eos> assistant" if template else prompt
        context = tok(written, add_special_tokens=template is None)["input_ids"]
        totals = [mean_logprob(model, context, target) * len(target) if target else 0.0 for model in models]
        assert score == pytest.approx(0.5 * (totals[0] - totals[1]), abs=2e-5)
    assert np.ptp(scores) > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model must name a model, as in implicit"),
        ({"model": "a"}, "reference must name a model"),
        ({"model": "a", "reference": "b", "beta": 0}, "beta must be a number > 0, got 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        rewards.get("implicit", **options)
