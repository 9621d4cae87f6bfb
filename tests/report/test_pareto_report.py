"""`fastalign pareto` and `fastalign map --plot`: the points, the figures, the page, and one line for each mistake."""

import json
import re

import numpy as np
import pytest
from commands import fastalign, refused
from turns import by_the_day

from fastalign._base.errors import UserError
from fastalign.decode import Candidates, best_of_n_kl, estimate
from fastalign.palette import quantile_palette
from fastalign.report import figures as plots
from fastalign.report.pareto_html import page
from fastalign.report.study import study
from fastalign.soup.front import SoupFront

NAMES = ["kind", "$brief$ <b>", "funny", "plain", "calm"]


def rewards(prompts: int, n: int, m: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(prompts, n, m)) @ (np.eye(m) - 0.5 * np.eye(m, k=1)) + rng.normal(size=(prompts, 1, m))
    return x.astype(np.float32)


def write_scored(path, x: np.ndarray, names: list[str]):
    prompts, n, m = x.shape
    texts = [[f"text {i} {j}" for j in range(n)] for i in range(prompts)]
    empty = [[[] for _ in row] for row in texts]
    whole = Candidates([f"prompt {i}" for i in range(prompts)], texts, empty, empty)
    whole.with_rewards(names, x.reshape(-1, m)).to_parquet(path)
    return path


@pytest.fixture
def scored(tmp_path):
    return write_scored(tmp_path / "scored.parquet", rewards(10, 32, 3), ["kind", "brief", "funny"])


