"""Perspective's attributes: what is asked, what is kept, and one line for every mistake."""

import numpy as np
import pytest
from commands import fastalign
from loopback import LoopbackServer

from fastalign import UserError, rewards
from fastalign._base import http
from fastalign.decode import Candidates
from fastalign.rewards.presets import PERSPECTIVE

TEXTS = ["you fool", "thank you", ""]
SECRET = "secret-key"


def probability(name, text):
    return round((PERSPECTIVE.index(name) + len(text)) / 20_000, 6)


class Service(LoopbackServer):
    def complete(self, path, body):
        assert path == "/v1alpha1/comments:analyze" and body["doNotStore"] is True
        text = body["comment"]["text"]
        scores = {
            name: {"summaryScore": {"value": probability(name, text), "type": "PROBABILITY"}}
            for name in body["requestedAttributes"]
        }
        return {"attributeScores": scores, "languages": body.get("languages", ["en"])}


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PERSPECTIVE_API_KEY", SECRET)
    monkeypatch.setattr(http, "WAIT", 0.001)
    monkeypatch.chdir(tmp_path)
    with Service() as server:
        yield server


def reference(service, name, **more):
    options = {"url": service.url.removesuffix("/v1"), "per_minute": 600000, **more}
    return f"perspective/{name}[{','.join(f'{key}={value}' for key, value in options.items())}]"


def scores(service, *names, texts=TEXTS, **more):
    return rewards.score([reference(service, name, **more) for name in names], ["p"] * len(texts), texts)


def test_scores_are_negative_probabilities_and_no_call_is_made_twice(service, tmp_path):
    found = scores(service, "toxicity", "threat")
    expected = [[-probability(name, text) if text else 0 for name in ("TOXICITY", "THREAT")] for text in TEXTS]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(service.seen) == 2  # of two texts, whatever the attributes, and none of the empty one
    for path, headers, body in service.seen:
        assert headers["X-Goog-Api-Key"] == SECRET and SECRET not in path + str(body)
        assert set(body["requestedAttributes"]) == set(PERSPECTIVE) and body["languages"] == ["en"]
    np.testing.assert_array_equal(scores(service, "toxicity", "threat"), found)
    assert len(service.seen) == 2
    assert SECRET.encode() not in (tmp_path / "cache" / "rewards.sqlite").read_bytes()
    scores(service, "toxicity", language="null")
    assert len(service.seen) == 4 and "languages" not in service.seen[-1][2]


def test_a_long_text_is_cut_between_characters(service):
    scores(service, "insult", texts=["é" * 20_000 + "x"])
    assert service.seen[0][2]["comment"]["text"] == "é" * 10_240


def test_a_busy_service_is_asked_again_at_its_own_pace(service):
    service.faults = [(429, {"Retry-After": "0"}, {"error": {"message": "Quota exceeded"}}), 503]
    scores(service, "toxicity")
    assert len(service.seen) == 4
    paced = rewards.parse(reference(service, "toxicity", per_minute=3000))
    rewards.references.reach([paced])
    assert paced._http._pace._gap == pytest.approx(0.02)


def test_from_the_command_line(service):
    empty = [[[] for _ in TEXTS]]
    Candidates(["p"], [TEXTS], empty, empty).to_parquet("c.parquet")
    code, _, err = fastalign("score", "c.parquet", "--rewards", f"rude={reference(service, 'insult')}", "--out",
                             "s.parquet")  # fmt: skip
    assert code == 0, err
    assert list(Candidates.from_parquet("s.parquet").rewards) == ["rude"]


def test_mistakes_are_one_line(service, monkeypatch):
    def told():
        with pytest.raises(UserError) as caught:
            scores(service, "toxicity")
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    service.faults = [(403, {}, {"error": {"code": 403, "message": f"the key {SECRET} has been suspended"}})]
    assert "answered 403: the key (the key) has been suspended" in told()
    service.answer = lambda answer: {"attributeScores": {}}
    assert "its answer must hold a probability of TOXICITY, got None" in told()
    service.answer = lambda answer: {
        "attributeScores": {name: {"summaryScore": {"value": 1.5}} for name in PERSPECTIVE}
    }
    assert "must hold a probability of TOXICITY, got 1.5" in told()
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    assert told().endswith("which needs a key: set $PERSPECTIVE_API_KEY")
    with pytest.raises(UserError, match="its options cannot be used"):
        rewards.parse("perspective/toxicity[api_key=x]")
