"""Particles on a real architecture: copies share keys and values exactly, draws are reproducible, weights add up."""

import numpy as np
import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError, rewards
from fastalign.decode import Sampler, particles

VOWELS = rewards.from_function(lambda prompts, responses: [sum(map(t.count, "aeiou")) for t in responses], "vowels")
PROMPTS = ["the cat", "tell me a story of the big red dog", "why"]
JOB = {"n": 12, "lam": [0.7], "checkpoints": [2, 4, 7], "max_new_tokens": 10, "ess": 1.0, "seed": 4}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def sampler(request):
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, kind=request.param, scale=8.0)
    drawn = Sampler(model, tokenizer).sample(PROMPTS, n=12, max_new_tokens=10, seed=0).token_ids
    often = torch.tensor([token for row in drawn for ids in row for token in ids]).bincount().topk(3).indices
    model.generation_config.eos_token_id = often.tolist()
    return Sampler(model, tokenizer)


@torch.no_grad()
def test_log_probs_of_copies_are_those_of_their_texts(sampler):
    """A copy whose keys and values were another's would draw from another law."""
    result = particles(sampler, PROMPTS, VOWELS, **JOB)
    assert (result.resampled > 0).all()
    shared = 0
    for prompt, row, logprobs in zip(PROMPTS, result.candidates.token_ids, result.candidates.logprobs, strict=True):
        start = sampler.tokenizer(prompt)["input_ids"]
        for ids, values in zip(row, logprobs, strict=True):
            logits = sampler.model(input_ids=torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            np.testing.assert_allclose(values, expected, atol=1e-4)
        shared += len(row) - len({tuple(ids[:2]) for ids in row})
        whole = [tuple(ids) for ids in row if len(ids) == 10]
        assert len(set(whole)) > 0.5 * len(whole)  # copies go on apart
    assert shared > 6
    ended = [len(ids) for row in result.candidates.token_ids for ids in row]
    assert min(ended) < 10 == max(ended)


@pytest.mark.parametrize("batch_size", [1, 24, 256])
def test_a_seed_reproduces_whatever_goes_together(sampler, batch_size):
    whole, result = (
        particles(sampler, PROMPTS, VOWELS, **JOB),
        particles(sampler, PROMPTS, VOWELS, batch_size=batch_size, **JOB),
    )
    assert result.candidates.token_ids == whole.candidates.token_ids and result.texts == whole.texts
    np.testing.assert_allclose(result.log_weights, whole.log_weights)
    other = particles(sampler, PROMPTS, VOWELS, **{**JOB, "seed": 5})
    assert other.candidates.token_ids != whole.candidates.token_ids


def test_particles_reach_more_with_as_many_tokens(sampler):
    prompts = PROMPTS * 5
    plain = particles(sampler, prompts, VOWELS, **{**JOB, "checkpoints": []})
    actual = particles(sampler, prompts, VOWELS, **JOB)
    assert actual.candidates.rewards["vowels"].mean() > plain.candidates.rewards["vowels"].mean() + 0.5
    assert actual.effective_sample_size.mean() > plain.effective_sample_size.mean()
    for result in (plain, actual):
        w = np.exp(result.log_weights - result.log_weights.max(1, keepdims=True))
        np.testing.assert_allclose(result.effective_sample_size, w.sum(1) ** 2 / (w**2).sum(1))
        np.testing.assert_allclose(
            result.rewards[:, 0], result.candidates.rewards["vowels"][np.arange(15), result.indices]
        )


def test_mistakes(sampler):
    for more, match in (
        ({"ess": 1.5}, r"ess must lie in \[0, 1\]"),
        ({"method": "best"}, "method must be one of systematic, multinomial, stratified, residual"),
        ({"checkpoints": [2, 2]}, "checkpoints must be rising"),
        ({"first": 2}, "first does not apply here"),
        ({"skip": [0]}, "skip does not apply here"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be an integer"),
        ({"promise": lambda prompts, texts: [0.0]}, r"promise must return 3\d finite numbers"),
        ({"promise": lambda prompts, texts: [np.nan] * len(texts)}, "promise must return"),
    ):
        with pytest.raises(UserError, match=match):
            particles(sampler, PROMPTS, VOWELS, **{**JOB, **more})
