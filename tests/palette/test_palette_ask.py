"""Palettes in words and by functions, one value after the other, and RLHF's terms."""

import numpy as np
import pytest
import torch
from test_palette import BAD, samples

from fastalign import UserError
from fastalign.palette import (
    lambda_of_rlhf,
    parse_palette,
    quantile_palette,
    raised_palette,
    rlhf_of_lambda,
    single_value_palette,
    solve,
    solve_in_turn,
)

NAMES = ["humor", "helpful", "harmless"]


def test_raised_palettes():
    rewards = samples(400, 3) + [1.0, -2.0, 0.5]
    mean, deviation = rewards.mean(axis=0), rewards.std(axis=0)
    np.testing.assert_allclose(raised_palette(rewards, {0: 1}), mean + [deviation[0], 0, 0], rtol=1e-12)
    np.testing.assert_allclose(raised_palette(rewards, [0, 0.5, 0], unit="absolute"), mean + [0, 0.5, 0], rtol=1e-12)
    ten = raised_palette(torch.from_numpy(rewards), [0.1] * 3, unit="relative")
    np.testing.assert_allclose(ten - mean, 0.1 * np.abs(mean), rtol=1e-9)
    # one deviation more of the first, nothing lost elsewhere
    result = solve(rewards, raised_palette(rewards, {0: 1}))
    assert result.feasible and (result.levels >= mean + [deviation[0] - 1e-8, -1e-8, -1e-8]).all()


def test_a_single_value_leaves_the_others_alone():
    rewards = samples(400, 3).astype(np.float32)
    level = float(np.quantile(rewards[:, 1], 0.8))
    result = solve(rewards, single_value_palette(rewards, 1, level))
    assert result.lam[0] == result.lam[2] == 0
    assert result.lam[1] == pytest.approx(solve(rewards[:, [1]], [level]).lam[0], rel=1e-8)


def test_palettes_in_words():
    rewards = samples(400, 3) + [1.0, -2.0, 0.5]
    mean, deviation = rewards.mean(axis=0), rewards.std(axis=0)
    parse = lambda text: parse_palette(text, NAMES, rewards)  # noqa: E731
    levels, senses = parse("0.5,-1,2e-1")
    assert levels.tolist() == [0.5, -1.0, 0.2] and senses == [">="] * 3
    levels, senses = parse("harmless<=0.25, humor=mean+1sd,helpful == -1.5")
    np.testing.assert_allclose(levels, [mean[0] + deviation[0], -1.5, 0.25])
    assert senses == [">=", "==", "<="]
    np.testing.assert_allclose(
        parse("humor=mean+10%,helpful=mean-10%,rest=mean")[0], mean + [0.1 * mean[0], 0.1 * mean[1], 0]
    )
    np.testing.assert_allclose(parse("helpful=mean - 0.5sd,rest=mean+0.1")[0], mean + [0.1, -0.5 * deviation[1], 0.1])
    np.testing.assert_allclose(parse("humor=q80,rest=mean")[0], quantile_palette(rewards, 0.8, values=[0]))
    levels, senses = parse("humor=1.5,rest<=free")
    np.testing.assert_allclose(levels, [1.5, *rewards.max(axis=0)[1:]])
    np.testing.assert_allclose(parse("humor=1.5,rest=free")[0], single_value_palette(rewards, 0, 1.5))
    levels, senses = parse("humor>=base+0.5sd, helpful<=+10%, harmless>=base")
    np.testing.assert_allclose(levels, mean + [0.5 * deviation[0], 0.1 * abs(mean[1]), 0])
    assert senses == [">=", "<=", ">="]
    np.testing.assert_allclose(parse("humor=-0.5sd,rest=base-1e-1")[0], mean - [0.5 * deviation[0], 0.1, 0.1])
    levels, senses = parse_palette("harmless==0.3", NAMES, rewards, rest="free")
    np.testing.assert_allclose(levels, [*rewards.min(axis=0)[:2], 0.3])
    assert senses == [">=", ">=", "=="]