def test_the_pareto_command(scored, tmp_path):
    soup = write_scored(tmp_path / "soup.parquet", rewards(4, 2, 3, seed=1), ["kind", "brief", "funny"])
    code, stdout, _ = fastalign("map", scored, "--palette", "kind=9,rest=mean", "--out", tmp_path / "far.json")
    assert code == 3 and "infeasible" in stdout
    out = tmp_path / "fronts"
    command = [
        "pareto",
        scored,
        "--palette",
        tmp_path / "far.json",
        "--quantile",
        "0.55,0.6",
        "--soup",
        soup,
        "--n-lambda",
        80,
    ]
    code, stdout, _ = fastalign(*command, "--out", out)
    assert code == 0 and "far: out of reach" in stdout and "q55: in reach" in stdout
    figures = ["ess", "front", "front3d", "histograms", "path", "radar", "region"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{name}.{kind}" for name in figures for kind in ("png", "svg")] + ["pareto.html", "pareto.json"]
    )
    result = json.loads((out / "pareto.json").read_text())
    assert result["kind"] == "pareto" and result["values"] == ["kind", "brief", "funny"]
    assert result["soups"] == [pytest.approx(rewards(4, 2, 3, seed=1).mean(axis=(0, 1)).tolist(), rel=1e-5)]
    assert result["soup_names"] == ["soup"] and ">soup<" in (out / "front.svg").read_text()
    assert len(result["region"]["lambda"]) == len(result["region"]["desirable"]) == 80
    assert [p["name"] for p in result["palettes"]] == ["q55", "q60", "far"]
    # Every λ in the file realises what the file says, by another part of the program.
    grid = Candidates.from_parquet(scored).reward_array()
    assert study(result["values"], grid, n_lam=80).to_json()["region"] == result["region"]  # a seed reproduces
    for points in (*result["fronts"], result["scalarised"], result["region"], *result["palettes"]):
        estimated = estimate(grid, points["lambda"], warn=False)
        np.testing.assert_allclose(estimated.values, points["levels"], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(estimated.kl, points["kl"], atol=1e-8)
        np.testing.assert_allclose(estimated.ess, points["ess"], rtol=1e-6)


def test_what_lies_within_what():
    result = study(NAMES[:2], rewards(60, 64, 2))
    assert result.ks == [4, 16] and list(result.fronts) == [best_of_n_kl(4), best_of_n_kl(16)]
    volume = {name: v for name, _, v in result.hypervolumes()}
    front, further = volume["front at KL 0.64"], volume["front at KL 1.84"]
    assert volume["best of 4"] < front < further < volume["limit of these candidates"]
    assert volume["best of 4"] < volume["best of 16"] < further
    unit = result.directions / result.std
    for kl, n in zip(result.fronts, result.ks, strict=True):
        most = (unit * result.fronts[kl].levels).sum(axis=1)
        assert ((unit * result.best_of[n]).sum(axis=1) < most + 0.02).all()
        # and no random λ of no more KL goes beyond, either
        within = result.region.policies.kl <= kl
        assert within.any() and (unit @ result.region.policies.levels[within].T <= most[:, None] + 1e-9).all()


@pytest.mark.slow_matrix
@pytest.mark.parametrize(
    ("shape", "joint"),
    [
        ((6, 16, 1), False),
        ((6, 16, 2), True),
        ((5, 8, 4), False),
        ((4, 1, 2), False),
        ((4, 1, 3), True),
        ((1, 2, 1), True),
        ((3, 16, 3), False),
    ],
)
def test_studies_of_every_size_draw(shape, joint):
    x = rewards(*shape)
    if shape == (3, 16, 3):
        x[..., 1] = 0.25  # a constant value
    palettes = {"a $": quantile_palette(x.reshape(-1, shape[2]), 0.6), "b": x.max(axis=(0, 1)) + 1}
    result = study(NAMES[: shape[2]], x, joint=joint, palettes=palettes, n_lam=30, soups=x[0, :1])
    figures = result.figures()
    expected = {"ess", "path", "histograms"} | ({"front", "region"} if shape[2] > 1 else set())
    expected |= {"front3d", "radar"} if shape[2] > 2 else set()
    assert set(figures) == expected
    text = page(result, figures)
    assert text.count("<svg") == len(expected) + (shape[2] > 1) and not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert f"{NAMES[1]}" not in text.split("<script")[0]  # names are escaped
    data = re.search(r"<script type='application/json' id='report'>(.*)</script>", text)[1]
    assert json.loads(data) == result.to_json()


def test_merged_models_have_their_names(tmp_path):
    names, x = ["kind", "brief"], rewards(6, 8, 2)
    scored = write_scored(tmp_path / "scored.parquet", x, names)
    (tmp_path / "a").mkdir()
    again = write_scored(tmp_path / "a" / "scored.parquet", x + 0.1, names)
    rho = np.linspace(0, 1, 3)[:, None] * [1, -1] + [0, 1]
    front = SoupFront(names, ["runs/mild", "runs/bold"], rho, rewards(3, 4, 2, seed=2), np.ones(2), 4)
    front.write(tmp_path / "soups.json")
    out = tmp_path / "out"
    soups = [part for path in (scored, again, tmp_path / "soups.json") for part in ("--soup", path)]
    assert fastalign("pareto", scored, *soups, "--n-lambda", 20, "--out", out)[0] == 0
    content = json.loads((out / "pareto.json").read_text())["soup_names"]
    assert content == ["scored", str(again), "bold", "0.5 mild + 0.5 bold", "mild"]
    for figure in ((out / "front.svg").read_text(), (out / "pareto.html").read_text()):
        assert ">0.5 mild + 0.5 bold<" in figure and ">bold<" in figure


def test_of_many_merged_models_those_furthest_out_are_named():
    levels = np.random.default_rng(0).normal(size=(66, 2))
    result = study(["a", "b"], rewards(5, 8, 2), soups=levels, soup_names=[f"s{k}" for k in range(66)], n_lam=20)
    lines = [text.get_text() for text in result.figures()["front"].axes[0].texts]
    assert sorted(lines) == sorted({f"s{k}" for k in (*levels.argmin(axis=0), *levels.argmax(axis=0))})


@pytest.mark.parametrize("values", by_the_day(["brief,kind", "kind", "funny,kind,brief"], 3))
def test_a_palette_of_more_values_is_marked_by_those_named(scored, tmp_path, values):
    mark = tmp_path / "three.json"
    assert fastalign("map", scored, "--palette", "kind=0.1,brief=0.2,funny=0", "--out", mark)[0] == 0
    out = tmp_path / "fronts"
    code, _, err = fastalign("pareto", scored, "--values", values, "--palette", mark, "--n-lambda", 10, "--out", out)
    assert code == 0, err
    level = {"kind": 0.1, "brief": 0.2, "funny": 0.0}
    assert json.loads((out / "pareto.json").read_text())["palettes"][0]["palette"] == [
        level[name] for name in values.split(",")
    ]


def test_two_palettes_of_one_name_are_both_marked(scored, tmp_path):
    for folder, quantile in (("a", 0.55), ("b", 0.6)):
        assert fastalign("map", scored, "--quantile", quantile, "--out", tmp_path / folder / "q60.json")[0] == 0
    marks = [part for folder in "ab" for part in ("--palette", tmp_path / folder / "q60.json")]
    assert fastalign("pareto", scored, *marks, "--quantile", "0.6", "--n-lambda", 10, "--out", tmp_path / "f")[0] == 0
    lines = [mark["name"] for mark in json.loads((tmp_path / "f" / "pareto.json").read_text())["palettes"]]
    assert lines == ["q60", str(marks[1]), str(marks[3])]


def test_no_palettes_and_no_soups_is_fine():
    result = study(NAMES[:2], rewards(5, 16, 2), n_lam=20)
    assert set(result.figures()) == {"front", "region", "ess"} and result.to_json()["palettes"] == []


def test_map_draws_the_way_to_its_palette(scored, tmp_path):
    palette, folder = "kind=mean+0.5sd,brief<=mean,rest=free", tmp_path / "figures"
    code, stdout, _ = fastalign(
        "map", scored, "--palette", palette, "--out", tmp_path / "palette.json", "--plot", folder
    )
    assert code == 0 and str(folder) in stdout.replace("\n", "")
    assert {p.name for p in folder.iterdir()} == {"path.svg", "path.png", "histograms.svg", "histograms.png"}


def test_the_path_shows_all_of_lambda_below_0_too():
    t, kl, ess = np.linspace(0, 1, 5), np.linspace(0, 0.1, 5), np.linspace(8, 7, 5)
    for lam in (np.outer(t, [1.0, -2.0]), np.outer(t, [1.0, 2.0])):  # a value with at most a level has λ <= 0
        figure = plots.path(["a", "b"], t, lam, kl, ess, limit=1.0, samples=8)
        left = figure.axes[0]
        low, high = left.get_ylim()
        assert low <= lam.min() and lam.max() <= high and (low == 0 or lam.min() < 0)
        assert [axes.get_ylabel() for axes in figure.axes] == [
            "λ·σ of each value",
            "KL to the model, nats",
            "effective sample size, of 8",
        ]
        assert "share of the way" in figure.get_supxlabel()


def test_histograms_without_draws_show_the_policys_mean():
    x = rewards(5, 16, 2).reshape(-1, 2)
    figure = plots.histograms(x, None, NAMES[:2], weights=np.exp(x[:, 0].astype(float)))
    tilted = np.average(x[:, 0], weights=np.exp(x[:, 0].astype(float)))
    assert any(np.allclose(line.get_xdata(), tilted) for line in figure.axes[0].lines)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--quantile", "0.5,x"], "quantile must be numbers, comma-separated, got '0.5,x'"),
        (["--quantile", "1.5"], "--quantile must lie between 0 and 1, got 1.5"),
        (["--values", "kind,odd"], "one at least, got odd"),
        (["--n-lambda", "0"], "--n-lam must be at least 1, got 0"),
        (["--palette", "nowhere.json"], "nowhere.json: no such file"),
        (["--soup", "nowhere.parquet"], "nowhere.parquet"),
    ],
)
def test_the_commands_mistakes_are_one_line(scored, tmp_path, extra, says):
    assert says in refused("pareto", scored, "--out", tmp_path / "fronts", *extra)
    assert not (tmp_path / "fronts").exists()


