"""Rollouts: padding, ends, options, and whether the sampler or transformers draws."""

import random

import pytest
import torch
from ppo_setup import lora, policy, trainer
from tiny import tiny_causal_lm, tiny_tokenizer

from fastalign import UserError
from fastalign.decode.shared_prompt import SharedPromptEngine
from fastalign.models.identity import Verdict
from fastalign.train import ppo_rollout
from fastalign.train.ppo_rollout import LengthSampler, generate

QUERIES = [torch.arange(5, 5 + n) for n in (3, 7, 1, 5)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("path", ["sampler", "transformers"])
def test_a_batch_of_unequal_queries_gives_what_each_alone_gives(kind, path):
    model, tokenizer = tiny_causal_lm(tiny_tokenizer(), kind=kind, dtype=torch.float32), tiny_tokenizer()
    options = {"do_sample": True, "temperature": 1e-4} if path == "sampler" else {"do_sample": False}
    options |= {"max_new_tokens": 8, "return_prompt": False}
    alone = [generate(model, tokenizer, [q], **options)[0] for q in QUERIES]
    for size in (None, 2):
        result = generate(model, tokenizer, QUERIES, batch_size=size, **options)
        assert [x.tolist() for x in result] == [x.tolist() for x in alone]
    whole = generate(model, tokenizer, QUERIES, **options | {"return_prompt": True})
    assert [x.tolist() for x in whole] == [q.tolist() + a.tolist() for q, a in zip(QUERIES, alone, strict=True)]
    greedy = [
        model.generate(
            q[None], attention_mask=torch.ones(1, len(q)), max_new_tokens=8, do_sample=False, pad_token_id=0
        )[0, len(q) :]
        for q in QUERIES
    ]
    assert [x.tolist() for x in alone] == [x.tolist() for x in greedy]


def paths_used(monkeypatch):
    used = []
    for name in ("_by_sampler", "_by_transformers"):
        original = getattr(ppo_rollout, name)
        monkeypatch.setattr(ppo_rollout, name, lambda *a, n=name, f=original: used.append(n) or f(*a))
    return used


def test_plain_sampling_runs_on_the_sampler_and_the_rest_in_transformers(monkeypatch):
    model, tokenizer, used = tiny_causal_lm(tiny_tokenizer()), tiny_tokenizer(), paths_used(monkeypatch)
    classic = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 2, "max_new_tokens": 3}
    for options in (classic, {"do_sample": True, "max_new_tokens": 3, "temperature": 0.7, "top_k": 5, "min_p": 0.1}):
        generate(model, tokenizer, QUERIES, **options)
        assert used.pop() == "_by_sampler"
    for options in (
        {"do_sample": False, "max_new_tokens": 3},
        {"do_sample": True, "max_length": 12},
        classic | {"min_length": 4},
        classic | {"repetition_penalty": 1.2},
        classic | {"eos_token_id": 77},
        classic | {"num_beams": 2},
    ):
        generate(model, tokenizer, QUERIES, **options)
        assert used.pop() == "_by_transformers"
    model.generation_config.repetition_penalty = 1.3  # the model's own configuration counts too
    generate(model, tokenizer, QUERIES, **classic)
    assert used == ["_by_transformers"]


def test_queries_are_prefilled_together_on_the_shared_prompt_engine(monkeypatch):
    model, tokenizer, seen = tiny_causal_lm(tiny_tokenizer()), tiny_tokenizer(), []
    monkeypatch.setattr("fastalign.decode.sampler.supports", lambda model: Verdict(True))  # its trial has prompts too
    prefill = SharedPromptEngine.prefill
    monkeypatch.setattr(
        SharedPromptEngine, "prefill", lambda self, prompts: seen.append(len(prompts)) or prefill(self, prompts)
    )
    generate(model, tokenizer, QUERIES, do_sample=True, max_new_tokens=3)
    assert seen[0] == len(QUERIES)


def test_draws_follow_torchs_seed():
    model, tokenizer = tiny_causal_lm(tiny_tokenizer(), scale=1.0), tiny_tokenizer()

    def draw(seed):
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 6, "top_k": 0}
        return [[x.tolist() for x in generate(model, tokenizer, QUERIES, **options)] for _ in range(2)]

    assert draw(0) == draw(0) != draw(1)
    first, second = draw(0)
    assert first != second


