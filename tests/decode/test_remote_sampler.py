"""Samplers whose model runs elsewhere: the same law, argument checks and Candidates as the local one's; what servers
do."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from commands import refused
from protocol_server import ProtocolServer, draw
from scipy.stats import chisquare
from tiny import tiny_causal_lm, tiny_folder, tiny_tokenizer

from fastalign._base import http
from fastalign._base.errors import UserError
from fastalign._base.in_flight import as_done
from fastalign.decode import Candidates, Sampler, best_of
from fastalign.decode.samplers.openai import OpenAISampler
from fastalign.decode.samplers.vllm import VLLMSampler
from fastalign.jobs import align as pipeline

PROMPTS = ["the cat", "tell me a story of the big dog", "why"]
SHORT = {"n": 5, "max_new_tokens": 6, "seed": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_causal_lm(tokenizer)


@pytest.fixture
def server(model, tokenizer):
    with ProtocolServer(model, tokenizer) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http, "WAIT", 0.001)


class StandIn:
    """The part of vLLM that the adapter calls, with vLLM's names and rules, run by a real (tiny) model."""

    @dataclass
    class SamplingParams:
        n: int = 1
        temperature: float = 1.0
        top_p: float = 1.0
        top_k: int = 0
        min_p: float = 0.0
        seed: int | None = None
        stop: str | list[str] | None = None
        max_tokens: int | None = 16
        logprobs: int | None = None

        def __post_init__(self):
            if self.n > 4:
                raise ValueError(f"n must be at most 4, got {self.n}.")
            if self.temperature == 0 and self.n > 1:
                raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")

    @dataclass
    class Logprob:
        logprob: float
        rank: int | None = None
        decoded_token: str | None = None

    def __init__(self, model, tokenizer):
        outer, self.calls = self, []

        class LLM:
            def __init__(self, model="", **options):
                outer.calls.append((model, options))
                config = types.SimpleNamespace(max_model_len=64)
                self.llm_engine = types.SimpleNamespace(model_config=config)

            def get_tokenizer(self):
                return tokenizer

            def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
                outer.calls.append((prompts, sampling_params))
                return [self.one(*pair) for pair in zip(prompts, sampling_params, strict=True)]

            def one(self, prompt, params):
                assert params.logprobs == 0
                drawn = draw(
                    model,
                    tokenizer,
                    prompt["prompt_token_ids"],
                    seeds=[params.seed + j for j in range(params.n)],
                    **{
                        name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "min_p", "top_k")
                    },
                    stop=params.stop or [],
                )
                outputs = [
                    types.SimpleNamespace(
                        index=j,
                        text=text,
                        token_ids=tuple(ids),
                        logprobs=[{i: outer.Logprob(v, 1, "")} for i, v in zip(ids, logprobs, strict=True)],
                    )
                    for j, (text, ids, logprobs, _) in enumerate(drawn)
                ]
                return types.SimpleNamespace(outputs=outputs[::-1])

        module = types.ModuleType("vllm")
        module.LLM, module.SamplingParams = LLM, self.SamplingParams
        module.envs = types.SimpleNamespace(VLLM_MAX_N_SEQUENCES=4)
        self.module = module


