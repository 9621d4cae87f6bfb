"""The same answer wherever the rewards lie: mapped files, Parquet read in chunks, shards on ranks, a device."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_palette import samples

from fastalign import UserError
from fastalign.palette import ParquetRewards, quantile_palette, solve
from fastalign.palette.inputs import as_rewards
from fastalign.palette.passes import ArrayPass, DevicePass

NAMES = ["humor", "helpful", "harmless"]


def data(n=6000):
    rng = np.random.default_rng(1)
    rewards = samples(n, 3, 4, "bounded").astype(np.float32)
    groups = np.sort(rng.integers(0, n // 15, n)).astype(np.int64)
    return rewards, groups, rng.random(n)


def options_of(form, groups, weights):
    return {
        "joint": {},
        "groups": {"groups": groups},
        "weights": {"weights": weights},
        "both": {"groups": groups, "weights": weights},
    }[form]


def assert_same(found, expected, tolerance=1e-7):
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "iterations":
            continue
        assert (ours is None) == (theirs is None), field.name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-7, err_msg=field.name)


def write(path, rewards, groups, weights):
    columns = dict(zip(NAMES, rewards.T, strict=True)) | {
        "prompt": groups,
        "weight": weights,
        "text": groups.astype(str),
    }
    pq.write_table(pa.table(columns), path, row_group_size=700)


@pytest.mark.parametrize("form", ["joint", "groups", "weights", "both"])
def test_parquet_in_chunks(tmp_path, form):
    rewards, groups, weights = data()
    half = len(rewards) // 2
    for k, rows in enumerate((slice(0, half), slice(half, None))):  # the second file goes on within a prompt
        write(tmp_path / f"{k}.parquet", rewards[rows], groups[rows], weights[rows])
    groups[half] = groups[half - 1]
    write(tmp_path / "1.parquet", rewards[half:], groups[half:], weights[half:])
    named = {name: column for name, column in (("groups", "prompt"), ("weights", "weight")) if form in (name, "both")}
    source = ParquetRewards(tmp_path, NAMES, chunk_rows=500, **named)
    palettes = np.array([quantile_palette(rewards, q) for q in (0.6, 0.999)])
    result = solve(source, palettes)
    assert result.feasible.tolist() == [True, False]
    assert_same(result, solve(rewards, palettes, **options_of(form, groups, weights)))
    assert sum(len(chunk[0]) for chunk in source) == len(rewards)
    if "groups" in named:
        seen = [set(chunk[2]) for chunk in source]
        assert len(seen) > 5 and sum(map(len, seen)) == len(set(groups))  # no prompt in two chunks


def test_chunks_start_from_few_rows(tmp_path):
    rewards, groups, weights = data(140_000)
    write(tmp_path / "a.parquet", rewards, groups, weights)
    palette = quantile_palette(rewards, 0.6)
    source = ParquetRewards([tmp_path / "a.parquet"], NAMES, chunk_rows=30_000)
    reads = []
    source._chunks = lambda chunks=source._chunks: reads.append(1) or chunks()
    result = solve(source, palette)
    assert_same(result, solve(rewards, palette), 1e-6)
    assert len(reads) == 1 + result.iterations <= 6


def test_a_mapped_array_is_read_in_place(tmp_path):
    rewards, *_ = data()
    np.save(tmp_path / "r.npy", rewards)
    mapped = np.load(tmp_path / "r.npy", mmap_mode="r")
    assert np.shares_memory(as_rewards(mapped), mapped)
    palette = quantile_palette(rewards, 0.7)
    np.testing.assert_array_equal(solve(mapped, palette).lam, solve(rewards, palette).lam)


@pytest.mark.parametrize("form", ["joint", "both"])
def test_a_device_pass_is_the_array_pass(form):
    rewards, groups, weights = data(500)
    options = options_of(form, groups, np.log(weights))
    options = {{"weights": "log_weights"}.get(k, k): v for k, v in options.items()}
    ours, theirs = DevicePass(torch.from_numpy(rewards), **options), ArrayPass(rewards, **options)
    np.testing.assert_array_equal(ours.center, theirs.center)
    lam = np.array([[0.0, 0.0, 0.0], [0.5, 1.0, -0.3]])
    for a, b in zip(ours(lam), theirs(lam), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert (ours.total, ours.group_count) == (theirs.total, theirs.group_count)
    part = ours.part(100)
    assert part is None if form == "both" else 50 <= part.rows <= 100


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.close()


def solve_my_share(form, quantiles, n):
    rewards, groups, weights = data(n)
    palettes = np.array([quantile_palette(rewards, q) for q in quantiles])
    cut = np.searchsorted(groups, groups[n // 3])  # uneven shares, whole prompts
    rows = slice(0, cut) if dist.get_rank() == 0 else slice(cut, n)
    return solve(
        rewards[rows], palettes, process_group=dist.group.WORLD, **options_of(form, groups[rows], weights[rows])
    )


@pytest.mark.parametrize("form", ["joint", "groups", "weights"])
def test_shards_on_two_ranks(ranks, form):
    rewards, groups, weights = data(4000)
    palettes = np.array([quantile_palette(rewards, q) for q in (0.6, 0.999)])
    one, other = ranks(solve_my_share, form, (0.6, 0.999), 4000)
    for field in dataclasses.fields(one):  # the same bits everywhere
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert_same(one, solve(rewards, palettes, **options_of(form, groups, weights)))


def test_shards_start_from_few_rows(ranks):
    one, other = ranks(solve_my_share, "joint", (0.6,), 140_000)
    rewards, *_ = data(140_000)
    whole = solve(rewards, quantile_palette(rewards, 0.6)[None])
    np.testing.assert_array_equal(one.lam, other.lam)
    np.testing.assert_allclose(one.lam, whole.lam, rtol=1e-7)
    assert one.iterations[0] <= 5


def one_rank_errs(what):
    rewards = samples(50, 2)
    palette = np.zeros(2)
    if dist.get_rank() == 1:
        rewards, palette = {"shape": (rewards[0], palette), "nan": (np.full((50, 2), np.nan), palette)}[what]
    try:
        solve(rewards, palette, process_group=dist.group.WORLD)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("what, message", [("shape", "rewards must have shape"), ("nan", "rewards must be finite")])
def test_a_mistake_on_one_rank_is_reported_by_all(ranks, what, message):
    for text in ranks(one_rank_errs, what):
        assert message in text and text.endswith("(on rank 1)")


def test_mistakes_in_a_parquet_source(tmp_path):
    rewards, groups, weights = data(300)
    path = tmp_path / "a.parquet"
    write(path, rewards, groups, weights)
    with pytest.raises(UserError, match="has no column 'humour', only humor, helpful"):
        ParquetRewards(path, ["humour"])
    with pytest.raises(UserError, match="column 'text' must hold numbers, got string"):
        ParquetRewards(path, ["text"])
    with pytest.raises(UserError, match="column 'weight' must hold integers, got double"):
        ParquetRewards(path, NAMES, groups="weight")
    with pytest.raises(FileNotFoundError, match=r"b\.parquet: no such file"):
        ParquetRewards(tmp_path / "b.parquet", NAMES)
    with pytest.raises(UserError, match="at least one sample and one reward"):
        ParquetRewards(path, [])
    with pytest.raises(UserError, match="groups and weights must be names of columns given to ParquetRewards"):
        solve(ParquetRewards(path, NAMES), np.zeros(3), groups=groups)
    with pytest.raises(UserError, match="one level for each of the 3 rewards, got 2"):
        solve(ParquetRewards(path, NAMES), np.zeros(2))
    write(path, rewards, groups[::-1], weights - 0.5)
    with pytest.raises(UserError, match="rows must be sorted by 'prompt'"):
        solve(ParquetRewards(path, NAMES, groups="prompt"), np.zeros(3))
    with pytest.raises(UserError, match="weights must be finite and not negative"):
        solve(ParquetRewards(path, NAMES, weights="weight"), np.zeros(3))
    rewards[7, 1] = np.nan
    write(path, rewards, groups, 0 * weights)
    with pytest.raises(UserError, match="rewards must be finite, got nan in row 7, column 1"):
        solve(ParquetRewards(path, NAMES), np.zeros(3))
    with pytest.raises(UserError, match="weights must be positive in at least one row"):
        solve(ParquetRewards(path, NAMES, weights="weight"), np.zeros(3))
    pq.write_table(pa.table({"humor": pa.array([1.0, None])}), path)
    with pytest.raises(UserError, match="column 'humor' must have no missing values, got 1"):
        solve(ParquetRewards(path, ["humor"]), np.zeros(1))
