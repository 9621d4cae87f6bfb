"""Estimates of what many candidates will be worth, from a few, against measurements on other prompts."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastalign import UserError
from fastalign.decode import Worth, effective_sample_size, estimate, worth

LAWS = {  # scores λ·R of P prompts by N
    "gaussian": lambda rng, p: lambda n: rng.normal(size=(p, n)),
    "wide": lambda rng, p: lambda n: 2 * rng.normal(size=(p, n)),
    "unlike prompts": lambda rng, p: (lambda s: lambda n: s * rng.normal(size=(p, n)))(
        np.exp(rng.normal(size=(p, 1)) / 2)
    ),
    "skewed": lambda rng, p: lambda n: -2 * rng.exponential(size=(p, n)),
    "no variance": lambda rng, p: lambda n: 0.6 * rng.exponential(size=(p, n)),  # of the weights, Pareto with α = 1/0.6
    "no mean": lambda rng, p: lambda n: 1.3 * rng.exponential(size=(p, n)),
    "bounded": lambda rng, p: lambda n: 6 * rng.beta(2, 5, size=(p, n)),
    "whole numbers": lambda rng, p: lambda n: 0.8 * rng.poisson(3, size=(p, n)),
    "yes or no": lambda rng, p: lambda n: 2.0 * (rng.random((p, n)) < 0.5),
    "rarely yes": lambda rng, p: lambda n: 5.0 * (rng.random((p, n)) < 0.02),
}


@pytest.mark.parametrize(("prompts", "n", "many"), [(12, 64, 1024), (16, 32, 256), (8, 16, 64)])
@pytest.mark.parametrize("law", LAWS)
def test_the_interval_has_what_is_measured_later_and_promises_no_more(law, prompts, n, many):
    rng = np.random.default_rng(sum(map(ord, law)) + n)
    inside, short, rounds = 0, 0, 40
    for _ in range(rounds):
        low, high = worth(LAWS[law](rng, prompts)(n)[..., None], [1.0]).at(many, prompts=20)
        low = 1.0 if low is None else low  # nothing promised
        measured = effective_sample_size(LAWS[law](rng, 20)(many)[..., None], np.ones(1)).mean()
        inside += low <= measured <= high
        short += measured < low
    assert inside >= 0.9 * rounds and short <= 0.075 * rounds


def test_the_plug_in_promises_too_much():
    """What was said before, N e^-KL, lies above the measured value nearly always: the tests here can tell."""
    rng, above = np.random.default_rng(0), 0
    for _ in range(40):
        pilot, later = (LAWS["wide"](rng, 12)(n)[..., None] for n in (64, 1024))
        above += (
            1024 * np.exp(-estimate(pilot, [1.0], warn=False).kl[0]) > effective_sample_size(later, np.ones(1)).mean()
        )
    assert above >= 38


def test_up_to_the_pilots_own_number_it_is_measured():
    R = np.random.default_rng(1).normal(size=(200, 24, 2))
    result = worth(R, [0.8, -0.3])
    assert result.n[:6].tolist() == [1, 3, 6, 12, 24, 48]
    for n in (6, 12, 24):
        low, high = result.at(n)
        here = effective_sample_size(R[:, :n], np.array([0.8, -0.3])).mean()
        assert low < here < high < 1.2 * low
    wider, narrower = (result.at(24, prompts=p) for p in (5, 10**9))
    assert wider[0] < narrower[0] < narrower[1] < wider[1]
    assert result.at(1) == (1.0, 1.0)


def test_needed_is_where_the_ends_reach():
    result = worth(np.random.default_rng(2).normal(size=(30, 64, 1)), [1.0])
    fewest, most = result.needed(50)
    assert 50 < fewest < most
    assert result.at(fewest)[1] == pytest.approx(50, rel=0.02) and result.at(most)[0] == pytest.approx(50, rel=0.02)
    assert worth(np.zeros((3, 16, 1)), [0.0]).needed() == (10, 10)


@pytest.mark.parametrize(
    ("shape", "lam", "message"),
    [
        ((1, 64, 1), 1.0, "(1 prompt × 64 are too few for a lower bound)"),
        ((6, 4, 1), 1.0, "(6 prompts × 4 are too few for a lower bound)"),
        ((4, 8, 1), 3.0, "too few to say better"),
        ((12, 64, 1), 0.0, "are worth 1,000 effective ones (95 %, from 12 prompts × 64); 10 need 10"),
    ],
)
def test_what_it_cannot_tell_it_does_not_tell(shape, lam, message):
    assert message in worth(np.random.default_rng(3).normal(size=shape), [lam]).tell(1000)


def test_rewards_that_were_all_alike_promise_nothing():
    result = worth(np.zeros((12, 64, 1)), [5.0])
    assert result.at(1000)[0] is None and "too few for a lower bound" in result.tell(1000)


def test_extreme_scores_stay_finite():
    result = worth(np.random.default_rng(4).normal(size=(5, 100, 1)) * 1e4, [1.0])
    low, high = result.at(10**6)
    assert 1 <= low <= high <= 10**6 and "or more" in result.tell(100)


def test_it_goes_through_json_and_what_is_broken_is_reported():
    result = worth(np.random.default_rng(5).normal(size=(5, 16, 1)), [1.0])
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    again = Worth.from_json(data, "p.json: worth")
    assert again.tell(100) == result.tell(100) and again.needed() == result.needed()
    one = worth(np.random.default_rng(5).normal(size=(1, 16, 1)), [1.0])
    assert Worth.from_json(one.to_json(), "x").tell(9) == one.tell(9)
    breaks = [
        {"n": None},
        {"high": [0.0]},
        {"low": "x"},
        {"low_error": None},
        {"prompts": 0},
        {"n": data["n"][::-1]},
        {"high": [float("nan")] * len(data["n"])},
    ]
    for change in breaks:
        with pytest.raises(UserError, match=r"p\.json: worth is not what `fastalign map` writes"):
            Worth.from_json({**data, **change}, "p.json: worth")
    for broken in (7, [], {}):
        with pytest.raises(UserError, match=r"p\.json"):
            Worth.from_json(broken, "p.json: worth")


def test_the_real_cases_of_the_repository_hold():
    result = json.loads((Path(__file__).parents[2] / "bench" / "results" / "worth.json").read_text())
    cases = result["cases"]
    inside = [(case["low"] or 1) <= case["measured"] <= case["high"] for case in cases]
    assert len(cases) == 20 and sum(inside) == result["inside"] >= 18 and result["below"] <= 1
    lines = [case for case in cases if case["low"] and case["high"] <= 10 * case["low"]]
    assert len(lines) >= 10  # and most of them say something


def test_what_a_file_rounds_changes_no_number_needed():
    rewards = np.random.default_rng(0).normal(size=(6, 12, 1))
    result = worth(rewards, [0.0])
    again = type(result).from_json(json.loads(json.dumps(result.to_json())), "x")
    assert again.needed() == result.needed() == (10, 10)
