"""Files and names that other libraries stumble over end in one line, or are shown as they are."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_folder
from typer.testing import CliRunner

from fastalign import UserError, palette
from fastalign._base.files import read_json
from fastalign.cli.main import app
from fastalign.data import palettes
from fastalign.decode import Candidates
from fastalign.jobs import align as pipeline

ROOT = Path(__file__).parents[2]
PALETTE = {"kind": "palette", "values": ["a"], "lambda": [0.5], "palette": [0.1], "sense": [">="], "kl": 0.1}


def scored(path, *names):
    values = {name: np.array([[0.0, 1.0], [1.0, 0.5]]) + i for i, name in enumerate(names)}
    result = Candidates(["p", "q"], [["x", "y"]] * 2, [[[1]] * 2] * 2, [[[-0.1]] * 2] * 2, rewards=values)
    result.to_parquet(path)
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
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert name in result.stdout


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
        ({"lambda": ["0.5"]}, r"lambda\[0\] must be a number, got '0.5'"),
        ({"lambda": [True]}, r"lambda\[0\] must be a number, got True"),
        ({"lambda": [10**400]}, r"lambda\[0\] must be a finite number, got inf"),
        ({"lambda": {"a": 1}}, "lambda must be a list of 1"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": "1"}, "version must be 1, got '1'"),
        ({"version": None}, "version must be 1, got None"),
        ({"sense": ["near"]}, r"sense\[0\] must be one of >=, <=, ==, got 'near'"),
        ({"sense": ">="}, "sense must be a list of 1"),
        ({"palette": "0.5"}, "palette must be a list of 1"),
        ({"free": [1]}, r"free\[0\] must be true or false, got 1"),
        ({"feasible": "no"}, "feasible must be true or false, got 'no'"),
        ({"kl": "1"}, "kl must be a number, got '1'"),
        ("lambda", "lacks 'lambda', which a palette file has"),
        ("values", "lacks 'values'"),
    ],
)
def test_a_palette_file_is_checked(tmp_path, change, message):
    row = {k: v for k, v in PALETTE.items() if k != change} if isinstance(change, str) else {**PALETTE, **change}
    (tmp_path / "p.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=message) as caught:
        pipeline.select(scored(tmp_path / "s.parquet", "a"), tmp_path / "p.json", tmp_path / "o.parquet", seed=0)
    assert str(caught.value).startswith(str(tmp_path / "p.json")) and "\n" not in str(caught.value)


COMMANDS = {  # that read a palette file, each with what of it it needs
    "map": ("lambda", "palette", "before", "levels", "kl"),
    "select": ("lambda",),
    "eval": ("lambda", "palette", "levels", "kl", "ess", "feasible"),
    "pareto": ("palette", "sense"),
    "sample": ("kl",),
    "sample --method": ("lambda",),
    "train distill": ("lambda",),
    "train dpo": ("lambda",),
    "train grpo": ("lambda",),
    "train ppo": ("lambda",),
    "soup-front": ("palette", "sense"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scored file, its palette and what was selected by it, and a model that is not asked."""
    folder = tmp_path_factory.mktemp("made")
    scored(folder / "s.parquet", "a")
    tiny_folder(folder / "model")
    for command in (
        ("map", folder / "s.parquet", "--palette", "0.8", "--out", folder / "p.json"),
        ("select", folder / "s.parquet", "--palette", folder / "p.json", "--out", folder / "o.parquet"),
    ):
        assert run(*command).exit_code == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", ["gone", "text", "short", "version"])