def test_palettes_that_do_not_fit_are_reported(scored, tmp_path):
    code, _, _ = fastalign("map", scored, "--palette", "kind<=mean,rest=mean", "--out", tmp_path / "most.json")
    assert code == 0
    message = refused("pareto", scored, "--palette", tmp_path / "most.json", "--out", tmp_path / "fronts")
    assert "must ask for at least its levels in every value, got <=, >=, >=" in message
    for values, says in (
        ("kind,brief", "must ask for at least its levels in every value, got <=, >="),
        ("brief", None),  # of which it asks for at least
    ):
        command = ("pareto", scored, "--values", values, "--palette", tmp_path / "most.json", "--n-lambda", 5)
        if says:
            assert says in refused(*command, "--out", tmp_path / "fronts")
        else:
            assert fastalign(*command, "--out", tmp_path / "fronts")[0] == 0
    assert fastalign("map", scored, "--values", "kind", "--quantile", 0.6, "--out", tmp_path / "one.json")[0] == 0
    message = refused("pareto", scored, "--palette", tmp_path / "one.json", "--out", tmp_path / "f")
    assert "its values are kind, it has no brief" in message


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: study(NAMES[:2], x[0]), "rewards must be (prompts, candidates, values), got shape (8, 2)"),
        (lambda x: study(NAMES[:3], x), "values must name the 2 rewards, got 3"),
        (lambda x: study(NAMES[:2], np.where(x > 1, np.nan, x)), "rewards must be finite, got nan"),
        (
            lambda x: study(NAMES[:2], x, soups=np.ones((2, 2)), soup_names=["a"]),
            "soup_names must be 2, one for each of soups, got 1",
        ),
        (
            lambda x: study(NAMES[:2], x, soups=np.ones((2, 3))),
            "soups must have one level for each of the 2 values, got 3",
        ),
        (lambda x: study(NAMES[:2], x, palettes={"a": np.ones(3)}), "palette must have one level"),
    ],
)
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(UserError) as error:
        call(rewards(4, 8, 2))
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
