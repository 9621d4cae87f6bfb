"""Judges: what they ask, how answers are read, what is kept and shown, and one line for every mistake."""

import json
import math
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml
from commands import fastalign, refused
from loopback import LoopbackServer
from test_server_rewards import RewardModels
from tiny import tiny_folder

from fastalign import UserError, rewards
from fastalign._base import http
from fastalign.data.conversations import Conversation
from fastalign.decode import Candidates, best_of
from fastalign.rewards import Judge, ratings
from fastalign.train.grpo_rewards import RewardFunctions

KIND = Conversation([{"role": "system", "content": "be kind"}, {"role": "user", "content": "how"}])
PROMPTS, TEXTS = ["why", KIND], ["one", "three"]
MARKS = {"helpful": {str(i): float(i) for i in range(1, 6)}, "brief": {str(i): float(i) for i in range(1, 4)}}


class Chat(LoopbackServer):
    """says(text of the request, body) -> (the answer, log-probabilities of each of its tokens or None)."""

    def __init__(self, says=lambda text, body: ("helpful: 4\nbrief: 2", None)):
        super().__init__(("gpt",))
        self.says = says

    def complete(self, path, body):
        assert path == "/v1/chat/completions"
        text, logprobs = self.says(body["messages"][-1]["content"], body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if logprobs is not None:
            choice["logprobs"] = {"content": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "WAIT", 0.001)
    monkeypatch.chdir(tmp_path)


def rubric(server, **more):
    values = {"helpful": "Does it do what was asked?", "brief": {"description": "Is it short?", "scale": [1, 3]}}
    return {"url": server.url, "values": values, **more}


def token(text, **others):
    """A token with the probabilities of others in its place, as OpenAI gives them."""
    rows = [{"token": one.replace("_", " "), "logprob": math.log(p)} for one, p in others.items()]
    return {"token": text, "logprob": math.log(others.get(text.replace(" ", "_"), 1.0)), "top_logprobs": rows}


def written(*tokens):
    return {"message": {"content": "".join(one["token"] for one in tokens)}, "logprobs": {"content": list(tokens)}}


SPLIT = {"4": 0.5, "5": 0.2, "_4": 0.1, "9": 0.1, "the": 0.1}  # of the marks, 0.6 is 4 and 0.2 is 5


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"message": {"content": "helpful: 4\nbrief: 2"}}, (4, 2)),
        ({"message": {"content": "So:\n**Helpful**: **4**/5\n- brief: 2."}}, (4, 2)),
        ({"message": {"content": "helpful (1 to 5): 4\n**brief** (1-3) : 2"}}, (4, 2)),
        ({"message": {"content": "helpful: 1 at first\nbrief: 2\nhelpful: 4"}}, (4, 2)),
        (written(token("helpful:"), token(" "), token("4", **SPLIT), token("\nbrief: "), token("2")), (4.25, 2)),
        (written(token("helpful:"), token(" 4", **SPLIT), token("\nbrief: 2")), (4.25, 2)),
        (written(token("helpful: 4"), token("\nbrief:"), token("2", **{"2": 0.5, "1": 0.5})), (4, 1.5)),
        ({**written(token("helpful: 4\nbrief: 2")), "logprobs": {"content": [{"token": 7}]}}, (4, 2)),
        ({**written(token("helpful: 4\nbrief: 2")), "logprobs": "none"}, (4, 2)),
    ],
)
def test_an_answer_is_read(choice, expected):
    assert tuple(ratings.read(choice, MARKS).values()) == pytest.approx(expected)


def test_marks_of_two_characters_are_read_as_written():
    ten = {"helpful": {str(i): float(i) for i in range(11)}}  # "1" may go on as "10"
    assert ratings.read(written(token("helpful:"), token("1", **{"1": 0.5, "2": 0.5})), ten) == {"helpful": 1.0}
    assert ratings.read({"message": {"content": " 10 "}}, ten) == {"helpful": 10.0}


@pytest.mark.parametrize(
    "text", ["", "helpful: 6\nbrief: 2", "helpful: 4.5\nbrief: 2", "helpful: good\nbrief: 2", "brief: 2", "4", None, 7]
)
def test_what_rates_not_everything_cannot_be_read(text):
    with pytest.raises(ratings.Unreadable):
        ratings.read({"message": {"content": text}}, MARKS)