def test_every_command_names_a_palette_file_that_is_not_right(made, tmp_path, command, wrong):
    good = json.loads((made / "p.json").read_text())
    good.pop("worth")  # without which a foretelling goes by the KL
    palette_file = tmp_path / "p.json"
    for name in COMMANDS[command] if wrong != "version" else ("version",):
        bad = dict(good)
        if wrong == "gone":
            del bad[name]
        elif wrong == "version":
            bad[name] = 7
        else:
            bad[name] = "much" if wrong == "text" else []
        palette_file.write_text(json.dumps(bad))
        file, model, given = made / "s.parquet", made / "model", ("--palette", palette_file)
        out, few = tmp_path / "out", ("-n", 2, "--max-new-tokens", 2)
        result = run(
            *{
                "map": ("map", file, "--palette", "0.8", "--out", palette_file),
                "select": ("select", file, *given, "--out", out),
                "eval": ("eval", file, "--selected", made / "o.parquet", *given, "--out", out),
                "pareto": ("pareto", file, *given, "--out", out),
                "sample": ("sample", "--model", model, "--prompts", "bundled", "--limit", 1, *few, *given, "--out",
                           out),
                "sample --method": (
                    "sample", "--model", model, "--prompts", "bundled", "-n", 16, *given, "--method", "adaptive",
                    "--out", out,
                ),
                "train distill": ("train", "distill", file, "--model", model, *given, "--out", out),
                "train dpo": ("train", "dpo", "--model", model, "--data", file, *given, "--out", out),
                "train grpo": (
                    "train", "grpo", "--model", model, "--prompts", "bundled", *given, "--out", out,
                ),
                "train ppo": (
                    "train", "ppo", "--model", model, "--data", "bundled", *given, "--out", out,
                ),
                "soup-front": (
                    "soup-front", model, model, "--prompts", "bundled", "--rewards", "diversity", *few, *given, "--out",
                    out,
                ),
            }[command]
        )  # fmt: skip
        assert result.exit_code == 1, (name, result.output)
        lines = [line for line in result.stderr.splitlines() if "already there" not in line]
        assert len(lines) == 1 and str(palette_file) in lines[0] and name in lines[0], (name, result.stderr)
        assert not out.exists()


@pytest.mark.parametrize("command", [("map", "--quantile", "0.5"), ("pareto",), ("palette-ui", "--no-browser")])
def test_values_are_asked_for_once(tmp_path, command):
    out = ("--out", tmp_path / "out") if command[0] != "palette-ui" else ()
    result = run(command[0], scored(tmp_path / "s.parquet", "a", "b"), *command[1:], "--values", "a,a", *out)
    assert result.exit_code == 1 and result.stderr == "fastalign: --values must be different, got a, a\n"
    assert not (tmp_path / "out").exists()


def test_map_shows_what_was_asked(tmp_path):
    file, out = scored(tmp_path / "s.parquet", "a", "b", "c", "d"), tmp_path / "p.json"
    command = ("map", file, "--palette", "a=0.6,b<=1.7,c==2.65,d=free", "--out", out)
    for again in (False, True):  # from the solver, and from the file
        result = run(*command)
        assert result.exit_code == 0, result.output
        rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:5]}
        for name, wish in (("a", ">= 0.6000"), ("b", "<= 1.7000"), ("c", "== 2.6500"), ("d", "free")):
            assert wish in rows[name], (again, result.stdout)
    assert json.loads(out.read_text())["free"] == [False, False, False, True]


def test_a_level_that_is_not_there_asks_for_nothing(made, tmp_path):
    for change in ({"palette": [None]}, {"palette": [None], "sense": None, "free": None}):
        (tmp_path / "p.json").write_text(json.dumps({**json.loads((made / "p.json").read_text()), **change}))
        given = ("--palette", tmp_path / "p.json", "--out", "-")
        result = run("eval", made / "s.parquet", "--selected", made / "o.parquet", *given)
        assert result.exit_code == 0, result.output
        value = json.loads(result.stdout)["values"][0]
        assert (value["sense"], value["verdict"], value["short_by"]) == ("free", "met", 0)


def test_a_palette_file_is_read_once(made, tmp_path, monkeypatch):
    from fastalign._base import files

    read, seen = files.read_json, []
    monkeypatch.setattr(palettes, "read_json", lambda path, **more: seen.append(path) or read(path, **more))
    given = ("--palette", made / "p.json", "--out", tmp_path / "o.parquet")
    assert run("select", made / "s.parquet", *given).exit_code == 0 and len(seen) == 1


def test_what_else_a_palette_file_needs(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({**PALETTE, "sense": None, "kl": None, "palette": [None]}))
    assert palettes.read(tmp_path / "p.json", "lambda", "palette")["palette"] == [None]
    for name, message in (
        ("sense", "sense must be a list of 1"),
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
    result = run(command, file, *more[command], "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "row 2" in result.stderr and "reward:a" in result.stderr and result.stderr.count("\n") == 1


def test_extras_are_quoted_for_every_shell_wherever_they_are_named():
    patterns = ("*.md", "docs/**/*.md", "fastalign/**/*.py", "tests/**/*.py")
    text = [path for pattern in patterns for path in ROOT.glob(pattern)]
    bare = [
        f"{path.name}: {line.strip()}"
        for path in text
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install [^'\"#]*\[[a-z,]+\\?\]", line)
    ]
    assert bare == []
