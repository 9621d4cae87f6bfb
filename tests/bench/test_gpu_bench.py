"""bench/gpu.py where there is no GPU: it says so; its table says what it would have measured on."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastalign.bench import gpu_jobs
from turns import by_the_day

GPU = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", GPU)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_succeeds(tmp_path):
    done = subprocess.run([sys.executable, GPU, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "no GPU here" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_cases_in_order(gpu, capsys):
    assert gpu.main(["gae", "linear_token_logprobs", "--dry-run"]) == 0
    peers, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "torch" in peers and "not installed" in peers
    assert first.startswith("linear_token_logprobs: forward and backward 8,192") and "multiplies 40.79 TFLOP" in first
    assert second == "gae: 512 × 128 float32; moves 1.1 MB"


def test_the_table_names_device_driver_and_versions_and_shows_what_failed(gpu):
    times = {"fastalign": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "peer": {"p20": 4.0, "p50": 5.0, "p80": 6.0}}
    good = {"op": "gae", "name": "a", "published": "7 ms", "error": "", "ms": times, "bandwidth": 0.5, "flop_rate": 0.0}
    good |= {"peak_mb": {"fastalign": 1.0, "peer": 2.0}, "peers_failed": {"other": "ImportError: x"}}
    good["graph_ms"] = {"fastalign": {"p50": 1.0}, "peer": {"p50": 4.0}}
    bad = {"op": "gae", "name": "b", "published": "", "error": "AssertionError: off by 1", "ms": {}, "peak_mb": {}}
    where = {"device": "D1", "driver": "9.9", "cuda": "13", "fastalign": "0", "versions": {"torch": "2"}, "date": "d"}
    text = gpu.table({"machine": where, "ceilings": {"bytes_per_s": 3e12, "flops_per_s": 8e14}, "results": [good, bad]})
    assert "**2.50 ×**, as graphs 4.00 ×" in text and "2 → 1 MB" in text and "7 ms" in text
    assert "as a graph 1.000 ms" in text and "1.000 ms as a graph" in gpu.line(good)
    assert "failed: ImportError: x" in text and "WRONG: AssertionError: off by 1" in text
    assert all(word in text for word in ("D1", "driver 9.9", "torch 2", "3.00 TB/s", "800 TFLOP/s"))
    assert "WRONG" in gpu.line(bad) and "2.50 × peer" in gpu.line(good)


def test_the_most_important_cases_come_first_and_a_run_on_the_same_goes_on(gpu, tmp_path):
    order = [op for op, _ in gpu.in_order(list(gpu.every()))]
    ops = list(dict.fromkeys(order))
    assert order[0] == "linear_token_logprobs" and order[: len(ops)] == ops
    assert sorted(order) == sorted(op for op, _ in gpu.every())
    where = {"device": "D1", "driver": "9.9", "versions": {"torch": "2"}, "date": "d"}
    path = tmp_path / "gpu.json"
    assert gpu.earlier(path, where) is None
    results = [{"op": "gae", "name": "a", "error": ""}, {"op": "gae", "name": "b", "error": "off"}]
    path.write_text(json.dumps({"machine": where, "ceilings": {}, "results": results}))
    assert gpu.earlier(path, where | {"date": "e"})["results"] == results[:1]
    assert gpu.earlier(path, where | {"driver": "10"}) is None


@pytest.mark.parametrize("case", by_the_day(gpu_jobs.cases(), 4), ids=lambda case: f"{case[0]} {case[1].name}")
def test_the_jobs_run_and_are_right(case):
    work = case[1].build("cpu", True)
    work.check()
    work.run()
