"""Rewards on a server: each protocol against the same local model, what is sent, and what is made of misbehaviour."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import fastalign, refused
from loopback import LoopbackServer
from test_reward_models import bert, tokenizer

from fastalign import UserError, rewards
from fastalign._base import http
from fastalign.data.conversations import Conversation
from fastalign.decode import Candidates
from fastalign.rewards import server as module
from fastalign.rewards.server import ServerReward

PROMPTS = ["a", Conversation([{"role": "system", "content": "be kind"}, {"role": "user", "content": "why"}]), "b"]
TEXTS = ["one", "three", "one two three"]


class RewardModels(LoopbackServer):
    """style: "vllm" or "sglang". outputs(text): the raw numbers of a model. lacks: paths that are not there."""

    def __init__(self, style="vllm", outputs=lambda text: [len(text) / 8], names=("rm",), lacks=(), chats=True):
        super().__init__(names)
        self.style, self.outputs, self.lacks, self.chats = style, outputs, lacks, chats
        self.root = self.url.removesuffix("/v1")

    def complete(self, path, body):
        if path in self.lacks or (self.style == "sglang" and path != "/classify"):
            return 404, {"detail": "Not Found"}
        if self.style == "sglang":
            if "text" not in body:
                return 400, {"error": {"message": "Either text or input_ids should be provided."}}
            return [{"embedding": self.outputs(text), "meta_info": {}} for text in body["text"]]
        if path == "/score":
            texts = [f"{a}|{b}" for a, b in zip(body["text_1"], body["text_2"], strict=True)]
        elif "messages" in body:
            if not self.chats:
                return 400, {"error": {"message": "no chat template"}}
            texts = ["".join(f"<{m['role']}>{m['content']}" for m in body["messages"])]
        else:
            texts = body["input"]
        data = []
        for i, text in enumerate(texts):
            row = np.array(self.outputs(text))
            if body.get("use_activation", True):
                row = 1 / (1 + np.exp(-row)) if len(row) == 1 else np.exp(row) / np.exp(row).sum()
            row = row.tolist()
            fields = {"/classify": {"probs": row, "label": "x"}, "/score": {"score": row[0]}, "/pooling": {"data": row}}
            data.append({"index": i, **fields[path]})
        return {"object": "list", "data": data[::-1]}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "WAIT", 0.001)
    monkeypatch.setattr(module, "_announced", set())


def chat(prompt, response):
    messages = prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]
    return "".join(f"<{m['role']}>{m['content']}" for m in [*messages, {"role": "assistant", "content": response}])


def pair(prompt, response):
    return f"{'why' if isinstance(prompt, Conversation) else prompt}|{response}"


@pytest.mark.parametrize(
    ("style", "options", "lacks", "path", "text"),
    [
        ("vllm", {}, (), "/classify", chat),
        ("vllm", {"endpoint": "pooling"}, (), "/pooling", chat),
        ("vllm", {"endpoint": "score"}, (), "/score", pair),
        ("vllm", {}, ("/classify",), "/score", pair),
        ("vllm", {}, ("/classify", "/score"), "/pooling", chat),
        ("vllm", {"text": "response", "batch_size": 2}, (), "/classify", lambda prompt, response: response),
        ("sglang", {"text": "response"}, (), "/classify", lambda prompt, response: response),
    ],
)
def test_each_protocol(style, options, lacks, path, text):
    with RewardModels(style, lacks=lacks) as server:
        reward = ServerReward(server.root, **options)
        scores = rewards.score(reward, PROMPTS, TEXTS)[:, 0]
        np.testing.assert_allclose(scores, [len(text(*one)) / 8 for one in zip(PROMPTS, TEXTS, strict=True)])
        assert server.seen[-1][0] == path
        if style == "vllm":
            assert server.seen[-1][2]["use_activation"] is False


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_with_a_tokenizer_the_chat_is_written_here(style, tmp_path):
    writer = tokenizer()
    writer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    with RewardModels(style) as server:
        reward = ServerReward(server.root, tokenizer=writer, batch_size=2, in_flight=1)
        scores = rewards.score(reward, PROMPTS, TEXTS)[:, 0]
        np.testing.assert_allclose(scores, [len(chat(*one)) / 8 for one in zip(PROMPTS, TEXTS, strict=True)])
        field = "input" if style == "vllm" else "text"
        assert [len(body[field]) for _, _, body in server.seen if field in body][-2:] == [2, 1]


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_one_of_several_labels(style, tmp_path):
    labels = ["toxic", "rude", "calm"]
    options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    bert(**options).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with RewardModels(style, outputs=lambda text: [1.0, len(text) / 4, -200.0]) as server:
        raw = np.array([[1.0, len(text) / 4] for text in TEXTS])
        expected = raw[:, 1] - np.log(np.exp(raw).sum(1))
        for label in (1, "rude"):
            reward = ServerReward(server.root, label=label, text="response", tokenizer=str(tmp_path / "model"))
            np.testing.assert_allclose(rewards.score(reward, PROMPTS, TEXTS)[:, 0], expected, rtol=1e-5)
        assert np.isfinite(rewards.score(ServerReward(server.root, label=2, text="response"), ["a"], ["b"])).all()
        for label, message in (
            (None, r"the model has 3 outputs, choose one with \[label=0\] to \[label=2\]"),
            (3, "label must be an index below 3, got 3"),
            ("mean", "has no label 'mean', it has toxic, rude, calm"),
        ):
            reward = ServerReward(server.root, label=label, text="response", tokenizer=str(tmp_path / "model"))
            with pytest.raises(UserError, match=message):
                reward(PROMPTS, TEXTS)


def test_what_is_kept_is_not_asked_again_unless_the_model_is_another():
    with RewardModels() as server:
        first = rewards.score(ServerReward(server.root), PROMPTS, TEXTS)
        assert len(server.seen) == 4  # a chat each, and the fixed text
        again = rewards.score(ServerReward(server.root), PROMPTS, TEXTS)
        assert len(server.seen) == 5 and (first == again).all()
        server.outputs = lambda text: [1.0 + len(text) / 8]
        other = rewards.score(ServerReward(server.root), PROMPTS, TEXTS)
        assert len(server.seen) == 9 and (other == first + 1).all()


def test_failures_that_pass(monkeypatch):
    with RewardModels() as server:
        server.faults = [429, (503, {"Retry-After": "0.01"}, b"starting"), "drop", 500]
        assert rewards.score(ServerReward(server.root, in_flight=1), PROMPTS, TEXTS).shape == (3, 1)


def change(**fields):
    return lambda answer: {"data": [{**answer["data"][0], **fields}, *answer["data"][1:]]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (change(probs=[float("nan")]), "its answer must hold 'probs' as finite numbers, got nan"),
        (change(probs=["good"]), "its answer must hold 'probs' as finite numbers, got 'good'"),
        (change(probs=[]), "its answer must hold 'probs' as finite numbers, got []"),
        (change(probs=[1.0, 2.0]), "2 outputs, after 1"),
        (lambda a: {"data": a["data"][:1]}, "its answer must hold 3 scores, got 1"),
        (change(index=7), "its answer must number its scores 0 to 2, once each, got [7, 1, 0]"),
        (lambda a: {"data": "none"}, "its answer must hold a list of objects"),
        (lambda a: b"<html>", "/classify did not answer with JSON"),
        (lambda a: b'"text"', "/classify must answer with a JSON object, got str"),
    ],
)
def test_answers_are_not_trusted(answer, message):
    with RewardModels() as server:
        reward = ServerReward(server.root, text="response", in_flight=1)
        reward(["p"], ["first"])
        server.answer = answer
        with pytest.raises(UserError) as caught:
            reward(PROMPTS, TEXTS)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "/classify answered 302: Found"),
        ((401, {}, b"Unauthorized"), "/classify answered 401: Unauthorized"),
        (500, r"/classify answered 500: busy \(2 tries\)"),
    ],
)
def test_refusals(fault, message):
    with RewardModels() as server:
        server.faults = [fault] * 2
        with pytest.raises(UserError, match=message):
            ServerReward(server.root, tries=2)(PROMPTS, TEXTS)


def test_a_server_without_a_reward_model_and_one_that_takes_no_chats():
    with RewardModels(lacks=("/classify", "/score", "/pooling")) as server:
        with pytest.raises(UserError, match=r"no reward model answers: /classify answered 404: Not Found; /score .*"):
            ServerReward(server.root)(PROMPTS, TEXTS)
    with RewardModels(chats=False) as server:
        with pytest.raises(UserError, match=r"no chat template \(tokenizer=MODEL sends chats as text, endpoint=score"):
            ServerReward(server.root)(PROMPTS, TEXTS)
    with RewardModels(names=("a", "b")) as server:
        with pytest.raises(UserError, match="serves a, b: name one, as http"):
            ServerReward(server.root)(PROMPTS, TEXTS)
        assert ServerReward(server.root, "b")(PROMPTS, TEXTS).shape == (3,)
        assert server.seen[-1][2]["model"] == "b"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("server:http://host:8000", "server"),
        ("server:http://[::1]:8000/v1#org/rm[endpoint=score]", "rm"),
        ("mine=server:https://host#rm", "mine"),
        ("server:http://host#rm[label=toxic,tokenizer=./rm]", "toxic"),
    ],
)
def test_names_without_asking(reference, name):
    assert rewards.parse(reference).name == name


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("server:", "must be a name, FILE.py:FUNCTION"),
        ("server:host:8000", "a server's address must look like http://host:port/v1, got 'host:8000'"),
        ("server:http://me:secret@host#a b[wrong=1]", "without user, password or query"),
        ("server:http://host[api_key=secret]", "api_key must not stand in a reward's reference"),
        (
            "server:http://host[endpoint=rank]",
            "reward 'server': endpoint must be one of classify, score, pooling, got 'rank'",
        ),
        ("server:http://host[endpoint=score,text=response]", "endpoint='score' reads both as a pair"),
        ("server:http://host[label=toxic]", "label must be an index: a name needs tokenizer=MODEL, got 'toxic'"),
        ("server:http://host[batch_size=0]", "batch_size must be an int >= 1, got 0"),
        ("server:http://host[tries=none]", "tries must be at least 1, got none"),
        ("server:http://host[rank=1]", "its options cannot be used: "),
        ("server:http://host#a b", "'a b' cannot be a reward's name"),
    ],
)
def test_mistakes_that_are_told_before_anything_is_asked(reference, message):
    with pytest.raises(UserError) as caught:
        rewards.check_names([reference])
    assert message in str(caught.value) and "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_the_store_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rewards.sqlite").write_text("something else, and long enough to be no empty file" * 9)
    with pytest.raises(UserError, match=r"rewards.sqlite: cannot keep scores in it \(.*set FASTALIGN_CACHE"):
        ServerReward("http://127.0.0.1:9")(["a"], ["b"])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = [[[], []]]
    Candidates(["p"], [["one", "three"]], empty, empty).to_parquet("c.parquet")
    with RewardModels() as server:
        command = ["score", "c.parquet", "--rewards", f"server:{server.url}#rm,diversity", "--out", "s.parquet"]
        code, _, err = fastalign(*command)
        assert code == 0, err
        assert f"reward 'rm': {server.root}/classify answers, and is sent chats" in err
        assert list(Candidates.from_parquet("s.parquet", kind="scored").rewards) == ["rm", "diversity"]
        server.faults = [(404, {}, b"the model rm is not here")] * 3
        assert "no reward model answers: /classify answered 404: the model rm is not here; " in refused(
            *command, "--overwrite"
        )


def test_a_killed_command_asks_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"{'x' * i}" for i in range(1, 101)]
    empty = [[[]] * 100]
    Candidates(["p"], [texts], empty, empty).to_parquet(tmp_path / "c.parquet")
    with RewardModels() as server:
        true = server.complete

        def complete(path, body):
            if len(server.seen) == 40:
                running.kill()
                running.wait()
            return true(path, body)

        server.complete = complete
        command = ["score", "c.parquet", "--out", "s.parquet", "--rewards", f"server:{server.url}[in_flight=4]"]
        running = subprocess.Popen([sys.executable, "-m", "fastalign", *command], stderr=subprocess.DEVNULL)
        assert running.wait() == -9 and fastalign(*command)[0] == 0
        asked = [json.dumps(body["messages"]) for _, _, body in server.seen]
        assert len(set(asked)) == 101 and len(asked) <= 101 + 1 + 4  # the fixed text again, and those on their way
        scored = Candidates.from_parquet(tmp_path / "s.parquet", kind="scored")
        assert scored.rewards["server"].shape == (1, 100)
