"""`fastalign sample --method`: what each method's function gives, part by part, resumed to the same file."""

import json

import numpy as np
import pytest
from commands import fastalign, refused
from tiny import tiny_folder

from fastalign import UserError, rewards
from fastalign.decode import Candidates, Sampler, adaptive, particles, speculative_rejection, tilted
from fastalign.rewards import registry

VALUES, LAM = ["vowels", "length"], [1.0, 0.2]
TEXTS = ["the cat", "tell me a story of the big red dog", "why", "hello world"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Two rewards by name, as the commands know them, for these tests alone."""
    for table in ("_entries", "_instances"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    counts = {"vowels": lambda text: sum(map(text.count, "aeiou")), "length": len}
    for name, count in counts.items():
        found = rewards.from_function(lambda prompts, responses, count=count: [count(t) for t in responses], name)
        rewards.register(name, lambda found=found: found, description=name)


@pytest.fixture
def job(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    palette = {"kind": "palette", "values": VALUES, "lambda": LAM, "kl": 0.5}
    (tmp_path / "palette.json").write_text(json.dumps(palette))
    settings = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--palette", tmp_path / "palette.json"]
    return ["sample", *settings, "-n", 16, "--max-new-tokens", 12, "--seed", 4, "--batch-size", 16]


SAME = {"lam": LAM, "max_new_tokens": 12, "seed": 4}


def test_rejection_writes_the_texts_it_picks(job, model, tmp_path):
    out = tmp_path / "picked.parquet"
    code, stdout, _ = fastalign(*job, "--method", "rejection", "--out", out)
    true = speculative_rejection(Sampler.from_pretrained(model), TEXTS, VALUES, n=16, batch_size=16, **SAME)
    result = Candidates.from_parquet(out, kind="selected")
    assert [row[0] for row in result.texts] == true.texts and result.picked[:, 0].tolist() == true.indices.tolist()
    np.testing.assert_array_equal(result.reward_array(VALUES)[:, 0], true.rewards)
    assert result.settings["spent"] == {"tokens": true.tokens, "candidates": 64}
    assert code == 0 and f"4 prompts × 1 picked of 16 candidates each, {true.tokens:,} tokens" in " ".join(
        stdout.split()
    )


def test_adaptive_writes_the_texts_it_picks(job, model, tmp_path):
    out = tmp_path / "picked.parquet"
    wanted = [*job, "--method", "adaptive", "-n", 64]
    code, stdout, _ = fastalign(*wanted, "--ess", 4, "--out", out)
    true = adaptive(Sampler.from_pretrained(model), TEXTS, VALUES, max_n=64, ess=4, **SAME)
    result = Candidates.from_parquet(out, kind="selected")
    assert [row[0] for row in result.texts] == true.texts and result.picked[:, 0].tolist() == true.indices.tolist()
    spent = result.settings["spent"]
    assert spent["candidates"] == true.counts.sum() < 4 * 64 and spent["short"] == (~true.enough).sum()
    assert (
        len(set(true.counts)) > 1
        and f"{true.counts.mean():.4g} candidates each" in " ".join(stdout.split())
        and code == 0
    )
    assert "was made with ess=4.0, this run has None" in refused(*wanted, "--out", out, "--resume")


def test_particles_keep_their_weights_and_select_draws_by_them(job, model, tmp_path):
    out = tmp_path / "particles.parquet"
    assert fastalign(*job, "--method", "particles", "--out", out)[0] == 0
    true = particles(Sampler.from_pretrained(model), TEXTS, VALUES, n=16, checkpoints=[1, 3, 6], batch_size=16, **SAME)
    result = Candidates.from_parquet(out, kind="weighted")
    assert result.texts == true.candidates.texts
    np.testing.assert_array_equal(result.log_weights, true.log_weights)
    assert true.resampled.any()
    _, message, _ = fastalign(
        "select", out, "--palette", tmp_path / "palette.json", "--k", 2000, "--out", tmp_path / "s.parquet"
    )
    picked = Candidates.from_parquet(tmp_path / "s.parquet", kind="selected").picked
    for p in range(4):
        weights = np.exp(true.log_weights[p] - true.log_weights[p].max())
        share = np.bincount(picked[p], minlength=16) / 2000
        np.testing.assert_allclose(share, weights / weights.sum(), atol=0.05)
    for value, mean in zip(VALUES, true.values, strict=True):
        assert f"{value} {mean:.4f} ±" in message
    assert (
        f"effective sample size {true.effective_sample_size.mean():.1f} of 16" in " ".join(message.split())
        and "KL" not in message
    )
    # Another λ would need other weights, and nothing else may take these for plain draws.
    (tmp_path / "other.json").write_text(json.dumps({"kind": "palette", "values": VALUES, "lambda": [1, 0], "kl": 1}))
    message = refused("select", out, "--palette", tmp_path / "other.json", "--out", tmp_path / "t.parquet")
    assert "its particles were drawn by another palette's λ, [1.0, 0.2]" in message
    message = refused("map", out, "--quantile", 0.6, "--out", tmp_path / "p.json")
    assert "must be a fastalign scored file, got kind 'weighted'" in message


@pytest.mark.parametrize("method", tilted.KINDS)
def test_an_interrupted_run_goes_on_to_the_same_file(job, tmp_path, monkeypatch, method):
    assert fastalign(*job, "--method", method, "--out", tmp_path / "whole.parquet")[0] == 0
    out, draw, drawn = tmp_path / "cut.parquet", tilted._DRAW[method], []

    def interrupted(prompts, places, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(places)
        return draw(prompts, places, *rest)

    monkeypatch.setitem(tilted._DRAW, method, interrupted)
    code, _, err = fastalign(*job, "--method", method, "--out", out)
    assert code == 130 and "resumes from them" in err and len(list(tmp_path.glob("cut.parquet.parts/part-*"))) == 2
    monkeypatch.setitem(tilted._DRAW, method, draw)
    assert "was made with method=" in refused(*job, "--out", out)
    assert fastalign(*job, "--method", method, "--out", out)[0] == 0
    result, true = (Candidates.from_parquet(path) for path in (out, tmp_path / "whole.parquet"))
    assert (result.texts, result.kind, result.settings) == (true.texts, true.kind, true.settings)
    assert result.prompts == TEXTS and not (tmp_path / "cut.parquet.parts").exists()
    if result.picked is not None:
        np.testing.assert_array_equal(result.picked, true.picked)


def test_the_pilot_and_the_run_load_the_model_once(job, tmp_path, monkeypatch):
    loaded, load = [], Sampler.from_pretrained
    monkeypatch.setattr(
        Sampler, "from_pretrained", lambda *args, **options: loaded.append(args) or load(*args, **options)
    )
    code, stdout, _ = fastalign(*job, "--pilot", "--out", tmp_path / "candidates.parquet")
    stdout = " ".join(stdout.split())
    assert (
        code == 0
        and "pilot: 16 candidates a prompt are worth" in stdout
        and "4 prompts × 32" in stdout
        and len(loaded) == 1
    )
    assert fastalign(*job, "--resume", "--out", tmp_path / "candidates.parquet")[0] == 0
    assert len(loaded) == 1  # what is there needs no model


def test_mistakes_are_one_line(job, model, tmp_path):
    out = ["--out", tmp_path / "out.parquet"]
    bare = [x for x in job if x != "--palette" and x != tmp_path / "palette.json"]
    for arguments, message in (
        ([*bare, "--method", "rejection"], "give --palette with --method rejection"),
        ([*job, "--method", "rejection", "--ess", 5], "ess applies only to --method adaptive"),
        ([*job, "--ess", 5], "ess applies only to --method adaptive"),
        ([*job, "--method", "adaptive", "-n", 20], "must be a multiple of 16 for --method adaptive"),
        ([*job, "--method", "adaptive", "--ess", 50], "ess must be at most max_n, 16, got 50"),
        ([*job, "--method", "particles", "--memory-limit", "1GB"], "--memory-limit does not apply to particles"),
        ([*job, "--method", "particles", "--ray", "auto"], "leave out --ray or --method particles"),
    ):
        assert message in refused(*arguments, *out)
        assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(UserError, match="prompt_ids must be rising"):
        particles(Sampler.from_pretrained(model), TEXTS[:2], VALUES, n=2, checkpoints=[], prompt_ids=[3, 1], **SAME)