def script(monkeypatch, rows):
    """Both paths draw these rows."""
    cut = lambda row: row[: row.index(2) + 1] if 2 in row else row  # noqa: E731
    monkeypatch.setattr(ppo_rollout, "_by_sampler", lambda *a: [torch.tensor(cut(r)) for r in rows])
    monkeypatch.setattr(ppo_rollout, "_by_transformers", lambda *a: [torch.tensor(r) for r in rows])


@pytest.mark.parametrize("sampled", [True, False])
def test_ends_and_padding(monkeypatch, sampled):
    model, tokenizer = tiny_causal_lm(tiny_tokenizer()), tiny_tokenizer()
    script(monkeypatch, [[9, 2, 0, 0], [8, 8, 8, 8], [2, 0, 0, 0], [7, 7, 2, 0]])
    queries = [torch.tensor([2, 5]), *QUERIES[1:]]  # a prompt that begins with the end token, as OPT's do
    options = {"do_sample": sampled, "max_new_tokens": 4, "return_prompt": False}
    result = generate(model, tokenizer, queries, **options)
    assert [x.tolist() for x in result] == [[9, 2], [8, 8, 8, 8], [2], [7, 7, 2]]
    result = generate(model, tokenizer, queries, remove_padding=False, **options)
    assert [x.tolist() for x in result] == [[9, 2, 0, 0], [8, 8, 8, 8], [2, 0, 0, 0], [7, 7, 2, 0]]
    whole = generate(model, tokenizer, queries, **options | {"return_prompt": True})
    assert whole[0].tolist() == [2, 5, 9, 2]


def test_the_trainers_generate():
    run = trainer(policy(dtype=torch.float32), policy(seed=1, dtype=torch.float32))
    greedy = {"do_sample": False, "max_new_tokens": 4}
    one = run.generate(QUERIES[1], **greedy)
    assert one.shape == (1, 11) and one[0, :7].tolist() == QUERIES[1].tolist()
    assert run.generate(QUERIES[1], return_prompt=False, **greedy).tolist() == one[:, 7:].tolist()
    mine, theirs = run.generate(QUERIES, return_prompt=False, generate_ref_response=True, **greedy)
    assert len(mine) == len(theirs) == 4 and [m.tolist() for m in mine] != [t.tolist() for t in theirs]
    lengths = []
    run.generate(QUERIES, length_sampler=lambda: lengths.append(3) or 3, do_sample=True, batch_size=2)
    assert lengths == [3, 3]


def test_an_adapted_policys_reference_draws_without_its_adapters():
    model = policy(peft=lora(), dtype=torch.float32)
    base = model.causal_lm
    run, greedy = trainer(model), {"do_sample": False, "max_new_tokens": 6, "return_prompt": False}
    before = [x.tolist() for x in run.generate(QUERIES, **greedy)]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=2.0)
    mine, theirs = run.generate(QUERIES, generate_ref_response=True, **greedy)
    assert [x.tolist() for x in theirs] == before != [x.tolist() for x in mine]
    assert run.policy.causal_lm is base


def test_lengths_are_drawn_evenly():
    random.seed(0)
    sampler = LengthSampler(4, 7)
    assert {sampler() for _ in range(100)} == {4, 5, 6}
    with pytest.raises(UserError, match="max_value must be above min_value, got 4 and 4"):
        LengthSampler(4, 4)


@pytest.mark.parametrize(
    ("queries", "options", "rule"),
    [
        (
            [torch.tensor([], dtype=torch.int64)],
            {},
            r"query_tensor\[0\] must be a tensor \(tokens,\) of at least one id",
        ),
        ([[1, 2]], {}, r"query_tensor\[0\] must be a tensor .* got list"),
        (QUERIES, {"num_return_sequences": 2}, "num_return_sequences must be 1, got 2"),
    ],
)
def test_bad_queries_are_one_line(queries, options, rule):
    with pytest.raises(UserError, match=rule):
        trainer().generate(queries, max_new_tokens=2, **options)
    with pytest.raises(UserError, match=r"query_tensor must be a tensor \(tokens,\) or a list"):
        trainer().generate(torch.ones(2, 3, dtype=torch.int64), max_new_tokens=2)
