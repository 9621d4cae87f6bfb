"""The report: its numbers against plain loops, its verdicts, its page and figures."""

import io
import json
import re
import sys
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from rich.console import Console

from fastalign import palette as palettes
from fastalign import report
from fastalign._base.errors import UserError
from fastalign.report import figures as plots
from fastalign.report.tradeoff import Tradeoff

NAMES = ["positive", "harmless", "coherence", "brevity", "warmth", "wit"]


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def make(
    p=6, n=24, m=3, k=1, *, seed=0, quantile=0.65, levels=None, dual="per_prompt", method="resample", edit=None, **more
):
    """A report on generated rewards: solved by palette.solve, drawn by numpy; `edit(arguments)` before build."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(m, m)) * 0.3 + np.eye(m)
    rewards = (rng.normal(size=(p, n, m)) @ mix + rng.normal(size=(p, 1, m)) * 0.4).astype(np.float32)
    rewards[..., 0] = 1 / (1 + np.exp(-rewards[..., 0]))
    flat = rewards.reshape(-1, m)
    palette = palettes.quantile_palette(flat, quantile) if levels is None else np.array(levels, dtype=float)
    groups = np.repeat(np.arange(p), n) if dual == "per_prompt" else None
    solution = first = palettes.solve(flat, palette, groups=groups)
    if not first.feasible:
        before = flat.mean(axis=0)
        solution = palettes.solve(flat, before + 0.9 * (first.nearest - before), groups=groups)
    weights = softmax(rewards.astype(np.float64) @ solution.lam)
    if method == "best":
        selected = np.argsort(-weights, axis=1)[:, :k]
    else:
        selected = np.array([rng.choice(n, size=k, p=w) for w in weights])
    arguments = {
        "values": NAMES[:m],
        "rewards": rewards,
        "selected": selected,
        "palette": {
            "palette": palette.tolist(),
            "lambda": solution.lam.tolist(),
            "levels": solution.levels.tolist(),
            "kl": float(solution.kl),
            "ess": float(solution.ess),
            "feasible": bool(first.feasible),
            "nearest": None if first.feasible else first.nearest.tolist(),
            "dual": dual,
        },
        "prompts": [f"Prompt {i}" for i in range(p)],
        "texts": [[f"Text {j} of prompt {i}" for j in range(n)] for i in range(p)],
        "settings": {"model": "tiny", "method": method, "seed": seed, **more},
    }
    if edit is not None:
        edit(arguments)
    return report.build(**arguments), arguments


def page(found, tmp_path):
    found.to_html(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_numbers_are_those_of_plain_loops():
    result, a = make(p=5, n=20, m=3, k=4)
    rewards, lam = a["rewards"].astype(float), np.array(a["palette"]["lambda"])
    for j, value in enumerate(result.values):
        tilted, variance, chosen, ess = [], [], [], []
        for x in range(5):
            w = softmax(rewards[x] @ lam)
            tilted.append(sum(w[i] * rewards[x, i, j] for i in range(20)))
            variance.append(sum(w[i] * (rewards[x, i, j] - tilted[-1]) ** 2 for i in range(20)))
            chosen += [rewards[x, i, j] for i in a["selected"][x]]
            ess.append(1 / sum(w**2))
        assert value.before == pytest.approx(rewards[..., j].mean())
        assert value.std == pytest.approx(rewards[..., j].std())
        assert value.realised == pytest.approx(np.mean(chosen))
        assert value.rao_blackwell == pytest.approx(np.mean(tilted))
        assert value.rao_blackwell == pytest.approx(value.predicted, abs=1e-6)  # the per-prompt dual predicts just this
        assert value.se == pytest.approx(np.sqrt(sum(variance)) / 5 / np.sqrt(4))
        assert value.score == pytest.approx((value.realised - value.predicted) / value.se)
        assert (value.target, value.lam) == (a["palette"]["palette"][j], lam[j])
    assert result.ess_per_prompt == pytest.approx(ess)
    assert result.ess == pytest.approx(np.mean(ess))


def test_the_standard_error_is_the_spread_of_repeated_draws():
    result, a = make(p=4, n=16, m=2, k=3)
    rng = np.random.default_rng(1)
    weights = softmax(a["rewards"].astype(float) @ np.array(a["palette"]["lambda"]))
    repeats = 4000
    means = np.zeros((repeats, 2))
    for x, w in enumerate(weights):
        means += a["rewards"][x][rng.choice(16, size=(repeats, 3), p=w)].mean(axis=1) / 4
    # The relative error of a standard deviation from 4000 draws is about 1 %.
    assert [value.se for value in result.values] == pytest.approx(means.std(axis=0), rel=0.06)


@pytest.mark.parametrize(
    ("sense", "above", "verdict", "shown"),
    [
        (">=", 0.5, "short", "short by 0.50"),
        (">=", -0.5, "met", None),
        ("<=", 0.5, "met", None),
        ("<=", -0.5, "above", "above by 0.50"),
        ("==", 0.5, "short", "off by 0.50"),
        ("==", -0.5, "above", "off by 0.50"),
        ("==", 0.0, "met", None),
        ("free", 0.5, "met", None),
    ],
)
def test_a_verdict_goes_by_what_was_asked(tmp_path, sense, above, verdict, shown):
    def edit(arguments):  # λ = 0, one candidate for all: what is realised is predicted, and asked is `above` it
        arguments["rewards"] = np.random.default_rng(0).normal(size=(6, 1, 1)).astype(np.float32) * np.ones((6, 4, 1))
        arguments["selected"] = np.zeros((6, 1), dtype=int)
        arguments["texts"] = [["text"] * 4] * 6
        mean = float(arguments["rewards"].mean(dtype=np.float64))
        arguments["palette"] |= {
            "palette": [mean + above],
            "levels": [mean],
            "lambda": [0.0],
            "feasible": True,
            "nearest": None,
        }
        arguments["palette"] |= {"sense": [">=" if sense == "free" else sense], "free": [sense == "free"]}

    result, _ = make(m=1, n=4, edit=edit)
    value = result.values[0]
    assert value.verdict == verdict and value.sense == sense == result.to_json()["values"][0]["sense"]
    assert (value.short_by > 0) == (verdict in ("short", "above")) == bool(value.reason)
    console = Console(file=io.StringIO(), width=100)
    result.print(console)
    level = value.show(value.target)
    wish = {">=": f" {level} ", "free": " free "}.get(sense, f"{sense} {level}")
    assert wish in console.file.getvalue() and (shown is None or shown in console.file.getvalue())
    assert shown is None or shown in page(result, tmp_path)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("free", [[True, False, False], [False, True, True], [True] * 3, [True]])
def test_what_nothing_is_asked_of_has_no_line_at_its_level(tmp_path, free):
    result, _ = make(m=len(free), edit=lambda arguments: arguments["palette"].update(free=free))
    figures = result.figures()
    grid = result.rewards.reshape(-1, len(free))
    scores = result.weights.reshape(-1)
    requested = np.where(free, np.nan, [value.target for value in result.values])
    figures["of map"] = plots.histograms(grid, None, NAMES[: len(free)], weights=scores, palette=requested)
    for name in ("histograms", "of map"):
        axes = [one for one in figures[name].axes if one.get_visible()]
        drawn = [sum(line.get_color() == plots.TARGET for line in one.lines) for one in axes]
        assert drawn == [int(not one) for one in free], name
        assert ("target" in [text.get_text() for text in figures[name].legends[0].get_texts()]) == (not all(free))
    lines = figures["levels"].axes[0].collections
    rows = [len(one.get_segments()) for one in lines if np.allclose(one.get_colors()[0], to_rgba(plots.TARGET))]
    assert rows == [len(free) - sum(free)]
    for one, (i, j) in zip(figures["pareto"].axes, combinations(range(len(free)), 2), strict=False):
        assert (
            sum(line.get_color() == plots.TARGET and line.get_linestyle() == "--" for line in one.lines)
            == 2 - free[i] - free[j]
        )
    assert "free" in page(result, tmp_path)


def test_a_sense_that_is_none_is_reported():
    with pytest.raises(UserError, match="palette's 'sense' must have 3 of >=, <=, =="):
        make(edit=lambda arguments: arguments["palette"].update(sense=[">=", "<", ">="]))


def test_json_and_page_hold_the_same_numbers(tmp_path):
    result, _ = make(m=3, k=2)
    plain = result.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    text = page(result, tmp_path)
    inside = re.search(r"<script type='application/json' id='report'>(.*?)</script>", text, re.DOTALL).group(1)
    assert json.loads(inside) == plain
    for value, row in zip(result.values, plain["values"], strict=True):
        assert row["realised"] == value.realised and row["lambda"] == value.lam
        for level in (value.before, value.target, value.predicted, value.rao_blackwell):
            assert f"<td>{value.show(level)}</td>" in text
        assert f"{value.show(value.realised)} <span class='se'>± {value.show(value.se)}</span>" in text
    assert result.headline.replace("'", "&#x27;") in text
    assert f"{result.kl:.3f} nats" in text


def test_page_asks_for_nothing_and_holds_together(tmp_path):
    result, _ = make(m=3)
    text = page(result, tmp_path)
    parser = Links()
    parser.feed(text)
    assert parser.tags.count("svg") == 5 and "Do the values agree?" in text
    assert not set(parser.tags) & {"link", "iframe", "object", "embed"}
    assert all(link.startswith(("#", "data:")) for link in parser.links)
    assert "default-src 'none'" in text and "@import" not in text
    assert len(parser.ids) == len(set(parser.ids))
    used = {link[1:] for link in parser.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used and used <= set(parser.ids)
    # Nothing was drawn at NaN, and every colour of the figures turns with the page.
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000", "#ffffff"}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)


def test_texts_cannot_break_out(tmp_path):
    evil = "</script><script>alert('x')</script> & \x1b[31mred\x00 \ud800 $\\frac{x}"

    def edit(a):
        a["values"] = ["<i>$\\bad$ & {name}", *a["values"][1:]]
        a["prompts"] = [evil] * 6
        a["texts"] = [[evil] * 24] * 6
        a["settings"]["<u>" + evil] = {evil: [evil, float("nan")], "model": evil}

    result, _ = make(edit=edit, p=6)
    text = page(result, tmp_path)
    assert text.count("<script") == 1 and text.count("</script") == 1
    assert "&lt;/script&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; [31mred" in text
    assert "<i>$" not in text and "<u>" not in text
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f]", text)
    json.dumps(result.to_json(), allow_nan=False, ensure_ascii=False).encode()
    assert "\x1b" not in printed(result)


@pytest.mark.slow_matrix
@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "case", [dict(), dict(p=1, k=3), dict(levels=9.0, k=2), dict(n=1, levels=-9.0), dict(p=40, k=5)]
)
def test_every_figure_draws(m, case, tmp_path):
    case = dict(case)
    if "levels" in case:
        case["levels"] = [case["levels"]] * m
    result, _ = make(m=m, **case)
    figures = result.figures()
    assert set(figures) == {"levels", "histograms", "pareto"} | ({"radar"} if m > 2 else set())
    panels = {"levels": 1, "histograms": m, "radar": 1, "pareto": max(1, m * (m - 1) // 2)}
    for name, figure in figures.items():
        assert sum(axes.get_visible() for axes in figure.axes) == panels[name]
    text = page(result, tmp_path)
    assert text.count("<svg") == len(figures) + (m > 1) and not re.search(r"\bnan\b", text, re.IGNORECASE)


@pytest.mark.parametrize("m", [1, 2])
def test_radar_of_few_values_draws(m, tmp_path):
    figure = plots.radar(NAMES[:m], {"before": np.zeros(m), "mine": np.ones(m)}, before=np.zeros(m), std=np.ones(m))
    plots.save(figure, tmp_path / "radar.png")
    assert (tmp_path / "radar.png").stat().st_size > 1000


def test_many_values_keep_the_pairs_that_trade_off():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 8))
    points[:, 7] = -points[:, 0]
    chosen = plots.pairs(points)
    assert len(chosen) == plots.MAX_PAIRS and (0, 7) in chosen and chosen == sorted(chosen)


def test_constant_reward_is_met_and_draws(tmp_path):
    def edit(a):
        a["rewards"][..., 1] = 0.1
        a["palette"]["palette"][1] = a["palette"]["levels"][1] = float(np.float32(0.1))
        a["palette"]["lambda"][1] = 0.0

    result, _ = make(edit=edit)
    value = result.values[1]
    assert (value.std, value.verdict, value.agrees, value.score) == (0.0, "met", True, 0.0)
    assert "nan" not in page(result, tmp_path).lower()


def test_verdict_within_error_says_so():
    # The mean of many draws straddles the prediction: half the seeds fall short, all within 3 standard errors or near.
    verdicts = [value for seed in range(6) for value in make(seed=seed, k=8)[0].values]
    assert {value.verdict for value in verdicts} == {"met", "within error"}
    for value in verdicts:
        if value.verdict == "met":
            assert value.short_by == 0 and value.reason == "" and value.realised >= value.target - 1e-5
        else:
            assert value.short_by == pytest.approx(value.target - value.realised)
            assert value.short_by <= 3 * value.se + 1e-5 and "sampling error of 48 draws" in value.reason


def test_infeasible_palette_is_short_and_says_why():
    result, a = make(m=2, k=3, levels=[1.5, 0.0])
    value = result.values[0]
    assert not result.feasible and value.verdict == "short"
    assert value.short_by == pytest.approx(1.5 - value.realised)
    assert "infeasible" in value.reason and f"{a['palette']['nearest'][0]:.4g}" in value.reason
    assert any("infeasible" in note for note in result.notes)
    assert "short by" in printed(result)


def test_missing_the_prediction_is_the_headline():
    def edit(a):
        a["palette"]["levels"][0] = a["palette"]["palette"][0] = a["palette"]["levels"][0] + 3.0

    result, _ = make(edit=edit)
    assert not result.agrees and not result.values[0].agrees
    assert result.headline.startswith("Not within 3 standard errors") and "positive (off by -" in result.headline
    assert result.values[0].verdict == "short" and "other candidates" in result.values[0].reason


def test_agreement_is_the_headline():
    result, _ = make(p=12, seed=3)
    assert result.agrees and result.headline == "All values agree with the dual's prediction within 3 standard errors."
    alone, _ = make(p=12, m=1, seed=3)
    assert alone.headline == "positive agrees with the dual's prediction within 3 standard errors."


def test_bounded_lambda_is_named():
    def edit(a):
        a["palette"]["palette"][1] += 1.0

    result, _ = make(edit=edit)
    assert result.values[1].verdict == "short" and "λ reaches only" in result.values[1].reason


def test_joint_dual_and_best_are_named():
    joint, _ = make(dual="joint", p=8, k=4)
    assert any("joint dual" in note for note in joint.notes)
    best, _ = make(method="best")
    assert not best.is_draw and "'best'" in best.headline


def test_low_effective_sample_size_is_named():
    result, _ = make(m=2, k=2, levels=[1.5, 0.0])
    sharp, _ = make(m=2, k=2, levels=[1.5, 0.0], edit=lambda a: a["palette"].update({"lambda": [200.0, 50.0]}))
    assert np.median(sharp.ess_per_prompt) < report.LOW_ESS < np.median(make()[0].ess_per_prompt)
    assert any("effective sample size is low" in note for note in sharp.notes)
    assert "effective sample size" in sharp.values[0].reason
    assert result.prompts == sharp.prompts


def test_examples_rise_most_then_are_random():
    result, a = make(p=12, n=16)
    lam = np.array(a["palette"]["lambda"])
    gain = (a["rewards"][np.arange(12), a["selected"][:, 0]].astype(float) - a["rewards"][:, 0]) @ lam
    risen = [example for example in result.examples if example.why.startswith("largest")]
    assert [example.prompt for example in risen] == [f"Prompt {i}" for i in np.argsort(-gain)[:3]]
    assert len(result.examples) == 6 and len({example.prompt for example in result.examples}) == 6
    for example in result.examples:
        x = int(example.prompt.split()[1])
        assert example.before == f"Text 0 of prompt {x}"
        assert example.after == f"Text {a['selected'][x, 0]} of prompt {x}"
        assert example.rewards_after == pytest.approx(a["rewards"][x, a["selected"][x, 0]].tolist())


def printed(found, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    found.print(console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_print_fits(width):
    def edit(a):
        a["texts"] = [["[bold]word[/nope] " * 60] * 24] * 6
        a["values"] = ["a_very_long_reward_name_that_goes_on", *a["values"][1:]]

    result, _ = make(edit=edit)
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert "[bold]word[/nope]" in text  # shown, not taken for markup
    if width >= 100:
        assert result.headline in text
        for value in result.values:
            assert f"{value.show(value.realised)} ± {value.show(value.se)}" in text


def test_levels_show_a_hundredth_of_the_spread():
    value = make()[0].values[0]
    assert value.decimals == 3 and value.show(0.12345) == "0.123" and value.show(-0.0001) == "0.000"
    assert value.show(0.5, "+") == "+0.500"


def test_front_is_at_the_policys_kl_and_under_the_limit():
    result, a = make(p=8, n=32, m=2, k=1)
    tradeoff = Tradeoff(a["rewards"])
    front, limit = tradeoff.front(0, 1, result.kl, count=41), tradeoff.limit(0, 1)
    # With two values the policy is itself on the front: no point of the front is better in both, none far away.
    predicted = np.array(a["palette"]["levels"])
    assert not (front > predicted + 1e-6 * tradeoff.std).all(axis=1).any()
    assert (np.abs(front - predicted) / tradeoff.std).max(axis=1).min() < 0.1
    for direction in (np.array([1, 0]), np.array([1, 1]), np.array([0, 1])):
        scores = direction / tradeoff.std
        assert (limit @ scores).max() >= (front @ scores).max()
    lam = np.array(a["palette"]["lambda"])
    levels, kl = tradeoff.at((lam * tradeoff.std)[None])
    assert kl[0] == pytest.approx(result.kl, abs=1e-6) and levels[0] == pytest.approx(predicted, abs=1e-6)


def test_save_writes_the_same_file_each_time_or_none(tmp_path):
    result, _ = make()
    for name in ("a.svg", "b.svg", "a.png", "a.pdf"):
        plots.save(result.figures()["levels"], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"must end in .svg, .png or .pdf, got"):
        plots.save(result.figures()["levels"], tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg", "b.svg"]


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    result, _ = make()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"figures need matplotlib: pip install 'fastalign\[plots\]'"):
        result.to_html(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    assert result.headline in printed(result)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda a: a.update(rewards=a["rewards"][0]), "rewards must be (prompts, candidates, values)"),
        (
            lambda a: a["rewards"].__setitem__((1, 2, 0), np.nan),
            "rewards must be finite, got nan at prompt 1, candidate 2, value 0",
        ),
        (lambda a: a.update(values=["one"]), "values must name the 3 rewards, got 1"),
        (lambda a: a.update(prompts=["one"]), "prompts must be 6"),
        (lambda a: a["texts"][2].pop(), "texts must be 6 x 24"),
        (lambda a: a.update(selected=a["selected"] + 24), "selected must lie in 0..23"),
        (lambda a: a.update(selected=a["selected"] - 100), "selected must lie in 0..23"),
        (lambda a: a.update(selected=a["selected"][:, :0]), "selected must be integers (6, k)"),
        (lambda a: a.update(selected=a["selected"].astype(float)), "selected must be integers (6, k)"),
        (lambda a: a["palette"].update({"lambda": [np.nan] * 3}), "palette's 'lambda' must be finite"),
        (lambda a: a["palette"].update(levels=[1.0]), "palette's 'levels' must have 3 numbers"),
        (lambda a: a["palette"].update(kl=np.inf), "palette's 'kl' must be finite"),
        (lambda a: a["palette"].pop("levels"), "palette must have levels"),
    ],
)
def test_bad_input_is_one_clear_line(edit, says):
    with pytest.raises(UserError) as error:
        make(edit=edit)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