def test_several_values_in_one_call():
    with Chat() as server:
        judge = Judge(rubric(server, price={"input": 1.0, "output": 2.0}))
        scores = rewards.score(judge.rewards, PROMPTS, TEXTS)
        assert scores.tolist() == [[4, 2], [4, 2]] and len(server.seen) == 2 == judge.spent.calls
        assert judge.names == ["helpful", "brief"]
        assert str(judge.spent) == "judge judge: 2 calls, 200 tokens in and 20 out, $0.0002"
        body = server.seen[0][2]
        assert (body["model"], body["temperature"], body["seed"], body["top_logprobs"]) == ("gpt", 0.0, 0, 20)
        asked = "".join(body["messages"][0]["content"] for _, _, body in server.seen)
        for part in (
            "- brief (1 to 3): Is it short?",
            "helpful: <1 to 5>",
            "system: be kind",
            "<reply>\nthree\n</reply>",
        ):
            assert part in asked


def test_draws_are_averaged_and_differ_by_their_seeds():
    with Chat(lambda text, body: (f"helpful: {1 + body['seed']}\nbrief: 1", None)) as server:
        judge = Judge(rubric(server), draws=3, in_flight=2)
        assert rewards.score(judge.rewards, ["p"], ["r"]).tolist() == [[2, 1]]
        assert {body["temperature"] for _, _, body in server.seen} == {1.0} and 1 <= server.most <= 2


def test_draws_of_a_server_without_seeds_are_kept_apart():
    answers = iter("1234")
    with Chat(lambda text, body: (f"helpful: {next(answers)}\nbrief: 1", None)) as server:
        for _ in range(2):
            judge = Judge(rubric(server, draws=3, extra={"seed": None}))
            assert rewards.score(judge.rewards, ["p"], ["r"]).tolist() == [[2, 1]]
        assert len(server.seen) == 3


def test_nothing_is_asked_twice_and_another_rubric_is_asked_anew():
    with Chat() as server:
        for draws, calls in ((1, 2), (1, 2), (3, 8), (3, 8)):
            rewards.score(Judge(rubric(server), draws=draws).rewards, PROMPTS, TEXTS)
            assert len(server.seen) == calls
        values = {"helpful": "Another question?", "brief": "Is it short?"}
        rewards.score(Judge(rubric(server) | {"values": values}).rewards, PROMPTS, TEXTS)
        assert len(server.seen) == 10


@pytest.mark.parametrize("names", [("prompt", "response"), ("question", "answer")])
def test_both_orders_of_a_comparison_cancel_a_bias_for_the_first(names):
    def says(text, body):
        first = text.index("good") < text.index("bad")
        better = {"A": 0.9, "B": 0.1} if first else {"A": 0.5, "B": 0.5}  # too fond of A
        rows = token("A", **better)
        return "helpful: A\nbrief: A", [token("helpful: "), rows, token("\nbrief: "), rows]

    with open("base.jsonl", "w") as file:
        for prompt, text in zip(PROMPTS, ("bad", "bad"), strict=True):
            prompt = prompt.messages if isinstance(prompt, Conversation) else prompt
            file.write(json.dumps({names[0]: prompt, names[1]: text}) + "\n")
    with Chat(says) as server:
        judge = Judge(rubric(server, compare="base.jsonl"))
        scores = rewards.score(judge.rewards, PROMPTS, ["good", "good {b}"])
        np.testing.assert_allclose(scores, 0.7)
        assert len(server.seen) == 4 and "Reply A:\n<reply>\ngood {b}\n</reply>" in str(
            [body["messages"][0]["content"] for _, _, body in server.seen]
        ).replace("\\n", "\n")
        with pytest.raises(UserError, match=r"base.jsonl: has no response to the prompt 'who'"):
            rewards.score(judge.rewards, ["who"], ["good"])


def test_answers_that_cannot_be_read_are_asked_for_again():
    answers = iter(["no", "helpful: 3\nbrief: 3", *["no"] * 3])
    with Chat(lambda text, body: (next(answers), None)) as server:
        judge = Judge(rubric(server, in_flight=1))
        assert rewards.score(judge.rewards, ["p"], ["r"]).tolist() == [[3, 3]]
        assert [body["temperature"] for _, _, body in server.seen] == [0.0, 0.7]
        with pytest.raises(UserError, match=r"to the response 'x' has no line .*, it is 'no' \(asked 3 times\)"):
            rewards.score(judge.rewards, ["p"], ["x"])


