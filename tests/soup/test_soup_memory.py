"""`python bench/soup_memory.py`, at a size for tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "soup_memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_it_tells_anonymous_memory_from_the_page_cache(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--sizes",
        "0.02",
        "--cold",
        "0",
        "--folder",
        tmp_path,
        "--out",
        tmp_path / "m.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "m.json").read_text())["memory"]
    assert row["gb"] == 0.02 and row["seconds"] > 0 and 0 <= row["anonymous_mb"] < 20
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