@pytest.fixture
def vllm(model, tokenizer, monkeypatch):
    result = StandIn(model, tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", result.module)
    return result


@pytest.fixture(params=["vllm", "openai", "openai, chat by the server"])
def remote(request, model, tokenizer, monkeypatch):
    """Each adapter over the same model; all of them put the chat template before the same tokens."""
    if request.param == "vllm":
        result = StandIn(model, tokenizer)
        monkeypatch.setitem(sys.modules, "vllm", result.module)
        yield VLLMSampler(result.module.LLM())
    else:
        with ProtocolServer(model, tokenizer) as running:
            yield OpenAISampler(running.url, tokenizer=None if "chat" in request.param else tokenizer)


def teacher_forced(model, tokenizer, drawn, temperature=1.0):
    """Log-probs of what was drawn, from one plain forward each."""
    local = Sampler(model, tokenizer)
    encoded = local.encode(drawn.prompts, "auto", 1)
    for prompt, row in zip(encoded, drawn.token_ids, strict=True):
        for ids in row:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
            yield logits.log_softmax(-1)[range(len(ids)), ids].tolist()


@torch.inference_mode()
def test_the_same_protocol_as_the_local_sampler(remote, model, tokenizer):
    drawn = remote.sample(PROMPTS, temperature=1.3, **SHORT)
    assert drawn.prompts == PROMPTS and drawn.n == 5 and drawn.prompt_ids.tolist() == [0, 1, 2]
    flat = [values for row in drawn.logprobs for values in row]
    for came, true in zip(flat, teacher_forced(model, tokenizer, drawn, 1.3), strict=True):
        assert came == pytest.approx(true, abs=1e-6)
    for texts, rows in zip(drawn.texts, drawn.token_ids, strict=True):
        assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
        assert len(set(texts)) > 1
    assert drawn.settings["seed"] == 7 and drawn.settings["model"] == remote.name
    local = Sampler(model, tokenizer).sample(["why"], **SHORT)
    assert {*drawn.settings, "products"} == {*local.settings}  # a server does not say how it multiplies


def test_the_candidates_depend_on_the_seed_and_the_prompt_alone(remote):
    whole = remote.sample(PROMPTS, **SHORT)
    assert remote.sample(PROMPTS, **SHORT).token_ids == whole.token_ids
    assert remote.sample(PROMPTS, batch_size=2, **SHORT).token_ids == whole.token_ids  # n split into three requests
    part = remote.sample([PROMPTS[2], PROMPTS[1]], prompt_ids=[2, 1], **SHORT)
    assert part.token_ids == whole.token_ids[1:]
    resumed = {i: part for (i,), part in remote.iter_batches(PROMPTS, skip={1}, **SHORT)}
    assert sorted(resumed) == [0, 2] and resumed[2].token_ids == whole.token_ids[2:]
    assert remote.sample(["why", "why"], **SHORT).token_ids[0] != remote.sample(["why", "why"], **SHORT).token_ids[1]
    assert remote.sample(PROMPTS, **{**SHORT, "seed": 8}).token_ids != whole.token_ids


def test_greedy_is_the_local_greedy(remote, model, tokenizer):
    local = Sampler(model, tokenizer).sample(PROMPTS, temperature=0, **SHORT)
    drawn = remote.sample(PROMPTS, temperature=0, **SHORT)
    assert drawn.token_ids == local.token_ids and drawn.texts == local.texts


def test_first_tokens_follow_the_truncated_distribution(remote, model, tokenizer):
    options = {"n": 400, "max_new_tokens": 1, "seed": 3, "temperature": 1.5, "top_k": 6, "top_p": 0.95, "min_p": 0.01}
    ids = [row[0] for row in remote.sample(["the cat"], batch_size=200, **options).token_ids[0]]
    local = Sampler(model, tokenizer).sample(["the cat"], **{**options, "n": 20000})
    exact = {row[0]: np.exp(value[0]) for row, value in zip(local.token_ids[0], local.logprobs[0], strict=True)}
    assert len(exact) > 2 and sum(exact.values()) == pytest.approx(1, abs=1e-5) and set(ids) <= set(exact)
    counts = [ids.count(token) for token in exact]
    assert chisquare(counts, np.array(list(exact.values())) / sum(exact.values()) * len(ids)).pvalue > 1e-3


def test_stop_strings_cut_the_text(remote):
    free = remote.sample(["the cat"], n=1, max_new_tokens=20, seed=0).texts[0][0]
    stop = free[4:6]
    kept = remote.sample(["the cat"], n=1, max_new_tokens=20, seed=0, stop=[stop]).texts[0][0]
    assert kept == free[: free.find(stop)]


def test_the_same_argument_checks(remote):
    for wrong, message in (
        ({"n": 0}, "n must be an integer, at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"stop": [""]}, "stop must be"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"memory_limit": "1GB"}, "memory_limit is for models that run here"),
        ({"chat": "yes"}, "chat must be"),
    ):
        with pytest.raises(UserError, match=message):
            remote.sample(PROMPTS, **{**SHORT, **wrong})
    with pytest.raises(UserError, match=r"prompts\[1\] must be a string that is not empty"):
        remote.sample(["the cat", " "], **SHORT)
    with pytest.raises(UserError, match="runs in another engine"):
        _ = remote.model


def test_best_of_takes_either(remote):
    class Long:
        name = "long"

        def __call__(self, prompts, responses):
            return np.array([len(text) for text in responses], dtype=np.float32)

    result = best_of(remote, PROMPTS, Long(), n=4, max_new_tokens=5, seed=0)
    assert [len(text) for text in result.texts] == [max(map(len, row)) for row in result.candidates.texts]


# vLLM


def test_vllm_is_started_with_its_prefix_cache_and_our_log_probs(vllm, tmp_path, model, tokenizer):
    folder = tiny_folder(tmp_path / "model")
    for sampler in (
        Sampler.from_pretrained(folder, backend="vllm", dtype=torch.bfloat16),
        Sampler.from_pretrained(f"vllm:{folder}", dtype="bfloat16"),
    ):
        assert isinstance(sampler, VLLMSampler) and sampler.name == f"vllm:{folder}"
        path, options = vllm.calls[-1]
        assert path == str(folder)
        assert options == {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs", "dtype": "bfloat16"}
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        sampler.sample(["the cat"], n=1, max_new_tokens=63, seed=0)


def test_vllm_requests_stay_under_its_limit_and_share_no_seed(vllm):
    VLLMSampler(vllm.module.LLM()).sample(PROMPTS, n=11, max_new_tokens=1, seed=0)
    prompts, params = vllm.calls[-1]
    assert [p.n for p in params] == [4, 4, 3] * 3 and len(prompts) == 9
    seeds = [p.seed + j for p in params for j in range(p.n)]
    assert len(set(seeds)) == 33 and all(0 <= seed < 2**31 for seed in seeds)


def test_vllm_refusals_are_one_line(vllm, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("temperature must be in [0, 2],\n got 3")

    monkeypatch.setattr(vllm.module.LLM, "generate", refuse)
    with pytest.raises(UserError, match=r"vllm: temperature must be in \[0, 2\], got 3"):
        VLLMSampler(vllm.module.LLM()).sample(PROMPTS, temperature=3.0, **SHORT)


def test_vllm_absent_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'fastalign\[vllm\]'"):
        Sampler.from_pretrained("some/model", backend="vllm")


# servers


def test_a_server_by_its_address(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name in (server.url, f"{server.url}/#tiny"):
        sampler = Sampler.from_pretrained(name)
        assert isinstance(sampler, OpenAISampler) and sampler.name == f"{server.url}#tiny"
    sampler.sample(["why"], chat=False, **SHORT)
    path, headers, body = server.seen[-1]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["prompt"], body["n"], body["max_tokens"]) == ("tiny", "why", 5, 6)
    # every option is sent: servers have defaults of their own
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (1.0, -1, 1.0, 0.0)
    assert body["repetition_penalty"] == 1.0 and "stop" not in body


def test_who_writes_the_chat_template(server, tokenizer):
    own, theirs = OpenAISampler(server.url, tokenizer=tokenizer), OpenAISampler(server.url)
    assert own.sample(PROMPTS, **SHORT).token_ids == theirs.sample(PROMPTS, **SHORT).token_ids
    assert {path for path, _, _ in server.seen} == {"/v1/completions", "/v1/chat/completions"}
    raw = own.sample(PROMPTS, chat=False, **SHORT)
    assert raw.token_ids == theirs.sample(PROMPTS, chat=False, **SHORT).token_ids
    assert raw.token_ids != own.sample(PROMPTS, **SHORT).token_ids


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("style", ["llama.cpp", "bare"])
def test_what_other_servers_answer(model, tokenizer, style, chat):
    with ProtocolServer(model, tokenizer) as full, ProtocolServer(model, tokenizer, style=style) as other:
        true = OpenAISampler(full.url).sample(PROMPTS, chat=chat, **SHORT)
        came = OpenAISampler(other.url).sample(PROMPTS, chat=chat, **SHORT)
    assert came.texts == true.texts
    if style == "bare":  # left out, not made up
        assert came.token_ids == came.logprobs == [[[]] * 5] * 3
    else:
        assert came.token_ids == true.token_ids and came.logprobs == true.logprobs


def test_failures_that_pass_are_tried_again(server):
    true = OpenAISampler(server.url).sample(PROMPTS, **SHORT)
    server.faults = [429, (503, {"Retry-After": "0.01"}, b"starting"), "drop", 500, 502]
    assert OpenAISampler(server.url, in_flight=1).sample(PROMPTS, **SHORT).texts == true.texts
    server.faults = [500] * 4
    with pytest.raises(UserError, match=r"/chat/completions answered 500: busy \(4 tries\)"):
        OpenAISampler(server.url, tries=4, in_flight=1).sample(["why"], **SHORT)


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "no\\nsuch thing"}}',
        b'{"message": "no such thing"}',
        b'{"detail": "no such thing"}',
        b"no such thing",
    ],
)
def test_refusals_are_reported_once_and_not_repeated(server, body):
    server.faults = [(400, {}, body)]
    with pytest.raises(UserError, match=r"completions answered 400: no such thing$"):
        OpenAISampler(server.url, in_flight=1).sample(PROMPTS, **SHORT)
    assert len(server.seen) == 1


