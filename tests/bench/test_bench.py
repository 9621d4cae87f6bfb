"""The benchmarks under pytest-benchmark: what `compare` tells, what stays of it, and that every op has one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from turns import on_its_day

from fastalign import ops

pytest.importorskip("pytest_benchmark")
from fastalign.bench import commits, tables

PYTEST = [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "--benchmark-only"]
BENCH = Path(__file__).parents[2] / "bench"
TINY = """
import time
import pytest

def test_sum(compare):
    compare(
        lambda: time.sleep(0.001),
        {"slower": lambda: time.sleep(0.05)},
        floor=lambda: None, bars={"slower": 2.0}, check=lambda: "the same", rounds=3,
    )

def test_floor_that_is_beaten(compare):
    compare(lambda: None, {}, floor=lambda: time.sleep(0.001), rounds=2)

def test_wrong(compare):
    def check():
        assert 1 + 1 == 3
    compare(lambda: None, {"other": lambda: None}, check=check)
"""


def test_what_a_benchmark_tells(tmp_path):
    (tmp_path / "bench_tiny.py").write_text(TINY)
    done = subprocess.run(
        [*PYTEST, "-p", "fastalign.bench.conftest", "bench_tiny.py", "--benchmark-json=out.json"],
        cwd=tmp_path,
        env=commits.alone() | {"FASTALIGN_ISA": "baseline"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "assert (1 + 1) == 3" in done.stdout, done.stdout
    sums, floor = json.loads((tmp_path / "out.json").read_text())["benchmarks"]  # and not the one whose check fails
    result = sums["extra_info"]
    ratio = result["ratio"]["slower"]
    assert sums["group"] == "tiny" and result["check"] == "the same" and result["bars"] == {"slower": 2.0}
    assert (
        1 < ratio["p50"]
        and ratio["p20"] <= ratio["p50"] <= ratio["p80"]
        and result["rounds"] == len(sums["stats"]["data"]) == 3
    )
    assert result["peers"]["slower"]["p20"] >= 0.05
    assert result["floor"] < sums["stats"]["median"] and "floor" not in floor["extra_info"]
    assert set(result["peak_mb"]) == {"fastalign", "slower"} and result["threads"] >= 1 and result["processor"]
    assert result["isa"] in ("baseline", "none") and {"torch", "numpy", "fastalign"} <= set(result["versions"])
    assert f"tiny: sum: {1e3 * sums['stats']['median']:.3g} ms" in done.stdout


SLOWER = """
def gae(*arguments, quick=gae):
    __import__("time").sleep(0.01)
    return quick(*arguments)
"""


@on_its_day("bench")
def test_another_build_is_a_peer_in_a_process_of_its_own(tmp_path):
    build = tmp_path / "abc123"
    shutil.copytree(BENCH.parent / "fastalign", build / "fastalign")
    with open(build / "fastalign" / "ops" / "gae.py", "a") as file:
        file.write(SLOWER)
    options = [f"--benchmark-json={tmp_path}/out.json", "--against", build]
    done = subprocess.run(
        [*PYTEST, BENCH / "bench_gae.py", "-k", "64", *options],
        cwd=BENCH.parent,
        env=commits.alone(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (result,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert list(result["extra_info"]["ratio"]) == ["abc123"] and result["extra_info"]["ratio"]["abc123"]["p50"] > 5


def test_every_op_has_its_benchmark():
    own = {getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__} - {"vocab_parallel"}
    assert len(own) >= 9
    assert [op for op in sorted(own | {"policy"}) if not (BENCH / f"bench_{op}.py").is_file()] == []


def row(name, ratio, date="2026-01-01", bar=2.0, processor="P"):
    stats = {"median": 1e-3, "data": [1e-3]}
    result = {
        "processor": processor,
        "threads": 2,
        "isa": "avx2",
        "versions": {"torch": "2"},
        "date": date,
        "rounds": 3,
    }
    result |= {"peak_mb": {}, "ratio": {"peer": dict.fromkeys(("p20", "p50", "p80"), ratio)}, "bars": {"peer": bar}}
    return {"group": "x", "name": f"test_x[{name}]", "fullname": name, "extra_info": result, "stats": stats}


def test_a_run_replaces_its_own_rows_and_what_is_gone_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "benchmarks.json")
    before = [row("a", 3.0), row("b", 3.0), row("b", 2.5, processor="Q"), row("gone", 3.0)]
    tables.RESULTS.write_text(json.dumps({"benchmarks": before}))
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": [row("b", 1.5, "2026-02-02") | {"params": {}}]}))
    tables.keep(tmp_path / "run.json", ["a", "b", "never run"])
    kept = json.loads(tables.RESULTS.read_text())["benchmarks"]
    rows = [(one["fullname"], one["extra_info"]["processor"], one["extra_info"]["date"]) for one in kept]
    assert rows == [("a", "P", "2026-01-01"), ("b", "P", "2026-02-02"), ("b", "Q", "2026-01-01")]
    assert "data" not in kept[1]["stats"] and "params" not in kept[1]
    every, shown = ("\n".join(tables.table(kept, headline=headline)) for headline in (False, True))
    assert "| a | peer | **3 ×** (3–3) | 2 | 1 ms |" in every and "**1.5 ×** (1.5–1.5) | 2, missed" in every
    assert "**3 ×**" in shown and "1.5" not in shown and "1. P, 2 threads, avx2, torch 2" in shown


def test_the_committed_tables_are_made_from_the_committed_numbers():
    benchmarks = json.loads(tables.RESULTS.read_text())["benchmarks"]
    shown = tables.README.read_text(encoding="utf-8").partition(tables.BEGIN)[2].partition(tables.END)[0]
    assert shown.strip().splitlines() == tables.table(benchmarks, headline=True)
    assert "missed" not in shown
    every = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    assert every.endswith("\n".join([*tables.table(benchmarks), ""]))
    for one in benchmarks:
        assert one["extra_info"].get("floor", 0) <= one["stats"]["median"]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "usage: python -m bench.commits REF"), (["--help"], "usage: "),
    (["no-such-commit"], "no-such-commit is not a commit"),
])  # fmt: skip
def test_a_comparison_with_nothing(arguments, message):
    done = subprocess.run([sys.executable, commits.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_engines_that_have_been_made_are_peers(tmp_path, monkeypatch):
    from fastalign.bench import engines

    monkeypatch.setattr(engines, "FOLDER", tmp_path)
    asked = [[5, 6]], 4, 8, 2
    assert engines.workers(*asked) == {}
    (tmp_path / "openvino" / "model").mkdir(parents=True)
    assert list(engines.workers(*asked)) == ["OpenVINO GenAI"]
    engines.make("openvino")  # what is finished stays
    assert [path.name for path in (tmp_path / "openvino").iterdir()] == ["model"]