@pytest.mark.parametrize(
    "name, content",
    [
        ("palette.json", '{"humor": ">=base+0.5sd", "helpful": "<= 0.2", "harmless": "base"}'),
        ("palette.yaml", "humor: base+0.5sd\nhelpful: <= 0.2\nharmless: '>= base'\n"),
        ("palette.yml", "- humor>=base+0.5sd\n- helpful<=0.2\n- harmless>=base\n"),
        (None, {"humor": "base+0.5sd", "helpful": "<=0.2", "harmless": "mean"}),
    ],
)
def test_palettes_in_files_and_mappings(tmp_path, name, content):
    rewards = samples(400, 3)
    if name is not None:
        (tmp_path / name).write_text(content)
        content = str(tmp_path / name)
    levels, senses = parse_palette(content, NAMES, rewards)
    mean, deviation = rewards.mean(axis=0), rewards.std(axis=0)
    np.testing.assert_allclose(levels, [mean[0] + 0.5 * deviation[0], 0.2, mean[2]])
    assert senses == [">=", "<=", ">="]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "must map each value to its level"),
        ("{}", "must map each value to its level"),
        ('{"humor": [1]}', "must map each value to its level"),
        ('{"humor": "', "cannot be read as YAML"),
        ('{"humour": 1}', "name each of humor, helpful, harmless once, got 'humour'"),
        ('{"kind": "palette", "values": []}', "palette files go to"),
        ('{"humor": 1, "helpful": 2, "humor": "<= 3"}', "must name each value once, got 'humor' again"),
    ],
)
def test_mistakes_in_files(tmp_path, content, message):
    path = tmp_path / "palette.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse_palette(str(path), NAMES, samples(50, 3))


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,2", r"must have 3 levels \(humor, helpful, harmless\), got 2"),
        ("1,2,x", "must be numbers or terms such as name>=0.5 or name<=q80, comma-separated, got '1,2,x'"),
        ("humor=1", "name each of humor, helpful, harmless once, got humor: add helpful, harmless or rest=mean"),
        ("humour=1,rest=mean", "name each of humor, helpful, harmless once, got 'humour'"),
        ("humor=1,humor=2,rest=mean", "got 'humor' again"),
        ("humor>=0.6,humor<=0.5,rest=mean", "bounds that one level can meet, got humor >= 0.6 and humor <= 0.5"),
        ("humor==0.6,humor==base,rest=mean", "bounds that one level can meet, got humor == 0.6 and humor == base"),
        ("humor>=0.6,humor>=base,rest=mean", "got 'humor' again"),
        (
            "humor>=9,humor<=10,rest=mean",
            r"one bound for each value, got .*: the base, .*, misses only humor >= 9",
        ),
        ("humor>=-9,humor<=9,rest=mean", r"one bound for each value, got .*: the base, .*, meets both"),
        ("missing.json", "no such file"),
        ("humor=lots,rest=mean", r"must be numbers, mean, mean\+1sd, mean\+10%, q80 or free, got 'lots'"),
        ("humor=mean+1e,rest=mean", "got 'mean\\+1e'"),
        ("humor==free,rest=mean", "must have a level after =="),
        ("humor=q101,rest=mean", "must ask for quantiles from q0 to q100, got 'q101'"),
        ("humor=1,2,3", "must be numbers or terms such as"),
        ("humor>1,rest=mean", "must be numbers or terms such as"),
    ],
)
def test_mistakes_in_words(text, message):
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        parse_palette(text, NAMES, samples(50, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: raised_palette(samples(20, 3), {3: 1}), "values must be column numbers from 0 to 2, got 3"),
        (lambda: raised_palette(samples(20, 3), [1, 2]), "amounts must be 3 finite numbers"),
        (
            lambda: raised_palette(samples(20, 3), {0: 1}, unit="sd"),
            "unit must be one of deviations, absolute, relative, got 'sd'",
        ),
        (lambda: raised_palette(BAD, {0: 1}), "rewards must be finite, got nan in row 7, column 2"),
        (lambda: single_value_palette(BAD, 0, 1.0), "rewards must be finite, got nan"),
        (
            lambda: single_value_palette(samples(20, 3), "humor", 1.0),
            "values must be column numbers from 0 to 2, got 'humor'",
        ),
        (lambda: lambda_of_rlhf(0, [1.0]), "beta must be positive, got 0"),
        (lambda: rlhf_of_lambda([0.0, 0.0]), "lam must be finite and not all 0"),
        (lambda: solve_in_turn(samples(20, 2), [0, 0], order=[0, 0]), "order must name columns from 0 to 1 once"),
        (lambda: solve_in_turn(samples(20, 2), [99, 0]), "value 0 alone cannot reach 99, at best"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("grouped", [False, True])
def test_rounds_one_value_at_a_time_approach_all_at_once(grouped):
    rewards = samples(500, 3, 3)
    options = {"groups": np.arange(500) // 25, "weights": np.random.default_rng(0).random(500)} if grouped else {}
    palette = rewards.mean(axis=0) + 0.3 * rewards.std(axis=0)
    together = solve(rewards, palette, **options)
    path = solve_in_turn(rewards, palette, rounds=40, order=[2, 0, 1], **options)
    away = np.abs(path - together.lam).max(axis=1) / np.abs(together.lam).max()
    assert away[0] > 1e-2  # once round is not enough: later values pull the first ones off
    assert away[-1] < 1e-6 and (np.diff(away[:8]) < 0).all()
    first = solve(rewards[:, [2]], palette[[2]], **options)
    one = solve_in_turn(rewards, palette, order=[2], **options)[0]
    assert one[:2].tolist() == [0, 0] and one[2] == pytest.approx(first.lam[0], rel=1e-9)


def model():
    """A small model of which every answer can be written down: three tokens, three places; log p0 and three rewards."""
    rng = np.random.default_rng(5)
    step = np.log(rng.dirichlet(np.ones(3), size=(3, 3)))
    texts = np.array(np.meshgrid(*[range(3)] * 3, indexing="ij")).reshape(3, -1).T
    before = np.c_[np.zeros(len(texts), int), texts[:, :-1]]
    log_p0 = step[np.arange(3), before, texts].sum(axis=1)
    return log_p0, np.c_[(texts == 0).sum(1), (np.diff(texts) > 0).sum(1), np.sin(texts @ [1, 2, 3])].astype(float)


def scalarised(log_p0, rewards, weights, beta):
    """The law that maximises E[w·R] − β KL(p ‖ p0), by ascent over all laws: no formula for it is used."""
    logits = torch.tensor(log_p0).requires_grad_()
    gain, base = torch.tensor(rewards @ weights), torch.tensor(log_p0)
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=120, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        log_p = torch.log_softmax(logits, 0)
        value = -(log_p.exp() * (gain - beta * (log_p - base))).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return torch.softmax(logits.detach(), 0).numpy()


def test_palettes_and_linear_scalarisation_realise_the_same_set():
    """Each law that some weights and β make is the answer to a palette, with λ = w / β; and the other way round."""
    log_p0, rewards = model()
    p0 = np.exp(log_p0)
    assert p0.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        weights, beta = rng.random(3) * (rng.random(3) < 0.8) + [1e-2, 0, 0], rng.uniform(0.3, 2)
        p = scalarised(log_p0, rewards, weights, beta)
        result = solve(rewards, p @ rewards, weights=p0)
        np.testing.assert_allclose(result.lam, lambda_of_rlhf(beta, weights), atol=1e-3)
        np.testing.assert_allclose(result.levels, p @ rewards, atol=2e-6)
    for _ in range(3):
        palette = p0 @ rewards + rng.uniform(-0.3, 0.5, 3)
        result = solve(rewards, palette, weights=p0)
        assert result.feasible and result.lam.any()
        beta, weights = rlhf_of_lambda(result.lam)
        assert np.abs(weights).sum() == pytest.approx(1)
        p = scalarised(log_p0, rewards, weights, beta)
        np.testing.assert_allclose(p @ rewards, result.levels, atol=1e-5)
        np.testing.assert_allclose(lambda_of_rlhf(beta, weights), result.lam, rtol=1e-12)
