"""Soups measured along ρ with no soup written, and the ρ chosen for a palette."""

import json

import numpy as np
import pytest
from test_soup_lora import adapter
from tiny import tiny_folder
from typer.testing import CliRunner

from fastalign import rewards, soup
from fastalign._base.errors import UserError
from fastalign.cli.main import app
from fastalign.decode import Candidates, Sampler
from fastalign.jobs import soup_front
from fastalign.rewards import registry

PROMPTS = ["tell me a story", "the cat", "why", "hello world"]
DRAW = {"n": 3, "max_new_tokens": 4, "seed": 0, "show_progress": False}


@pytest.fixture(scope="module", autouse=True)
def vowels():
    """Two opposed values."""
    kept = {
        "length": lambda prompts, texts: [float(len(text)) for text in texts],
        "vowels": lambda prompts, texts: [text.count("a") - float(len(text)) for text in texts],
    }
    for name, function in kept.items():
        rewards.register(name, lambda function=function, name=name: rewards.from_function(function, name))
    yield
    for name in kept:
        registry._entries.pop(name)
        registry._instances.pop(name, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [tiny_folder(root / name, seed=i) for i, name in enumerate(("long", "short", "third"))]


def test_a_walk_measures_what_each_soup_would(models, tmp_path):
    rho = soup.simplex_grid(3, 3)
    result = soup.walk(models, rho, PROMPTS, ["length", "vowels"], tmp_path / "out", **DRAW)
    assert result.levels.shape == (6, 2) and result.models == ["long", "short", "third"]
    soup.merge(models, rho[1], tmp_path / "merged")
    drawn = Sampler.from_pretrained(str(tmp_path / "merged")).sample(PROMPTS, n=3, max_new_tokens=4, seed=0)
    stored = Candidates.from_parquet(tmp_path / "out" / "001.parquet")
    assert drawn.texts == stored.texts
    lengths = np.array([[len(text) for text in row] for row in drawn.texts], dtype=float)
    assert result.levels[1, 0] == pytest.approx(lengths.mean())
    assert result.stderr[1, 0] == pytest.approx(lengths.mean(axis=1).std(ddof=1) / 2)
    assert len({tuple(x) for x in result.levels.tolist()}) > 3

    (tmp_path / "out" / "004.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = soup.walk(models, rho, PROMPTS, ["length", "vowels"], tmp_path / "out", **DRAW)
    assert np.array_equal(again.means, result.means)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(UserError, match="is of other soups or settings"):
        soup.walk(models, rho, PROMPTS, ["length"], tmp_path / "out", **DRAW)


def test_a_walk_over_adapters(models, tmp_path):
    pair = [adapter(models[0], tmp_path / f"a{i}", i, r=2, target_modules=["q_proj", "down_proj"]) for i in range(2)]
    result = soup.walk(pair, [[0, 0], [2.0, 1.0]], PROMPTS, ["length"], tmp_path / "out", base=models[0], **DRAW)
    soup.apply_adapters(models[0], pair, [2.0, 1.0], tmp_path / "merged")
    for k, of in enumerate((models[0], tmp_path / "merged")):
        drawn = Sampler.from_pretrained(str(of)).sample(PROMPTS, n=3, max_new_tokens=4, seed=0)
        assert drawn.texts == Candidates.from_parquet(tmp_path / "out" / f"{k:03d}.parquet").texts
    assert not np.array_equal(result.means[0], result.means[1])


def made(rho, levels, noise=0.0):
    """A front with these levels, from 50 prompts."""
    levels = np.asarray(levels, dtype=float)
    means = levels[:, None] + noise * np.random.default_rng(0).normal(size=(1, 50, levels.shape[1]))
    means += levels[:, None] - means.mean(axis=1, keepdims=True)
    names = [f"v{j}" for j in range(levels.shape[1])]
    return soup.SoupFront(
        names, ["a", "b", "c"][: len(rho[0])], np.asarray(rho, dtype=float), means, np.ones(len(names)), 4
    )


def test_the_rho_for_a_palette_is_found_between_the_soups():
    two = made([[1, 0], [0.5, 0.5], [0, 1]], [[4.0, 0.0], [3.0, 2.0], [0.0, 3.0]], noise=1.0)
    result = soup.choose(two, [3.5, 0.5])
    # On the line from (4, 0) to (3, 2): margins 0.5 - t and 2 t - 0.5 meet at t = 1/3.
    assert result.rho == pytest.approx([5 / 6, 1 / 6]) and result.levels == pytest.approx([11 / 3, 2 / 3])
    assert result.margin == pytest.approx(1 / 6) and result.between == [0, 1]
    assert result.stderr == pytest.approx(two.means[0].std(axis=0, ddof=1) / np.sqrt(50))
    out = soup.choose(two, [4.0, 2.0])
    assert out.margin == pytest.approx(-2 / 3) and soup.choose(two, [-np.inf, 2.0]).rho == pytest.approx([0, 1])
    rho = soup.simplex_grid(3, 5)
    three = made(rho, np.sqrt(rho))
    result = soup.choose(three, [0.5, 0.5, 0.5])
    assert result.margin == pytest.approx(result.levels.min() - 0.5) and result.margin <= np.sqrt(1 / 3) - 0.5
    assert result.margin >= max(np.sqrt(rho).min(axis=1)) - 0.5 - 1e-9
    assert abs(result.rho - 1 / 3).max() < 0.1 and result.rho.sum() == pytest.approx(1)
    assert soup.choose(made([[1.0, 0.0]], [[1.0, 2.0]]), [0.5, 1.0]).rho == pytest.approx([1, 0])


def test_what_does_not_fit_is_refused(models, tmp_path):
    two = made([[1, 0], [0, 1]], [[4.0, 0.0], [0.0, 3.0]])
    for palette, part in (
        ([1.0], "must have one level for each of v0, v1"),
        ([-np.inf, -np.inf], "a level of one value"),
    ):
        with pytest.raises(UserError, match=part):
            soup.choose(two, palette)
    two.write(tmp_path / "soups.json")
    back = soup.SoupFront.read(tmp_path / "soups.json")
    assert np.array_equal(back.means, two.means) and back.models == two.models
    kept = json.loads((tmp_path / "soups.json").read_text())
    for change, part in (({"means": [[[1.0]]]}, "do not fit"), ({"rho": "x"}, "not a whole soup_front file")):
        (tmp_path / "bad.json").write_text(json.dumps(kept | change))
        with pytest.raises(UserError, match=part):
            soup.SoupFront.read(tmp_path / "bad.json")
    odd = [
        {"palette": [1e308, 1e308]},
        None,
        True,
        -1,
        "x",
        [],
        [[]],
        {},
        [1],
        [True, False],
        [1e308, -1e308],
        [float("nan")] * 2,
        {"a": 1},
    ]
    for name in ("values", "models", "rho", "means", "std", "candidates", "chosen"):
        for value in odd:
            if (name, value) in (("candidates", True), ("candidates", -1), ("chosen", None)):
                continue
            if (name, value) == ("std", [1e308, -1e308]) or (name, value) == ("std", [True, False]):
                continue
            (tmp_path / "bad.json").write_text(json.dumps(kept | {name: value}))
            with pytest.raises(UserError, match=r"bad\.json: not a whole soup_front file"):
                soup.SoupFront.read(tmp_path / "bad.json")
    with pytest.raises(UserError, match="must sum to 1"):
        soup.walk(models, [[0.5, 0.4, 0]], PROMPTS, ["length"], tmp_path / "out", **DRAW)
    with pytest.raises(UserError, match="must be different"):
        soup.walk(models, [[1, 0, 0]], PROMPTS, ["length", "length"], tmp_path / "out", **DRAW)
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_pareto_page(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    palette = {"kind": "palette", "values": ["length"], "palette": [2.0], "sense": [">="]}
    (tmp_path / "palette.json").write_text(json.dumps(palette))

    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    requested = [
        "soup-front",
        *models[:2],
        "--prompts",
        tmp_path / "prompts.txt",
        "--rewards",
        "length,vowels",
        "--grid",
        3,
    ]
    requested += ["-n", 2, "--max-new-tokens", 4, "--palette", tmp_path / "palette.json", "--out", tmp_path / "out"]
    code, stdout, err = run(*requested)
    assert code == 0 and "chosen: long" in stdout and "measured" in stdout, err
    code, alone, err = run(*requested[:-1], tmp_path / "alone", "--limit", 1)
    assert code == 0 and "nan" not in alone, err
    assert alone.count("± n/a (1 prompt)") == 8 and "use more prompts" in alone
    actual = json.loads((tmp_path / "out" / "soups.json").read_text())
    assert actual["chosen"]["palette"] == [2.0, None] and len(actual["levels"]) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000.parquet", "001.parquet", "002.parquet", "chosen", "soups.json", "soups.png", "soups.svg",
    ]  # fmt: skip
    at = requested.index("--palette")
    code, again, err = run(*requested[:at], *requested[at + 2 :])
    assert code == 0 and again == stdout, err  # the choice stays where no palette is given
    assert json.loads((tmp_path / "out" / "soups.json").read_text()) == actual
    (tmp_path / "other.json").write_text(json.dumps({**palette, "palette": [1.0]}))
    other = [*requested[:at], "--palette", tmp_path / "other.json", *requested[at + 2 :]]
    code, _, err = run(*other)
    assert code == 1 and "soups.json: exists, and is of other soups or settings" in err
    assert json.loads((tmp_path / "out" / "soups.json").read_text()) == actual
    code, _, err = run(*other, "--overwrite")
    assert code == 0 and json.loads((tmp_path / "out" / "soups.json").read_text())["chosen"]["palette"] == [1.0, None]
    scored = tmp_path / "out" / "000.parquet"
    code, _, err = run(
        "pareto", scored, "--soup", tmp_path / "out" / "soups.json", "--n-lambda", 20, "--out", tmp_path / "page"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "page" / "pareto.json").read_text())["soups"] == actual["levels"]
    assert (tmp_path / "page" / "pareto.html").is_file()
    requested[requested.index("length,vowels")] = "vowels"
    code, _, err = run(*requested)
    assert code == 1 and "has a target for length, but the rewards are vowels" in err and err.count("\n") == 1


def test_what_is_overwritten_stays_until_all_of_the_new_is_there(models, tmp_path, monkeypatch):
    def study(seed, grid, **more):
        rho = soup.simplex_grid(2, grid)
        return soup_front.study(models[:2], rho, PROMPTS, ["length", "vowels"], out, **{**DRAW, "seed": seed}, **more)

    def content(folder=None):
        return {path.name: path.read_bytes() for path in (folder or out).rglob("*") if path.is_file()}

    out = tmp_path / "out"
    study(1, 4, palette=np.array([1.0, -np.inf]))
    before, sample, calls = content(), Sampler.sample, []

    def stopped(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"^interrupted; finished soups are kept, and the same command"):
            study(0, 3, overwrite=True)
    assert content() == before
    with pytest.raises(
        UserError, match=r"out.parts: contains an interrupted run with other soups or settings; --overwrite"
    ):
        study(0, 2)
    with pytest.raises(UserError, match=r"002.parquet: exists, and is of other soups or settings; --overwrite"):
        study(0, 3)
    assert len(calls) == 3
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", lambda *a, **s: calls.append(1) or sample(*a, **s))
        result = study(0, 3, overwrite=True)
    assert len(calls) == 4  # the third soup alone
    assert sorted(content()) == [
        "000.parquet",
        "001.parquet",
        "002.parquet",
        "soups.json",
        "soups.png",
        "soups.svg",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    out = tmp_path / "alone"
    assert np.array_equal(study(0, 3).means, result.means)
    assert content()["soups.json"] == content(tmp_path / "out")["soups.json"]


def test_two_walks_into_one_folder_do_not_meet(models, tmp_path, monkeypatch):
    sample = Sampler.sample

    def meanwhile(*arguments, **settings):
        with pytest.raises(UserError, match=f"^{tmp_path / 'out'}: another run is writing it$"):
            soup.walk(models, [[0, 1, 0]], PROMPTS, ["length"], tmp_path / "out", overwrite=True, **DRAW)
        return sample(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", meanwhile)
        soup.walk(models, [[1, 0, 0]], PROMPTS, ["length"], tmp_path / "out", **DRAW)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["000.parquet", "out"]


def test_a_stranger_s_summary_is_not_replaced(models, tmp_path):
    (tmp_path / "soups.json").write_text("precious")
    with pytest.raises(UserError, match=r"soups.json: exists, and is of other soups or settings; --overwrite"):
        soup_front.study(models, [[1, 0, 0]], PROMPTS, ["length"], tmp_path, **DRAW)
    assert [path.name for path in tmp_path.iterdir()] == ["soups.json"]
