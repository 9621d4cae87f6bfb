"""The command line where its standard streams are closed, full or read no further; interrupted before it has begun."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from turns import by_the_day

import fastalign.__main__ as entry

INFO = [sys.executable, "-m", "fastalign", "info", "--json"]


@pytest.mark.parametrize("closed", by_the_day([">&-", "2>&-", "<&- >&- 2>&-"], 3))
def test_streams_that_are_closed(closed, tmp_path):
    result = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *INFO], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert ">&-" in closed.split() or json.loads(result.stdout)["fastalign"]


@pytest.mark.parametrize("more", by_the_day([[], ["--json"]], 2))
def test_who_reads_stdout_may_stop(more):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        result = subprocess.run([*INFO[:4], *more], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == ""


def test_a_full_device_is_one_line():
    with open("/dev/full", "w") as stdout:
        result = subprocess.run(INFO, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == "fastalign: No space left on device\n"


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fastalign.cli.main", SimpleNamespace(main=interrupted))
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "fastalign: interrupted\n"


@pytest.mark.parametrize(
    ("variable", "rule"),
    by_the_day(
        [
            ("FASTALIGN_BACKEND", "must be one of auto, cpu, triton, reference"),
            ("FASTALIGN_PRODUCTS", "must be auto, torch or onednn"),
            ("FASTALIGN_ISA", "must be"),
        ],
        3,
    ),
)
def test_a_variable_that_means_nothing_is_one_line(variable, rule):
    result = subprocess.run(INFO, capture_output=True, text=True, env=os.environ | {variable: "nonsense"})
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"fastalign: {variable} {rule}") and "nonsense" in result.stderr
