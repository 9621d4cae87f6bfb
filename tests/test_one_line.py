"""Files and names that other libraries stumble over end in one line, or are shown as they are."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fastalign import UserError, palette, pipeline
from fastalign.cli import app
from fastalign.data import palettes
from fastalign.data.files import read_json
from fastalign.decode import Candidates

PALETTE = {"kind": "palette", "values": ["a"], "lambda": [0.5], "palette": [0.1], "sense": [">="], "kl": 0.1}


def scored(path, *names):
    values = {name: np.array([[0.0, 1.0], [1.0, 0.5]]) + i for i, name in enumerate(names)}
    found = Candidates(["p", "q"], [["x", "y"]] * 2, [[[1]] * 2] * 2, [[[-0.1]] * 2] * 2, rewards=values)
    found.to_parquet(path)
    return path


def run(*command):
    return CliRunner().invoke(app, list(map(str, command)))


@pytest.mark.parametrize("name", ["[/bold]", "[red]a[/red]", ":smile:", "[link=x]"])
def test_names_are_shown_as_they_are(tmp_path, name):
    file = scored(tmp_path / "s.parquet", name, "b")
    for command in (
        ("map", file, "--quantile", "0.5", "--out", tmp_path / "p.json"),
        ("select", file, "--palette", tmp_path / "p.json", "--out", tmp_path / "o.parquet"),
        ("eval", file, "--lam-grid", f"{name}=0:1:2", "--out", tmp_path / "g.json"),
    ):
        if command[0] == "eval" and "=" in name:
            continue
        found = run(*command)
        assert found.exit_code == 0, found.output
        assert name in found.stdout


@pytest.mark.parametrize("count", ["1000000000000", "1e3", "-1", str(10**400)])
def test_a_grid_is_counted_before_it_is_made(tmp_path, count):
    with pytest.raises(UserError, match="lam-grid must"):
        pipeline.evaluate_grid(scored(tmp_path / "s.parquet", "a"), f"a=0:1:{count}", tmp_path / "o.json")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lambda": None}, "lambda must be a list of 1"),
        ({"lambda": [0.5, 1.0]}, "lambda must be a list of 1"),
        ({"lambda": ["x"]}, r"lambda\[0\] must be a number, got 'x'"),
        ({"lambda": [float("nan")]}, r"lambda\[0\] must be a finite number, got nan"),
        ({"values": "a"}, "values must be a list of names"),
        ({"values": ["a", "a"]}, "values must be different"),
        ("lambda", "lacks 'lambda', which a palette file has"),
        ("values", "lacks 'values'"),
    ],
)
def test_a_palette_file_is_checked(tmp_path, change, message):
    row = {k: v for k, v in PALETTE.items() if k != change} if isinstance(change, str) else {**PALETTE, **change}
    (tmp_path / "p.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=message) as told:
        pipeline.select(scored(tmp_path / "s.parquet", "a"), tmp_path / "p.json", tmp_path / "o.parquet", seed=0)
    assert str(told.value).startswith(str(tmp_path / "p.json")) and "\n" not in str(told.value)


def test_what_else_a_palette_file_needs(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({**PALETTE, "sense": ["near"], "kl": None, "palette": [None]}))
    assert palettes.read(tmp_path / "p.json", "lambda", "palette")["palette"] == [None]
    for name, message in (
        ("sense", "sense.0. must be one of"),
        ("kl", "kl must be a number"),
        ("dual", "lacks 'dual'"),
    ):
        with pytest.raises(UserError, match=message):
            palettes.read(tmp_path / "p.json", name)


def test_json_that_is_nested_too_deep(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        read_json(tmp_path / "deep.json")


def test_rewards_of_a_broken_parquet_file(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1xxxxPAR1")
    with pytest.raises(UserError, match="not a Parquet file that can be read"):
        palette.ParquetRewards(tmp_path / "bad.parquet", ["a"])
    pq.write_table(pa.table({"a": np.arange(50_000.0)}), tmp_path / "cut.parquet", compression=None)
    content = bytearray((tmp_path / "cut.parquet").read_bytes())
    content[4:400] = bytes(396)  # the first page's header; the footer stays
    (tmp_path / "cut.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a Parquet file that can be read"):
        list(palette.ParquetRewards(tmp_path / "cut.parquet", ["a"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("command", ["map", "select", "score"])
def test_rewards_of_a_file_are_finite(tmp_path, value, command):
    file = scored(tmp_path / "s.parquet", "a")
    table = pq.read_table(file)
    at = table.column_names.index("reward:a")
    table = table.set_column(at, "reward:a", pa.array([0.0, 1.0, value, 0.5], pa.float32()))
    pq.write_table(table, file)
    (tmp_path / "p.json").write_text(json.dumps(PALETTE))
    more = {
        "map": ("--quantile", 0.5),
        "select": ("--palette", tmp_path / "p.json"),
        "score": ("--rewards", "diversity"),
    }
    found = run(command, file, *more[command], "--out", tmp_path / "out.parquet")
    assert found.exit_code == 1
    assert "row 2" in found.stderr and "reward:a" in found.stderr and found.stderr.count("\n") == 1
