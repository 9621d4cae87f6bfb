"""A hub name without a network is one line within seconds, not a minute of attempts."""

import threading

import pytest
from huggingface_hub import constants

from fastalign import UserError
from fastalign._base import hub
from fastalign.data import rows
from fastalign.models.loading import resolve


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.2)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda *_, **__: threading.Event().wait(600), "no answer within 0.2 seconds"),
        (OSError("[Errno -3] Temporary failure in name resolution"), "Temporary failure in name resolution"),
    ],
    ids=["silence", "no network"],
)
def test_no_answer(monkeypatch, answer, why):
    def ask(*given, **options):
        if isinstance(answer, Exception):
            raise answer
        answer()

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    with pytest.raises(UserError) as caught:
        resolve("m/typo")
    assert str(caught.value).startswith("m/typo: no such local folder, and the hub cannot be reached: ")
    assert why in str(caught.value) and "\n" not in str(caught.value)
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="d/typo: no such file of pairs, and the hub cannot be reached: "):
        rows.from_hub("d/typo", split="train", what="pairs")


def test_any_answer_is_the_loader_s_to_tell(monkeypatch):
    pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **_: asked.append(url))
    assert resolve("m/typo") == "m/typo" and "m/typo" in asked[0]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: name)
    assert rows.from_hub("d/typo", split="train", what="pairs") == "d/typo" and "datasets/d/typo" in asked.pop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("m/typo") == "m/typo" and len(asked) == 1
