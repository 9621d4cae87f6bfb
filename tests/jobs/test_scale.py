"""Sampling on Ray: the result of one process, whatever the workers and whichever of them dies."""

import os
import signal

import numpy as np
import pytest
from tiny import tiny_folder
from turns import on_its_day

from fastalign._base.errors import UserError
from fastalign.decode import Candidates, Sampler
from fastalign.jobs import align as pipeline
from fastalign.jobs import ray as scale
from fastalign.rewards import score

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fastalign[ray]'")

PROMPTS = [
    f"tell me a story of the {color} {animal}" for color in ("red", "blue", "big") for animal in ("cat", "dog", "fox")
]
SHORT = {"n": 6, "max_new_tokens": 5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def cluster():
    """A local Ray of two CPUs, which `scale` finds and leaves up."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_worker_niceness", "0")  # at its 15 the workers starve beside other tests
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def length(*, log, dies_on=None, always=False):
    """A reward that logs the prompts it is asked about, and kills its own process the first time (or whenever) it
    meets one."""

    class Length:  # in a function, so that the workers get its code and need not find this file
        name = "length"

        def __call__(self, prompts, responses):
            with open(log, "a") as file:
                file.writelines(f"{os.getpid()} {prompt}\n" for prompt in dict.fromkeys(prompts))
            if dies_on in prompts and (always or not os.path.exists(f"{log}.died")):
                open(f"{log}.died", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return np.array([len(text) for text in responses], dtype=np.float32)

    return Length()


def whole(paths):
    return Candidates.concat(Candidates.from_parquet(path) for path in paths)


def same(found, true):
    assert (found.prompts, found.texts, found.token_ids) == (true.prompts, true.texts, true.token_ids)
    assert found.prompt_ids.tolist() == true.prompt_ids.tolist() and list(found.rewards) == list(true.rewards)
    for name in true.rewards:
        np.testing.assert_array_equal(found.rewards[name], true.rewards[name])
    for came, wanted in zip(found.logprobs, true.logprobs, strict=True):
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(came, wanted, strict=True))


@on_its_day("ray")
def test_a_worker_killed_a_run_cut_off_and_one_process_give_the_same(cluster, folder, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    options = {**SHORT, "workers": 2, "temperature": 1.2}
    parts = scale.run(folder, PROMPTS, out, rewards=length(log=log, dies_on=PROMPTS[4]), **options)

    alone = Sampler.from_pretrained(folder).sample(PROMPTS, temperature=1.2, **SHORT)
    alone = alone.with_rewards(["length"], score([length(log=tmp_path / "own")], *alone.pairs()))
    same(whole(parts), alone)
    calls = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert os.path.exists(f"{log}.died") and len({pid for pid, _ in calls}) == 3  # two workers, and the one in place
    assert sorted(prompt for _, prompt in calls) == sorted([*PROMPTS, PROMPTS[4]])  # only the lost block was drawn anew

    lost = [parts[1], parts[5]]
    kept = {path: path.read_bytes() for path in parts if path not in lost}
    missing = {prompt for path in lost for prompt in Candidates.from_parquet(path).prompts}
    for path in lost:
        path.unlink()
    (out / ".part-00000001.parquet.99.partial").write_bytes(b"half a file")
    again = scale.run(folder, PROMPTS, out, rewards=length(log=tmp_path / "again"), **{**options, "workers": 1})
    assert again == parts and all(path.read_bytes() == content for path, content in kept.items())
    assert {line.split(" ", 1)[1] for line in (tmp_path / "again").read_text().splitlines()} == missing
    same(whole(again), alone)
    with pytest.raises(UserError, match="was made with seed=3, this run has 4: use the same settings"):
        scale.run(folder, PROMPTS, out, rewards=length(log=log), **{**options, "seed": 4})


@on_its_day("ray")
def test_a_block_that_kills_every_worker_is_named_and_all_others_are_kept(cluster, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "RETRIES", 1)
    out, log = tmp_path / "out", tmp_path / "log"
    job = {"rewards": length(log=log, dies_on=PROMPTS[1], always=True), "workers": 1, **SHORT}
    message = "^prompts 1 to 1: their worker died 2 times, .* resumes with the missing ones$"
    with pytest.raises(UserError, match=message):
        scale.run(folder, PROMPTS[:3], out, **job)
    met = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    assert met.count(PROMPTS[1]) == 2
    assert sorted(whole(out.glob("part-*.parquet")).prompts) == sorted([PROMPTS[0], PROMPTS[2]])


@on_its_day("ray")
def test_a_failing_reward_is_shown_where_it_failed(cluster, folder, tmp_path):
    class Broken:
        name = "broken"

        def __call__(self, prompts, responses):
            raise ZeroDivisionError("of mine")

    with pytest.raises(RuntimeError, match=r"(?s)in the block of prompts 0 to .*ZeroDivisionError: of mine"):
        scale.run(folder, PROMPTS[:2], tmp_path / "out", rewards=Broken(), workers=1, **SHORT)


@on_its_day("ray")
def test_selected_parts_and_the_pipeline_on_workers(cluster, folder, tmp_path):
    paths = scale.run(
        folder,
        PROMPTS[:3],
        tmp_path / "best",
        rewards=length(log=tmp_path / "log"),
        lam=[1.0],
        k=2,
        method="best",
        workers=1,
        **SHORT,
    )
    result = whole(paths)
    alone = Sampler.from_pretrained(folder).sample(PROMPTS[:3], **SHORT)
    assert result.texts == [sorted(row, key=len, reverse=True)[:2] for row in alone.texts]
    assert result.rewards["length"].tolist() == [[len(text) for text in row] for row in result.texts]

    one = pipeline.sample(folder, PROMPTS[:3], tmp_path / "one.parquet", **SHORT)
    two = pipeline.sample(folder, PROMPTS[:3], tmp_path / "two.parquet", ray="auto", workers=1, **SHORT)
    same(two, one)
    assert two.settings["sampling"] == one.settings["sampling"] and not (tmp_path / "two.parquet.parts").exists()


def test_mistakes_are_one_line(cluster, folder, tmp_path):
    for wrong, message in (
        ({"n": 0}, "n must be an integer, at least 1, got 0"),
        ({"prompts": []}, "prompts must be a list of at least one string"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": 3, "worker_cpus": 1}, "3 workers with 1 CPU each: the cluster has room for 2"),
        ({"worker_gpus": 1}, "1 workers with 1 GPU each: the cluster has room for 0"),
        ({"max_new_tokens": 300}, r"exceed the model's context of 256 \(in the block of prompts 0 to"),
        ({"lam": [1.0]}, "lam must have one weight per reward, 0, got 1"),
    ):
        options = {
            "model": folder,
            "prompts": PROMPTS[:2],
            "out": tmp_path / message[:9],
            "workers": 1,
            **SHORT,
            **wrong,
        }
        with pytest.raises(UserError, match=message) as caught:
            scale.run(**options)
        assert "\n" not in str(caught.value)


def test_ray_absent_is_reported(monkeypatch, folder, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'fastalign\[ray\]'"):
        scale.run(folder, PROMPTS, tmp_path / "out", **SHORT)
