"""Speculative rejection: the survivors are best-of-n's own candidates, the budget is kept, memory pressure drops the
worst."""

import enumerable
import numpy as np
import pytest
import torch
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError, rewards
from fastalign.decode import Sampler, best_of, speculative_rejection
from fastalign.decode.rows import CachedRows
from fastalign.decode.shared_prompt import GROW, SharedPromptEngine

LENGTH = rewards.from_function(lambda prompts, responses: [len(text) for text in responses], "length")
VOWELS = rewards.from_function(lambda prompts, responses: [sum(map(t.count, "aeiou")) for t in responses], "vowels")
PROMPTS = ["the cat", "tell me a story of the big red dog", "why"]
JOB = {"n": 16, "max_new_tokens": 12, "seed": 4}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sampler(request):
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, kind=request.param)
    drawn = Sampler(model, tokenizer).sample(PROMPTS, **JOB).token_ids
    often = torch.tensor([token for row in drawn for ids in row for token in ids]).bincount().topk(2).indices
    model.generation_config.eos_token_id = often.tolist()  # so that some end early
    return Sampler(model, tokenizer)


@pytest.mark.parametrize("batch_size", [16, 48])
def test_a_replay_of_best_of_n_says_who_survives(sampler, batch_size):
    whole = best_of(sampler, PROMPTS, [LENGTH, VOWELS], lam=[0.1, 1.0], **JOB)
    result = speculative_rejection(
        sampler,
        PROMPTS,
        [LENGTH, VOWELS],
        lam=[0.1, 1.0],
        checkpoints=[2, 5, 50],
        keep=0.4,
        batch_size=batch_size,
        **JOB,
    )
    tokens = 0
    for p in range(3):
        ids = whole.candidates.token_ids[p]

        def worth(row):
            text = sampler.text.continuation([], row)
            return np.array([0.1 * len(text) + sum(map(text.count, "aeiou"))]).item()

        racing, cut = list(range(16)), {}
        for age in (2, 5):
            ranked = sorted(racing, key=lambda i: -worth(ids[i][:age]))
            racing = ranked[: -int(-0.4 * len(ranked) // 1)]
            cut |= {i: age for i in ranked if i not in racing and len(ids[i]) > age}
        for i in range(16):
            assert result.candidates.token_ids[p][i] == ids[i][: cut.get(i, 12)]
            assert result.complete[p, i] == (i not in cut)
        left = [i for i in range(16) if i not in cut]
        assert result.indices[p] == max(left, key=lambda i: worth(ids[i]))
        assert result.texts[p] == whole.candidates.texts[p][result.indices[p]]
        tokens += sum(min(len(ids[i]), cut.get(i, 12)) for i in range(16))
    assert result.tokens == tokens < 0.8 * sum(len(ids) for row in whole.candidates.token_ids for ids in row)


def test_keeping_all_is_best_of_n(sampler):
    whole = best_of(sampler, PROMPTS, LENGTH, **JOB)
    result = speculative_rejection(sampler, PROMPTS, LENGTH, checkpoints=[3], keep=1.0, **JOB)
    assert result.candidates.token_ids == whole.candidates.token_ids and result.texts == whole.texts
    assert result.complete.all()


def test_checkpoints_are_an_eighth_a_quarter_and_half(sampler):
    job = {**JOB, "max_new_tokens": 18}
    result = speculative_rejection(sampler, PROMPTS, LENGTH, **job)
    assert (
        result.candidates.token_ids
        == speculative_rejection(sampler, PROMPTS, LENGTH, checkpoints=[2, 4, 9], **job).candidates.token_ids
    )
    assert (result.complete.sum(1) < 16).all()


def test_memory_pressure_drops_the_worst_and_the_limit_holds(monkeypatch):
    tokenizer = tiny_tokenizer()
    sampler = Sampler(tiny_causal_lm(tokenizer), tokenizer)
    sampler.ends = []
    n, new = 20, 2 * GROW + 8
    prompt, row = (SharedPromptEngine.row_bytes(sampler.model, k) for k in (len(tokenizer("why")["input_ids"]), GROW))
    limit = n * row + prompt
    seen = []
    step = SharedPromptEngine.step

    def watched(engine):
        logits = step(engine)
        seen.append(sum(x.nbytes for x in (*engine.keys.values(), *engine.values.values())))
        return logits

    monkeypatch.setattr(SharedPromptEngine, "step", watched)
    job = {"n": n, "max_new_tokens": new, "seed": 1, "checkpoints": [], "memory_limit": limit}
    result = speculative_rejection(sampler, ["why"], LENGTH, **job)
    assert max(seen) + prompt <= limit
    lengths = sorted(len(ids) for ids in result.candidates.token_ids[0])
    assert lengths.count(GROW) == 10 and lengths.count(2 * GROW) == 4 and lengths.count(new) == 6
    free = speculative_rejection(sampler, ["why"], LENGTH, **{**job, "memory_limit": None})
    scores = [len(sampler.text.continuation([], ids[:GROW])) for ids in free.candidates.token_ids[0]]
    gone = [i for i, ids in enumerate(result.candidates.token_ids[0]) if len(ids) == GROW]
    assert max(scores[i] for i in gone) <= min(scores[i] for i in range(n) if i not in gone)


def test_mistakes(sampler):
    job = {"checkpoints": [2], **JOB}
    for more, match in (
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]"),
        ({"checkpoints": [4, 2]}, "checkpoints must be rising"),
        ({"checkpoints": [0, 2]}, "checkpoints must be rising"),
        ({"memory_limit": 1000}, "memory_limit must hold 16 candidates of 32 tokens and one of 32"),
        ({"lam": [1.0, 2.0]}, "one weight per reward, 1"),
        ({"first": 2}, "first does not apply here"),
        ({"skip": [0]}, "skip does not apply here"),
        ({"max_new_tokens": "4", "checkpoints": None}, "max_new_tokens must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(UserError, match=match):
            speculative_rejection(sampler, PROMPTS, LENGTH, **{**job, **more})


def test_a_model_that_the_engine_cannot_run_is_reported():
    sampler = enumerable.sampler()
    sampler.path = lambda: CachedRows
    with pytest.raises(UserError, match=r"shared-prompt engine alone.*best_of"):
        speculative_rejection(sampler, ["x"], LENGTH, checkpoints=[2], **JOB)