def test_a_server_without_log_probabilities_is_asked_without():
    with Chat() as server:
        true, both = server.complete, threading.Barrier(2, timeout=10)  # two requests are refused at once

        def complete(path, body):
            if "logprobs" not in body:
                return true(path, body)
            both.wait()
            return 400, {"error": {"message": "logprobs are not supported"}}

        server.complete = complete
        rewards.score(Judge(rubric(server, in_flight=2)).rewards, PROMPTS, TEXTS)
        assert ["logprobs" in body for _, _, body in server.seen] == [True, True, False, False]
        rewards.score(Judge(rubric(server)).rewards, PROMPTS, TEXTS)
        assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([429, (503, {"Retry-After": "0.01"}, b""), "drop"], None),
        ([(302, {"Location": "/"}, b"")], "answered 302: Found"),
        ([(200, {}, b"<html>")], "did not answer with JSON"),
        ([(200, {}, b'{"choices": []}')] * 3, "holds no text, but None"),
        ([(200, {}, b'{"choices": [{"message": {"content": NaN}, "finish_reason": "length"}]}')] * 3, "is too small"),
        ([500] * 2, r"answered 500: busy \(2 tries\)"),
    ],
)
def test_what_a_server_may_do(faults, message):
    with Chat() as server:
        server.faults = list(faults)
        judge = Judge(rubric(server, in_flight=1, tries=4 if message is None else 2))
        if message is None:
            assert rewards.score(judge.rewards, ["p"], ["r"]).tolist() == [[4, 2]]
        else:
            with pytest.raises(UserError, match=message) as caught:
                rewards.score(judge.rewards, ["p"], ["r"])
            assert "\n" not in str(caught.value)


