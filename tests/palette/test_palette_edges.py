"""Palettes where rounding decides: rewards without variance, the hull's edge, weights of every magnitude, odd
memory."""

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from fastalign import palette
from fastalign._base.errors import UserError


def proves(certificate, rewards, c, weights=None, groups=None):
    """Whether every mixture of the samples falls short of c along it."""
    score = (rewards.astype(np.float64) - c) @ certificate
    score = score if weights is None else np.where(weights > 0, score, -np.inf)
    most = score.max() if groups is None else np.mean([score[groups == g].max() for g in np.unique(groups)])
    return most < 0


def with_constant(rng, form, dtype):
    """Rewards of which the last is constant over what counts, the level that it has, and how they are weighed."""
    if form == "weights":  # what has no weight may hold anything
        n = int(rng.integers(3, 60))
        weights, none = rng.random(n), rng.random(n) < 0.3
        none[:2] = True, False
        weights[none] = 0
        value = rng.choice([0.0, 1.0, 0.3, -5.0, 1e6])
        last = np.where(none, value + rng.normal(size=n) * 10, value).astype(dtype)
        level, options = float(dtype(value)), {"weights": weights}
    elif form == "groups":  # a reward of the prompt alone
        count, each = int(rng.integers(2, 40)), int(rng.integers(5, 16))
        n, groups = count * each, np.repeat(np.arange(count), each)
        values = (rng.normal(size=count) * 10 ** rng.uniform(-1, 3)).astype(dtype)
        last, level, options = values[groups], float(values.astype(np.float64).mean()), {"groups": groups}
    else:
        n = int(rng.integers(3, 1000))
        level = float(dtype(rng.normal() * 10 ** rng.uniform(-3, 6)))
        last, options = np.full(n, level, dtype), {}
    return np.stack([rng.normal(size=n).astype(dtype), last], 1), level, options


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["weights", "groups", "neither"])
@pytest.mark.parametrize("sense", [">=", "=="])
def test_a_value_that_cannot_be_moved_keeps_its_weight_at_0(form, dtype, sense):
    rng = np.random.default_rng(0)
    for _ in range(60):
        rewards, level, options = with_constant(rng, form, dtype)
        mean = palette.solve(rewards, [-9.0, -1e9], **options).levels[0]
        c = np.array([mean, level])
        result = palette.solve(rewards, c, sense=[">=", sense], **options)
        assert result.feasible and result.lam[1] == 0 and result.kl < 1e-9
        assert result.levels[1] == pytest.approx(level, rel=1e-6, abs=1e-12)
        step = 1e-3 * max(abs(level), 1)
        beyond = palette.solve(rewards, c + [0, step], sense=[">=", sense], **options)
        assert not beyond.feasible and proves(beyond.certificate, rewards, c + [0, step], **options)
        below = palette.solve(rewards, c - [0, step], sense=[">=", sense], **options)
        assert below.feasible == (sense == ">=") and (below.lam[1] == 0 or not below.feasible)


def test_a_verdict_of_infeasible_is_never_made_by_rounding():
    """A constant beside values without weight: λ = 0 meets the palette."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        rewards, level, options = with_constant(rng, "weights", np.float64)
        mean = float(options["weights"] @ rewards[:, 0] / options["weights"].sum())
        assert palette.solve(rewards, [mean, level], **options).feasible


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("beyond", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("how", ["corner", "face", "groups", "weights"])
def test_a_certificate_proves_what_it_says(dtype, beyond, how):
    """Palettes so many σ outside the hull: at a corner, or on a face, where the direction must be right to its last
    digits."""
    rng = np.random.default_rng(2)
    for _ in range(25):
        n, m = int(rng.integers(12, 100)), int(rng.integers(2, 5))
        rewards, options = rng.normal(size=(n, m)).astype(dtype), {}
        sigma, wide = rewards.std(0, dtype=np.float64), rewards.astype(np.float64)
        if how == "face":
            hull = ConvexHull(wide)
            face = rng.integers(len(hull.simplices))
            corner, away = wide[hull.simplices[face]].mean(0), hull.equations[face, :m]
            options["sense"] = "=="
        else:
            away = np.abs(rng.normal(size=m)) / sigma
            if how == "groups":
                options["groups"] = groups = rng.integers(3, size=n)
                scored = [wide[groups == g] for g in np.unique(groups)]
                corner = np.mean([x[(x @ away).argmax()] for x in scored], axis=0)
            else:
                corner = wide[(wide @ away).argmax()]
            if how == "weights":
                options["weights"] = rng.random(n) + 0.1
        # So far along the normal, in units of σ: the distance to the plane, and so to the hull, is no less.
        c = corner + beyond * (away * sigma**2) / np.linalg.norm(away * sigma)
        result = palette.solve(rewards, c, **options)
        options.pop("sense", None)
        assert not result.feasible
        assert proves(result.certificate, rewards, c, **options)
        assert 0 <= result.scaling < 1


@pytest.mark.parametrize("spread", [4, 20, 50, 300])
def test_weights_of_every_magnitude(spread):
    """A palette that a sample has is reachable, whatever that sample weighs; another's verdict is proved."""
    rng = np.random.default_rng(3)
    for trial in range(60):
        n, m = int(rng.integers(3, 40)), int(rng.integers(1, 5))
        rewards, weights = rng.normal(size=(n, m)), 10.0 ** rng.uniform(-spread, 0, size=n)
        weights[0] = 1.0
        has = rewards[rng.integers(n)]
        assert palette.solve(rewards, has - 0.1, weights=weights).feasible
        c = np.quantile(rewards, 0.7, axis=0) if trial % 2 else has + 0.5
        result = palette.solve(rewards, c, weights=weights)
        if result.feasible:
            assert (result.levels >= c - 1e-6).all()
        else:
            assert proves(result.certificate, rewards, c)