@contextmanager
def dripping(first, piece):
    """A server that accepts, sends `first`, then `piece` every twentieth of a second for ever; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip(connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(1 << 16)
            connection.sendall(first)
            while not over.wait(0.05):
                connection.sendall(piece)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        over.set()
        listening.close()


DRIPS = {
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b" "),
    "body without a length": (b"HTTP/1.1 200 OK\r\n\r\n{}", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a line": (b"HTTP/1.1 200 O", b"K"),
    "an error's body": (b"HTTP/1.1 503 Busy\r\nContent-Length: 60000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("how", DRIPS)
def test_an_answer_in_drops_has_one_deadline(how):
    with dripping(*DRIPS[how]) as url:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"(not wholly within 1 seconds|answered 503: Busy) \(1 tries\)"):
            OpenAISampler(url, "m", timeout=1, tries=1).sample(["p"], n=1, max_new_tokens=4, seed=0)
        assert time.monotonic() - started < 60  # the drops go on for the better part of an hour
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer) and not one.finished.is_set()]


KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    "fault",
    [
        (401, {}, f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'.encode()),
        (400, {}, f"Bearer {KEY} is not known".encode()),
        (500, {}, KEY.encode()),
    ],
)
def test_a_key_is_never_repeated(server, fault, tmp_path):
    sampler = OpenAISampler(server.url, api_key=KEY + "\n", in_flight=1, tries=1)
    made = sampler.sample(["why"], **SHORT)
    assert server.seen[-1][1]["Authorization"] == f"Bearer {KEY}"
    made.to_parquet(tmp_path / "made.parquet")
    assert KEY.encode() not in (tmp_path / "made.parquet").read_bytes()
    assert KEY not in repr(sampler) + repr(made) + repr(made.settings)
    server.faults = [fault]
    with pytest.raises(UserError, match=f"answered {fault[0]}: ") as caught:
        sampler.sample(["why"], **SHORT)
    assert KEY not in str(caught.value) and "(the key)" in str(caught.value)


def test_a_key_or_password_that_cannot_be_sent_is_not_repeated():
    for key in ("two words secret", "secret\nX-Header: y", "s\u00e9cret"):
        with pytest.raises(UserError, match="api_key must be printable ASCII without spaces") as caught:
            OpenAISampler("http://127.0.0.1:9/v1", "m", api_key=key)
        assert "cret" not in str(caught.value)
    for url in ("http://me:secret@host/v1", "me:secret@host", "http://host/v1?api_key=secret"):
        with pytest.raises(UserError, match="without user, password or query") as caught:
            OpenAISampler(url)
        assert "secret" not in str(caught.value)
    for timeout in (0, float("nan")):
        with pytest.raises(UserError, match="timeout must be at least 1"):
            OpenAISampler("http://127.0.0.1:9/v1", "m", timeout=timeout)


@pytest.mark.parametrize("value", [0.5, 1e-3, 88.0])
def test_a_probability_above_1_is_refused(server, value):
    def answer(true):
        true["choices"][0]["logprobs"]["token_logprobs"][0] = value
        return true

    server.answer = answer
    with pytest.raises(UserError, match=f"must hold log-probs of at most 0, got {value:g}"):
        OpenAISampler(server.url).sample(["why"], chat=False, **SHORT)
    value = 1e-7  # the rounding of a probability of 1
    assert max(max(row) for row in OpenAISampler(server.url).sample(["why"], chat=False, **SHORT).logprobs[0]) <= 0


def test_no_task_is_begun_after_an_error_however_late_it_is_read():
    begun, idle = [], threading.Event()

    def work(task, stop):
        begun.append(task)
        if task == "bad":
            raise UserError("refused")
        return task.upper()

    def tasks():
        yield from ("good", "bad")
        yield "never"
        idle.set()

    results = as_done(work, tasks(), threads=1)
    assert next(results) == ("good", "GOOD")
    assert not idle.wait(0.2)  # the reader is elsewhere, and the thread has had time to go on
    with pytest.raises(UserError, match="refused"):
        next(results)
    assert begun == ["good", "bad"]


def test_a_redirect_is_not_followed(server):
    server.faults = [(307, {"Location": "http://127.0.0.1:9/v1/completions"}, b"")]
    with pytest.raises(UserError, match="answered 307"):
        OpenAISampler(server.url, in_flight=1).sample(["why"], **SHORT)


def test_nobody_there_and_wrong_addresses():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1/models gave no answer: .*refused \(2 tries\)"):
        OpenAISampler("http://127.0.0.1:9/v1", tries=2)
    for url in ("127.0.0.1:80", "ftp://host/v1", "http://", "http://host:port/v1", "http://host/v1?a=b"):
        with pytest.raises(UserError, match="must look like http://host:port/v1"):
            OpenAISampler(url, "tiny")
    with pytest.raises(UserError, match="device must be 'auto' for a model on a server"):
        Sampler.from_pretrained("http://127.0.0.1:9/v1#tiny", device="cpu")


def test_several_models_are_named(model, tokenizer):
    with ProtocolServer(model, tokenizer, names=("one", "two")) as running:
        with pytest.raises(UserError, match="serves one, two: name one"):
            OpenAISampler(running.url)
        assert OpenAISampler(running.url, "two").name.endswith("#two")


def change(**fields):
    return lambda answer: {**answer, "choices": [{**answer["choices"][0], **fields}, *answer["choices"][1:]]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a: b"<html>", "did not answer with JSON"),
        (lambda a: b"[" * 100000, "did not answer with JSON"),
        (lambda a: [a], "must answer with a JSON object"),
        (lambda a: {}, "must hold 'choices', a list"),
        (lambda a: {"choices": a["choices"][:1]}, "must hold 5 choices, got 1; a server without n takes batch_size=1"),
        (lambda a: {"choices": [1] * 5}, "must hold objects as choices"),
        (change(text=7), "must hold a text per choice"),
        (change(logprobs="none"), "must hold logprobs as an object"),
        (change(logprobs={"token_logprobs": [float("nan")]}), "must hold log-probs as finite numbers, got nan"),
        (change(logprobs={"token_logprobs": [-1e999]}), "must hold log-probs as finite numbers, got -inf"),
        (change(logprobs={"token_logprobs": [None] * 3}), "must hold log-probs as finite numbers, got None"),
        (change(logprobs={"token_logprobs": [-1.0] * 99}), "must hold log-probs as a list of at most 6"),
        (change(token_ids=["7"]), "must hold token_ids as finite numbers"),
        (change(token_ids=[True]), "must hold token_ids as finite numbers"),
        (change(token_ids=[10**400]), "must hold token_ids as finite numbers"),
        (change(token_ids=[-1], logprobs=None), "must hold one token id, not negative"),
        (
            change(token_ids=[1], logprobs={"token_logprobs": [-1.0, -2.0]}),
            "must hold one token id, not negative, per log-prob",
        ),
        (lambda a: b" " * 10**6, "answered with more than"),
    ],
)
def test_answers_are_not_trusted(server, answer, message):
    server.answer = answer
    with pytest.raises(UserError, match=message) as caught:
        OpenAISampler(server.url, in_flight=1).sample(["why"], chat=False, **SHORT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_half_a_surrogate_pair_can_still_be_written(server, tmp_path):
    server.answer = change(text="a\ud800b")
    OpenAISampler(server.url).sample(["why"], chat=False, **SHORT).to_parquet(tmp_path / "c.parquet")
    assert "a?b" in Candidates.from_parquet(tmp_path / "c.parquet").texts[0]


@pytest.mark.parametrize("numbers", [[0, 0], [1, 1], [0, 0.0, 0]])
def test_choices_of_one_number_are_refused(server, numbers):
    true = server.complete
    server.complete = lambda path, body: {
        "choices": [{**choice, "index": i} for choice, i in zip(true(path, body)["choices"], numbers, strict=False)]
    }
    with pytest.raises(UserError, match=f"must number its choices 0 to {len(numbers) - 1}, once each, got") as caught:
        OpenAISampler(server.url).sample(["why"], n=len(numbers), max_new_tokens=4, seed=0)
    assert "\n" not in str(caught.value)


def test_a_server_that_gives_every_candidate_the_same_seed_is_found_out(server):
    true = server.complete
    server.complete = lambda path, body: {
        "choices": [{**true(path, {**body, "n": 1})["choices"][0], "index": j} for j in range(body["n"])]
    }
    with pytest.raises(UserError, match="all 16 candidates of a request are the same, which chance does not do"):
        OpenAISampler(server.url).sample(["why"], n=16, max_new_tokens=20, seed=0)
    one_each = OpenAISampler(server.url).sample(["why"], n=4, max_new_tokens=20, seed=0, batch_size=1)
    assert len(set(one_each.texts[0])) > 1


def test_requests_in_flight_are_bounded(server):
    OpenAISampler(server.url, in_flight=3).sample(PROMPTS * 4, n=1, max_new_tokens=4, seed=0)
    assert 2 <= server.most <= 3


def test_left_early_no_more_is_asked(server):
    batches = OpenAISampler(server.url, in_flight=1).iter_batches(PROMPTS * 20, n=1, max_new_tokens=1, seed=0)
    next(batches)
    batches.close()
    requested = len(server.seen)
    assert requested < 30
    assert OpenAISampler(server.url).sample(["why"], **SHORT).n == 5 and len(server.seen) <= requested + 2


def test_the_command_over_a_server(server, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "fastalign", "sample", "--server", server.url, "--prompts", "prompts.txt"]
    command += ["-n", "5", "--max-new-tokens", "6", "--seed", "7", "--out", "c.parquet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = Candidates.from_parquet(tmp_path / "c.parquet")
    assert result.texts == OpenAISampler(server.url).sample(PROMPTS, **SHORT).texts
    scored = pipeline.score(tmp_path / "c.parquet", ["diversity"], tmp_path / "s.parquet")
    assert json.dumps(scored.settings["sampling"]["model"]) == json.dumps(server.url)
    server.faults = [(404, {}, b'{"error": {"message": "The model `x` does not exist."}}')]
    command[command.index("c.parquet")] = "d.parquet"
    monkeypatch.chdir(tmp_path)
    assert "answered 404: The model `x` does not exist." in refused(*command[3:], "--model", "x")
