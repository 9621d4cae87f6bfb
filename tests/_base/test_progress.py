"""What long work says of itself: a line now and again off a terminal, a bar on one, nothing where it is quick."""

import io
import re
import sys
import time

import pytest

from fastalign._base import progress

USUAL = progress.FIRST, progress.NEWS, progress.EVERY + progress.TICK  # other than in tests


@pytest.fixture
def hasty(monkeypatch):
    for name, seconds in (("FIRST", 0.1), ("EVERY", 0.3), ("NEWS", 0.15), ("TICK", 0.01)):
        monkeypatch.setattr(progress, name, seconds)


def test_it_never_waits_longer_than_a_minute():
    assert max(USUAL) < 60


def test_quick_work_says_nothing(capsys):
    with progress.at_work("score"), progress.bar("scoring", total=3, unit="texts") as advance:
        advance(3)
    assert capsys.readouterr().err == "" and not progress._open


def test_long_work_tells_count_rate_and_time_left(hasty, capsys):
    with progress.bar("scoring", total=4000, unit="texts") as advance:
        advance(1000)
        time.sleep(0.2)
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"scoring: 1,000/4,000 texts  [\d,]+ texts/s  0:0\d left", line)
        advance(3000)
        time.sleep(0.35)
        assert re.fullmatch(r"scoring: 4,000/4,000 texts  [\d,]+ texts/s\n", capsys.readouterr().err)


def test_a_step_that_takes_long_is_reported_too_and_a_command_that_counts_nothing(hasty, capsys):
    with progress.at_work("map"):
        time.sleep(0.45)
        assert capsys.readouterr().err == "map: at work for 0:00\n"
        with progress.bar("outer", total=2, unit="soups"), progress.bar("inner", total=9):
            time.sleep(0.2)
            assert capsys.readouterr().err == "outer: 0/2 soups; inner: 0/9\n"
        time.sleep(0.2)
        assert capsys.readouterr().err == ""  # a sign of life was given just now


def test_what_a_step_says_comes_at_once_then_now_and_again_and_at_the_end(hasty, capsys):
    with progress.bar("dpo", total=40, unit="steps", done=30) as advance:
        for step in range(30, 40):
            advance()
            advance(0, f"loss {step}")
            time.sleep(0.04)
    lines = [re.sub(r"  \S+ steps/s|  \S+ left", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "dpo: 31/40 steps  loss 30" and lines[-1] == "dpo: 40/40 steps  loss 39"
    assert 3 <= len(lines) <= 6


def test_of_several_processes_the_first_tells(hasty, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress.at_work("dpo"):
        time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_not_asked_for_nothing_is_shown(hasty, capsys):
    with progress.bar("scoring", total=3, show=False) as advance:
        advance(1, "loss")
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.at_work("dpo"), progress.bar("dpo", total=4, unit="steps", done=1) as advance:
        advance(1, "loss [0.5]")
        advance(2)
    assert "loss [0.5]" in sys.stderr.getvalue() and "4/4" in sys.stderr.getvalue()