def test_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with Chat() as server:
        rewards.score(Judge(rubric(server, api_key_env="JUDGE_KEY", extra={"seed": None})).rewards, ["p"], ["r"])
        assert server.seen[0][1]["Authorization"] == "Bearer secret" and "seed" not in server.seen[0][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "host"}, "a server's address must look like http://host:port/v1, got 'host'"),
        ({"api_key": "secret"}, "has no field 'api_key', it may have url, values, model"),
        ({"values": {}}, "values must map each value's name to its description"),
        ({"values": {"a b": "x"}}, "values: 'a b' cannot be a value's name"),
        ({"values": {"a": 3}}, "values: a must be a description"),
        ({"values": {"a": {"description": "x", "scale": [5, 1]}}}, "values: a: scale must be two whole numbers"),
        ({"scale": [1, 5.5]}, "scale must be two whole numbers from 0 to 100"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
        ({"draws": 2, "temperature": 0}, "temperature must be above 0 for several draws"),
        ({"requests_per_minute": "many"}, "requests_per_minute must be a number of at least 0.001, got 'many'"),
        ({"price": 3}, "price must be {input: ..., output: ...}, in dollars per million tokens, got 3"),
        ({"logprobs": "no"}, "logprobs must be true or false, got 'no'"),
        ({"extra": {"x": object}}, "extra must map fields of the request to JSON values"),
        ({"prompt": "Rate {response}"}, "prompt must have the placeholders {response}, {form}, it has no {form}"),
        ({"model": 3}, "model must be text, got 3"),
    ],
)
def test_mistakes_in_a_rubric(change, message):
    good = {"url": "http://host/v1", "values": {"helpful": "Does it help?"}}
    with pytest.raises(UserError) as caught:
        Judge({**good, **change})
    assert str(caught.value).startswith("the rubric: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_references_to_a_judge():
    given = {"url": "http://127.0.0.1:9/v1", "values": {"helpful": "Does it help?", "brief": "Is it short?"}}
    with open("rubric.yaml", "w") as file:
        yaml.dump(given, file, sort_keys=False)
    assert rewards.references.names(["judge:rubric.yaml"]) == ["helpful", "brief"]
    assert rewards.parse("judge:rubric.yaml#brief").name == "brief"
    assert rewards.parse("short=judge:rubric.yaml#brief").name == "short"
    assert rewards.parse("judge:rubric.yaml#brief[draws=3]").judge.rubric.draws == 3
    digests = rewards.references.contents(["judge:rubric.yaml"])
    with open("rubric.yaml", "a") as file:
        file.write("draws: 2\n")
    assert rewards.references.contents(["judge:rubric.yaml"]) != digests
    for reference, message in (
        ("judge:rubric.yaml#kind", "rubric.yaml: has no head 'kind', it has helpful, brief"),
        ("x=judge:rubric.yaml", "has several heads, name one as"),
        ("judge:none.yaml", "none.yaml: no such file"),
        ("judge:rubric.yaml[draw=2]", "rubric.yaml: has no field 'draw'"),
        ("judge:rubric.yaml,judge:rubric.yaml#brief", "rewards must be different"),
    ):
        assert message in refused("score", "c.parquet", "--rewards", reference, "--out", "s.parquet")


def test_the_command_resumes_after_a_kill_and_shows_the_cost(tmp_path):
    texts = [f"reply {i}" for i in range(100)]
    Candidates(["p"], [texts], [[[]] * 100], [[[]] * 100]).to_parquet("c.parquet")
    count, lock = {}, threading.Lock()

    def says(text, body):
        with lock:
            count[text] = count.get(text, 0) + 1
            if sum(count.values()) == 50:
                running.kill()
                running.wait()
        return "helpful: 4\nbrief: 2", None

    with Chat(says) as server:
        with open("rubric.yaml", "w") as file:
            yaml.dump(rubric(server, in_flight=4, price={"input": 10.0, "output": 20.0}), file, sort_keys=False)
        command = ["score", "c.parquet", "--rewards", "judge:rubric.yaml,diversity", "--out", "s.parquet"]
        running = subprocess.Popen(
            [sys.executable, "-m", "fastalign", *command], cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        assert running.wait() == -9
        code, _, err = fastalign(*command)
        assert code == 0, err
        assert len(count) == 100 and 100 <= sum(count.values()) <= 104  # those that were on their way
        cost = re.search(r"fastalign: judge rubric.yaml: (\d+) calls, (\S+) tokens in and (\d+) out, \$(\S+)\n", err)
        calls = int(cost[1])
        assert 50 <= calls <= 54 and cost.groups()[1:] == (f"{calls * 100:,}", f"{calls * 10}", f"{calls * 0.0012:.4f}")
        assert list(Candidates.from_parquet("s.parquet", kind="scored").rewards) == ["helpful", "brief", "diversity"]
        total = sum(count.values())
        assert fastalign(*command[:4], "--out", "again.parquet")[0] == 0
        assert sum(count.values()) == total


def test_align_grpo_and_best_of(tmp_path):
    tiny_folder(tmp_path / "model", scale=2.0)
    lines = [f"tell me a {size} {word}\n" for word in ("cat", "dog", "fox", "hat") for size in ("big", "red")]
    (tmp_path / "prompts.txt").write_text("".join(lines))

    def says(text, body):
        return f"helpful: {1 + len(text) % 5}\nbrief: {1 + len(text) % 3}", None

    with Chat(says) as server, RewardModels() as models:
        with open("rubric.yaml", "w") as file:
            yaml.dump(rubric(server), file, sort_keys=False)
        given = ["--model", "model", "--prompts", "prompts.txt", "--max-new-tokens", 4]
        references = f"judge:rubric.yaml,rm=server:{models.url}#rm"
        align = ["align", *given, "--rewards", references, "--palette", "helpful>=base,rest=free", "--how", "decode"]
        code, _, err = fastalign(*align, "--candidates", 8, "--out", "aligned")
        assert code == 0, err
        values = json.loads((tmp_path / "aligned" / "align.json").read_text())["values"]
        assert list(values) == ["helpful", "brief", "rm"]
        grpo = ["train", "grpo", *given, "--values", references, "--lam", "helpful=1,brief=0,rm=1", "--out", "trained"]
        code, _, err = fastalign(*grpo, "--num-generations", 2, "--batch-size", 4, "--max-steps", 1)
        assert code == 0, err
        assert list(json.loads((tmp_path / "trained" / "result.json").read_text())["values"]) == list(values)
        assert RewardFunctions(["judge:rubric.yaml"], None, {}, None).names == ["helpful", "brief"]
        chosen = best_of("model", ["why"], references.split(","), n=4, lam=[1, 0, 0], max_new_tokens=4, seed=0)
        assert len(chosen.texts) == 1


@pytest.mark.parametrize(
    "reference",
    [
        "x=server:http://127.0.0.1:9[tries=1]",
        "x=worst[server:http://127.0.0.1:9[tries=1],diversity]",
        "x=judge:rubric.yaml#helpful",
    ],
)
def test_a_server_that_is_not_there_is_told_before_anything_is_drawn(tmp_path, reference):
    with open("rubric.yaml", "w") as file:
        yaml.dump({"url": "http://127.0.0.1:9/v1", "model": "m", "tries": 1, "values": {"helpful": "Well?"}}, file)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    command = ["align", "--model", "no/such", "--prompts", "prompts.txt", "--rewards", reference, "--out", "aligned"]
    told = "http://127.0.0.1:9/v1/models gave no answer: Connection refused"
    assert told in refused(*command, "--palette", "x>=base", "--how", "decode")
    with pytest.raises(UserError, match=told):
        best_of("no/such", ["why"], reference, n=2, max_new_tokens=4, seed=0)
