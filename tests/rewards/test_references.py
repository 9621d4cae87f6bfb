"""Rewards by reference: every form, from Python and the command line, and one line for every mistake."""

import hashlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from commands import fastalign, refused
from test_reward_models import bert, tokenizer
from tiny import tiny_folder

from fastalign import UserError, rewards
from fastalign._base import references
from fastalign.decode import Candidates
from fastalign.rewards import own

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = """
import numpy as np

def short(prompts, responses):
    return [-float(len(text)) for text in responses]

def near(prompts, responses, target=3, *, scale=1.0):
    return [-scale * abs(len(text) - target) for text in responses]

def held(prompts, responses, *, word):
    return [float(word in text) for text in responses]

def any_of(prompts, responses, **options):
    return [float(len(options))] * len(responses)

def few(prompts, responses):
    return [1.0]

def hole(prompts, responses):
    return [float("nan")] * len(responses)

def words(prompts, responses):
    return ["good"] * len(responses)

def broken(prompts, responses):
    return 1 / 0

def three(a, b, c):
    return a

class Longest:
    name = "anything"

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, prompts, responses):
        return [self.scale * len(text) for text in responses]

longest = Longest()
"""
PROMPTS, TEXTS = ["a", "b"], ["one", "three"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("def short(:\n")
    (tmp_path / "fails.py").write_text("def short(p, r):\n    return r\nraise OSError('no disk')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def classifiers(here):
    for name, labels in (("one", ["score"]), ("three", ["toxic", "rude", "very bad"])):
        options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        bert(**options).save_pretrained(here / name)
        tokenizer().save_pretrained(here / name)
    return here


def test_a_list_is_split_outside_of_brackets():
    assert references.split("positive, p[a=1,b=[2, 3]],x.py:f,") == ["positive", "p[a=1,b=[2, 3]]", "x.py:f"]
    assert references.read("p[a=1,b=text,c=[2, 3]]").options == {"a": 1, "b": "text", "c": [2, 3]}


@pytest.mark.parametrize(
    ("reference", "name", "scores"),
    [
        ("mine.py:short", "short", [-3, -5]),
        ("brief=mine.py:short", "brief", [-3, -5]),
        ("mine.py:Longest", "Longest", [3, 5]),
        ("mine.py:Longest[scale=2]", "Longest", [6, 10]),
        ("mine.py:longest", "longest", [3, 5]),
        ("mine.py:near", "near", [0, -2]),
        ("mine.py:near[target=5,scale=2]", "near", [-4, 0]),
        ("five=mine.py:near[target=5]", "five", [-2, 0]),
        ("mine.py:held[word=thr]", "held", [0, 1]),
        ("mine.py:any_of[a=1,b=x]", "any_of", [2, 2]),
        ("mine:near[target=4]", "near", [-1, -1]),
        ("mine:short", "short", [-3, -5]),
    ],
)
def test_the_users_own_code(here, monkeypatch, reference, name, scores):
    monkeypatch.syspath_prepend(here)
    assert rewards.parse(reference).name == name
    np.testing.assert_array_equal(rewards.score(reference, PROMPTS, TEXTS)[:, 0], scores)


def test_a_module_of_the_current_folder(here, monkeypatch):
    """The command `fastalign`, unlike python -m, does not have it on its path."""
    (here / "lies_here.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    np.testing.assert_array_equal(rewards.score("lies_here:short", PROMPTS, TEXTS)[:, 0], [-3, -5])
    assert sys.path[-1] == str(here)
    del sys.modules["lies_here"]


def test_another_name_leaves_the_registered_reward_as_it_is():
    assert [rewards.parse(x).name for x in ("d=diversity", "diversity")] == ["d", "diversity"]


def test_classifiers(classifiers):
    texts = ["the cat sat", "very bad"]
    for reference, label, name in (
        ("hf:./three#toxic", "toxic", "toxic"),
        ("mean=hf:three#very bad", "very bad", "mean"),
    ):
        expected = rewards.score(rewards.from_classifier("three", label), PROMPTS, texts)
        np.testing.assert_array_equal(rewards.score(reference, PROMPTS, texts), expected)
        assert rewards.parse(reference).name == name
    torch.manual_seed(0)
    expected = rewards.score(rewards.from_pairwise("one"), PROMPTS, texts)
    np.testing.assert_array_equal(rewards.score("hf:one", PROMPTS, texts), expected)
    assert rewards.parse("hf:one").name == "one"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nope", "unknown reward 'nope'; available: positive"),
        ("none.py:short", "none.py: no such file"),
        (
            "mine.py:long",
            "mine.py: defines no long; it has short, near, held, any_of, few, hole, words, broken, three, Longest",
        ),
        ("bad.py:short", "bad.py: cannot be parsed as Python"),
        ("no_such_package.x:f", "no_such_package.x: no such module"),
        ("mine.py:", "must be a name, FILE.py:FUNCTION"),
        ("hf:", "must be a name, FILE.py:FUNCTION"),
        ("hf:a/b/c", "must be a model's name on the hub, or its folder, got 'a/b/c'"),
        ("hf:a/b#very bad", "'very bad' cannot be a reward's name, give one as in NAME=REFERENCE"),
        ("diversity#head", "diversity is a registered reward, which has no head 'head'"),
        ("diversity[x]", "its options must be name=value, each name once, got 'x'"),
        ("diversity[x=1", "must end with its options"),
    ],
)
def test_mistakes_that_are_told_before_anything_is_loaded(here, reference, message):
    with pytest.raises(UserError) as caught:
        rewards.check_names([reference])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine.py:few", "reward 'few' must return shape (2,), got (1,)"),
        ("mine.py:hole", "reward 'hole' must return finite scores, got nan at index 0"),
        ("mine.py:words", "reward 'words' must return 2 numbers, got list"),
        ("mine.py:broken", "reward 'broken': ZeroDivisionError: division by zero (mine.py, line 26)"),
        ("mine.py:near[goal=5]", "mine.py:near: reward 'near' has no option 'goal'; it has target, scale"),
        ("mine.py:short[scale=2]", "mine.py:short: reward 'short' has no option 'scale'; it has none"),
        ("mine.py:held", "mine.py:held: reward 'held' needs its option 'word', as in [word=value]"),
        ("mine.py:three", "mine.py:three: reward must be a function of (prompts, responses)"),
        ("fails.py:short", "fails.py: OSError: no disk (fails.py, line 3)"),
        ("hf:three", "hf:three: has several labels, name one as hf:three#LABEL: toxic, rude, very bad"),
        ("hf:three#kind", "hf:three: has no label 'kind', it has toxic, rude, very bad"),
        ("diversity[wrong=1]", "its options cannot be used"),
    ],
)
def test_mistakes_that_the_scores_show(classifiers, reference, message):
    rewards.check_names([reference])
    with pytest.raises(UserError) as caught:
        rewards.score(reference, PROMPTS, TEXTS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rewards_of_one_name(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    with pytest.raises(UserError, match="must be different, got short, short: give one another name"):
        rewards.check_names(["mine.py:short", "mine:short"])


def test_an_installed_package(monkeypatch):
    from importlib.metadata import EntryPoint

    from fastalign.rewards import registry

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    points = {name: EntryPoint(name, place, registry.GROUP) for name, place in PACKAGES.items()}
    monkeypatch.setattr(registry, "_installed", lambda: points)
    assert rewards.available()["theirs"].description == "from fastalign.rewards:Diversity"
    assert rewards.score("theirs", ["p"], ["a b a b a b"]).shape == (1, 1)
    rewards.check_names(["lost"])
    with pytest.raises(UserError, match=r"reward 'lost' cannot be loaded from fastalign.none:f: "):
        rewards.get("lost")


PACKAGES = {"theirs": "fastalign.rewards:Diversity", "lost": "fastalign.none:f"}


def test_score(here):
    empty = [[[], []]]
    Candidates(["p"], [TEXTS], empty, empty).to_parquet(here / "c.parquet")
    command = ["score", "c.parquet", "--rewards", "mine.py:short,x=mine.py:Longest[scale=2],diversity", "--out"]
    code, _, err = fastalign(*command, "s.parquet")
    assert code == 0, err
    scored = Candidates.from_parquet("s.parquet", kind="scored")
    assert list(scored.rewards) == ["short", "x", "diversity"] and scored.rewards["x"].tolist() == [[6, 10]]
    assert "already there" in fastalign(*command, "s.parquet")[2]
    assert "mine.py: is an input" in refused(*command, "mine.py", "--overwrite")
    (here / "mine.py").write_text(OWN + "\n")
    assert "s.parquet: exists, made of other inputs" in refused(*command, "s.parquet")


@pytest.mark.parametrize("module", ["lone_module", "a_package.inner.deep"])
def test_the_source_of_a_module_is_an_input(here, monkeypatch, module):
    source = here.joinpath(*module.split(".")).with_suffix(".py")
    for folder in [one for one in source.parents if here in one.parents]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
    source.write_text(OWN)
    empty = [[[], []]]
    Candidates(["p"], [TEXTS], empty, empty).to_parquet(here / "c.parquet")
    command = ["score", "c.parquet", "--rewards", f"{module}:short", "--out", "s.parquet"]
    assert fastalign(*command)[0] == 0 and "already there" in fastalign(*command)[2]
    assert own.source_of(module) == str(source) and own.source_of("numpy.no_such") is None
    source.write_text(OWN.replace("-float", "-2.0 * float"))
    assert "s.parquet: exists, made of other inputs" in refused(*command)


def test_align_and_grpo(here):
    tiny_folder(here / "model", scale=2.0)
    lines = [f"tell me a {size} {word}\n" for word in ("cat", "dog", "fox", "hat") for size in ("big", "red")]
    (here / "prompts.txt").write_text("".join(lines))
    given = ["--model", "model", "--prompts", "prompts.txt", "--max-new-tokens", 4]
    align = ["align", *given, "--rewards", "brief=mine.py:short,diversity", "--palette", "brief>=base", "--how"]
    code, _, err = fastalign(*align, "decode", "--candidates", 8, "--out", "aligned")
    assert code == 0, err
    assert list(json.loads((here / "aligned" / "align.json").read_text())["values"]) == ["brief", "diversity"]
    grpo = ["train", "grpo", *given, "--values", "mine.py:short", "--lam", "short=1", "--num-generations", 2]
    code, _, err = fastalign(*grpo, "--batch-size", 4, "--max-steps", 1, "--out", "trained")
    assert code == 0, err
    result = json.loads((here / "trained" / "result.json").read_text())
    assert list(result["values"]) == ["short"] and result["settings"]["values"] == ["mine.py:short"]
    digest = json.loads((here / "trained" / "run.json").read_text())["settings"]["contents"]["mine.py"]
    assert len(digest) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("return torch.ones(len(responses), dtype=torch.bfloat16)", 1.0),
        ("return torch.ones(len(responses), requires_grad=True)", 1.0),
        ("return None", "reward 'f' must return 2 numbers, got NoneType"),
        (
            "return [torch.ones((), requires_grad=True) for _ in responses]",
            "reward 'f' must return 2 numbers, got list",
        ),
        ("raise SystemExit(3)", "reward 'f': SystemExit: 3 (f.py, line 4)"),
    ],
)
def test_what_a_function_may_return(tmp_path, monkeypatch, body, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(f"import torch\n\ndef f(prompts, responses):\n    {body}\n")
    if wanted == 1.0:
        np.testing.assert_array_equal(rewards.score("f.py:f", PROMPTS, TEXTS)[:, 0], [1.0, 1.0])
    else:
        with pytest.raises(UserError, match="^" + re.escape(wanted)):
            rewards.score("f.py:f", PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("postive", "did you mean positive?"),
        ("map/humour", "did you mean map/humor?"),
        ("./no_such#head", "./no_such: no such folder of a reward model"),
    ],
)
def test_a_misspelt_name_is_told_with_the_right_one(reference, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rewards.check_names([reference])
