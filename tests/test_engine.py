"""The shared-prompt engine against a plain loop over the model: the same tokens, whatever joins and leaves."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from test_fused_forward import build as plain_model
from test_packing import MODELS, WINDOWED, build

from fastalign.backend import use_backend
from fastalign.decode.engine import Engine, Job, Prefix, _Step, draw, supports
from fastalign.ops import sample_tokens

PROMPTS = {0: [5, 9, 11, 40, 7, 8, 21], 3: [3], 4: [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]}
N, LIMIT, END = 6, 9, set(range(3, 97, 5))


def stream(job):
    return torch.tensor([job.prompt * N + job.candidate])


def by_hand(model, prompt, job, temperature=1.0):
    """The whole sequence through the model for every token."""
    ids, logprobs = [], []
    for step in range(LIMIT):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[:, -1]
        drawn = sample_tokens(logits, temperature=temperature, seed=1, offset=step, rows=stream(job))
        ids.append(int(drawn.ids))
        logprobs.append(float(drawn.log_probs))
        if ids[-1] in END:
            break
    return ids, logprobs


def by_engine(model, rows, counts=None, temperature=1.0):
    engine = Engine(model, rows)
    counts = counts or dict.fromkeys(PROMPTS, N)
    found = {Job(p, c): ([], []) for p, n in counts.items() for c in range(n)}
    seen = []

    def pick(hidden, jobs, steps):
        logits = engine.logits(hidden)
        drawn = [
            sample_tokens(row[None], temperature=temperature, seed=1, offset=step, rows=stream(job))
            for row, job, step in zip(logits, jobs, steps, strict=True)
        ]
        return torch.cat([d.ids for d in drawn]), torch.cat([d.log_probs for d in drawn])

    def took(jobs, ids, logprobs):
        for job, token, logprob in zip(jobs, ids, logprobs, strict=True):
            found[job][0].append(token)
            found[job][1].append(logprob)
        return [len(found[job][0]) == LIMIT or found[job][0][-1] in END for job in jobs]

    for _ in draw(engine, PROMPTS, iter(found), counts, pick, took):
        assert len(engine.jobs) <= rows
        seen.append(len(engine.jobs))
    assert not engine.jobs and not engine.prefixes
    return found, seen


@pytest.mark.parametrize("name", [*MODELS, *WINDOWED])
@torch.no_grad()
def test_the_same_tokens_as_a_plain_loop(name):
    model = build(name)
    assert supports(model)
    expected = {Job(p, c): by_hand(model, PROMPTS[p], Job(p, c)) for p in PROMPTS for c in range(N)}
    found, _ = by_engine(model, rows=5)
    for job, (ids, logprobs) in expected.items():
        assert found[job][0] == ids, job
        assert found[job][1] == pytest.approx(logprobs, abs=1e-4)
    assert max(len(logprobs) for _, logprobs in found.values()) > 1


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_rows_in_flight_change_nothing(rows):
    model = plain_model("llama")
    whole, _ = by_engine(model, rows=18)
    found, seen = by_engine(model, rows=rows)
    assert {job: ids for job, (ids, _) in found.items()} == {job: ids for job, (ids, _) in whole.items()}
    assert max(seen) <= min(rows, 18) and len(seen) > 1


def test_a_place_is_taken_again_at_once():
    model = plain_model("llama")
    found, seen = by_engine(model, rows=4)
    tokens = sum(len(ids) for ids, _ in found.values())
    assert len(seen) <= tokens / 4 * 1.6 + LIMIT  # a batch-by-batch run waits for the longest of each


def test_the_model_is_left_as_it_was():
    model = plain_model("llama")
    before = model.config._attn_implementation
    ids = torch.tensor([PROMPTS[4]])
    logits = model(input_ids=ids).logits
    by_engine(model, rows=3)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(input_ids=ids).logits, logits)


def test_first_tokens_follow_the_models_law():
    model = plain_model("llama")
    prompt = PROMPTS[4]
    p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
    engine = Engine(model, 4000)
    engine.prefill(0, prompt)
    logits = engine.logits(engine.admit([Job(0, c) for c in range(4000)]))
    ids = sample_tokens(logits, seed=5).ids
    count = torch.bincount(ids, minlength=97).double()
    likely = p * 4000 >= 5
    observed = torch.cat((count[likely], count[~likely].sum()[None]))
    expected = torch.cat((p[likely], p[~likely].sum()[None])).double()
    assert chisquare(observed.numpy(), (expected / expected.sum() * 4000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("heads", "kv", "d", "own"), [(9, 3, 64, 30), (2, 2, 7, 300), (4, 1, 20, 1)])
def test_compiled_step_equals_the_plain_one(heads, kv, d, own):
    torch.manual_seed(0)
    jobs = [Job(p, c) for p, c in ((0, 0), (7, 0), (0, 1), (7, 1), (7, 2))]  # rows of prompt 0 are no neighbours
    lengths = torch.tensor([own - 1, 0, own // 2, 0, own - 1])
    prefixes = {p: Prefix(n, {0: torch.randn(kv, n, d)}, {0: torch.randn(kv, n, d)}) for p, n in ((0, 33), (7, 1))}
    q, k, v = (30 * torch.randn(5, h, 1, d) for h in (heads, kv, kv))
    cache = torch.randn(2, 5, kv, own + 3, d)
    found = []
    for name in ("cpu", "reference"):
        engine = SimpleNamespace(
            jobs=jobs, prefixes=prefixes, rows=5, keys={0: cache[0].clone()}, values={0: cache[1].clone()}
        )
        with use_backend(name):
            step = _Step(engine, 5, own, lengths, lengths + 5)
            assert step.compiled == (name == "cpu")
            found.append((step.attend(0, q, k, v, d**-0.5, None, None), engine.keys[0], engine.values[0]))
    (ours, *caches), (plain, *others) = found
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, caches, others))
