"""Group advantages against plain loops, TRL's formulas and numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_advantages import plain_advantages

from fastalign.losses import group_advantages

NAN = float("nan")
HOWS = ("grpo", "batch", "dr_grpo", "rloo", "gdpo", "rank")
DOUBLE = {"dtype": torch.float64}


def trl(rewards, weights, how):
    """GRPOTrainer's lines, with its nanstd."""
    from trl.trainer.utils import nanstd

    groups, size, values = rewards.shape
    flat = rewards.reshape(-1, values)
    unscored = flat.isnan().all(1)
    if how == "gdpo":
        value = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
        scores = (value.view(-1, values) * weights).nansum(1)
        scores[unscored] = NAN
        advantages = (scores - scores.nanmean()) / (nanstd(scores) + 1e-4)
        return advantages.nan_to_num(0.0).view(groups, size)
    scores = (flat * weights).nansum(1)
    scores[unscored] = NAN
    scores = scores.view(groups, size)
    advantages = scores - scores.nanmean(1, keepdim=True)
    if how != "dr_grpo":
        std = nanstd(scores, dim=1, keepdim=True) if how == "grpo" else nanstd(scores.flatten())
        advantages = advantages / (std + 1e-4)
    return advantages.nan_to_num(0.0)


def random_rewards(*shape, unscored=0.0, seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(*shape, generator=draw, **options)
    return rewards.masked_fill(torch.rand(*shape, generator=draw) < unscored, NAN)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("how", HOWS)
@given(data=st.data())
def test_equals_the_loops(how, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)))
    number = st.one_of(st.just(NAN), st.integers(-2, 2).map(float), st.floats(-10, 10).map(lambda x: round(x, 2)))
    size = math.prod(shape)
    rewards = torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size)), **DOUBLE).view(shape)
    weights = data.draw(st.lists(st.sampled_from([-1.5, 0.0, 0.5, 1.0]), min_size=shape[2], max_size=shape[2]))
    result = group_advantages(rewards, weights=weights, how=how)
    expected = torch.tensor(plain_advantages(rewards.tolist(), weights, how), **DOUBLE)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("how", ["grpo", "batch", "dr_grpo", "gdpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("unscored", [0.0, 0.3])
def test_equals_trl(how, dtype, unscored):
    rewards = random_rewards(6, 8, 3, unscored=unscored, dtype=dtype)
    rewards[0, 0] = NAN
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=dtype)
    torch.testing.assert_close(group_advantages(rewards, weights=weights, how=how), trl(rewards, weights, how))


# Two prompts, three completions, two values; the fourth completion of neither was scored. Sums: 1 2 6, 4 4 7.
REWARDS = [[[0, 1], [1, 1], [5, 1], [NAN, NAN]], [[1, 3], [NAN, 4], [3, 4], [NAN, NAN]]]
BY_HAND = {
    "grpo": [[-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0], [-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5, 0]],
    "batch": [[-2 / 5.2**0.5, -1 / 5.2**0.5, 3 / 5.2**0.5, 0], [-1 / 5.2**0.5, -1 / 5.2**0.5, 2 / 5.2**0.5, 0]],
    "dr_grpo": [[-2, -1, 3, 0], [-1, -1, 2, 0]],
    "rloo": [[-3, -1.5, 4.5, 0], [-1.5, -1.5, 3, 0]],
    # The values normalised: (-2, -1, 3)/√7 and 0; (-1, ·, 1)/√2 and (-2, 1, 1)/√3. Their sums' variance: (5 + √6)/5.
    "gdpo": [[-0.61928, -0.30964, 0.92892, 0], [-1.52531, 0.47300, 1.05231, 0]],
    "rank": [[-1, 0, 1, 0], [-2, 0.5, 1.5, 0]],
}


@pytest.mark.parametrize("how", HOWS)
def test_by_hand(how):
    result = group_advantages(torch.tensor(REWARDS, **DOUBLE), how=how)
    torch.testing.assert_close(result, torch.tensor(BY_HAND[how], **DOUBLE), rtol=2e-4, atol=0)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [0.3, 1e8 + 0.1, -1e17])
def test_equal_rewards_give_exactly_0(how, dtype, level):
    rewards = random_rewards(4, 7, 3, unscored=0.2, dtype=dtype) * abs(level)
    equal = torch.tensor([level, level / 3, -level], dtype=dtype)
    rewards[1], rewards[3] = equal, torch.where(rewards[3].isnan(), NAN, equal)
    rewards[3, 0] = NAN
    weights = [0.1, 0.7, 0.3]
    result = group_advantages(rewards, weights=weights, how=how)
    assert result.isfinite().all() and result[0].any()
    assert not result[1].any()
    if how in ("gdpo", "rank"):  # a sum over fewer values is another one
        assert not result[3].any()
    assert not group_advantages(rewards[1:2], weights=weights, how=how).any()
    assert not group_advantages(rewards[:, :1], weights=weights, how=how).any() or how == "gdpo"
    assert not group_advantages(rewards[1:2].nan_to_num(level)[:, :1], how=how).any()


@pytest.mark.parametrize("how", HOWS)
def test_one_scored_completion_and_none(how):
    rewards = torch.full((2, 3, 2), NAN)
    rewards[0, 1, 0] = 7.0
    assert torch.equal(group_advantages(rewards, how=how), torch.zeros(2, 3))


@pytest.mark.parametrize("how", HOWS)
def test_what_is_not_scored_counts_for_nothing(how):
    rewards = random_rewards(3, 6, 2, **DOUBLE)
    rewards[:, 4:] = NAN
    result = group_advantages(rewards, how=how)
    torch.testing.assert_close(result[:, :4], group_advantages(rewards[:, :4].clone(), how=how))
    assert not result[:, 4:].any()


@pytest.mark.parametrize("how", HOWS)
def test_shapes_dtypes_and_gradients(how):
    for shape in ((0, 4, 2), (2, 0, 3), (2, 3, 0)):
        assert torch.equal(group_advantages(torch.zeros(shape), how=how), torch.zeros(shape[:2]))
    narrow = random_rewards(2, 4, 2).bfloat16()
    for rewards in (narrow, narrow.half(), narrow.float(), (10 * narrow).long(), narrow.double().requires_grad_()):
        weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
        result = group_advantages(rewards, weights=weights, how=how)
        assert result.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
        assert result.shape == (2, 4) and not result.requires_grad
        torch.testing.assert_close(result, group_advantages(rewards, how=how))
        wide = result.dtype
        torch.testing.assert_close(result, group_advantages(rewards.detach().to(wide), weights=(1, 1), how=how))
    assert group_advantages(narrow[..., :1], how=how).shape == (2, 4)  # one value


@pytest.mark.parametrize("how", HOWS)
def test_one_value_scaled_by_its_weight(how):
    rewards = random_rewards(3, 5, 1, **DOUBLE)
    once, twice = (group_advantages(rewards, weights=[w], how=how) for w in (1.0, -2.0))
    factor = -1.0 if how in ("grpo", "batch", "gdpo") else -2.0
    torch.testing.assert_close(twice, factor * once, rtol=1e-3, atol=0)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("how", HOWS)
def test_compiles(how):
    rewards = random_rewards(3, 5, 2, unscored=0.2)
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, how=how), group_advantages(rewards, how=how))