def test_many_palettes_at_once_have_the_same_verdicts():
    rng = np.random.default_rng(4)
    rewards = rng.normal(size=(50, 3))
    palettes = np.stack([rewards.max(0) * t for t in np.linspace(0.1, 1.2, 12)])
    result = palette.solve(rewards, palettes)
    for k, c in enumerate(palettes):
        one = palette.solve(rewards, c)
        assert bool(one.feasible) == bool(result.feasible[k])
        if not one.feasible:
            assert proves(result.certificate[k], rewards, c) and proves(one.certificate, rewards, c)


def views(x):
    """The same numbers at odd places in memory."""
    n, m = x.shape
    fields = np.zeros(n, dtype=[("name", "S3"), ("x", x.dtype, (m,)), ("id", "i4")])
    fields["x"] = x
    packed = np.zeros(n * m * x.itemsize + 1, dtype=np.uint8)
    unaligned = packed[1:].view(x.dtype).reshape(n, m)
    unaligned[:] = x
    wide = np.zeros((n, 2 * m), x.dtype)
    wide[:, ::2] = x
    return {
        "field of records": fields["x"],
        "unaligned": unaligned,
        "swapped": x.astype(x.dtype.newbyteorder()),
        "backwards": x[::-1].copy()[::-1],
        "turned": np.asfortranarray(x),
        "gaps": wide[:, ::2],
        "columns backwards": x[:, ::-1].copy()[:, ::-1],
        "read-only": np.broadcast_to(x, x.shape),
        "tensor": torch.from_numpy(x),
        "turned tensor": torch.from_numpy(np.asfortranarray(x)),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_rewards_are_read_where_they_lie_or_copied(dtype, m):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(70, m)).astype(dtype)
    c, weights, groups = x.mean(0) + 0.1, rng.random(70), np.repeat(np.arange(7), 10)
    records = np.zeros(70, dtype=[("w", "f8"), ("pad", "S3"), ("g", "i8"), ("c", "f8")])
    records["w"], records["g"], records["c"][:m] = weights, groups, c
    for options in ({}, {"weights": weights}, {"groups": groups}):
        expected = palette.solve(x, c, **options)
        assert expected.feasible
        for name, view in views(x).items():
            result = palette.solve(view, c, **options)
            np.testing.assert_allclose(result.lam, expected.lam, rtol=1e-6, err_msg=name)
        odd = {key: records[key[0]] for key in options}
        np.testing.assert_allclose(palette.solve(x, records["c"][:m], **odd).lam, expected.lam, rtol=1e-6)
        turned = np.stack([c, c], 1).T[::-1]
        np.testing.assert_allclose(palette.solve(x, turned, **options).lam[1], expected.lam, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e50, 1e150])
def test_a_scale_beyond_what_can_be_squared_is_reported(scale):
    rewards = np.random.default_rng(0).normal(size=(100, 2)) * scale
    with pytest.raises(UserError, match=r"rewards must have standard deviations between 1e-40 and 1e[+]40, got"):
        palette.solve(rewards, np.quantile(rewards, 0.7, axis=0))


def test_masked_values_are_not_passed_over():
    rewards = np.random.default_rng(0).normal(size=(100, 2))
    with pytest.raises(UserError, match="no masked values"):
        palette.solve(np.ma.masked_array(rewards, rewards > 1.5), [0.1, 0.1])
