"""What long work says of itself: a line now and again off a terminal, a bar on one, nothing where it is quick."""

import io
import math
import re
import sys
import threading

import pytest

from fastalign._base import progress

USUAL = {name: getattr(progress, name) for name in ("FIRST", "EVERY", "NEWS", "TICK")}  # conftest.py changes them


class Clock:
    """progress.time, at a standstill but for `sleep`, after which the watcher's thread has looked."""

    now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        progress._look()


@pytest.fixture
def clock(monkeypatch):
    for name, seconds in USUAL.items():
        monkeypatch.setattr(progress, name, seconds)
    monkeypatch.setattr(progress, "TICK", 1e6)
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def test_it_never_waits_longer_than_a_minute():
    assert USUAL["FIRST"] < 60 and USUAL["NEWS"] < 60 and USUAL["EVERY"] + USUAL["TICK"] < 60


def test_quick_work_says_nothing(clock, capsys):
    with progress.at_work("score"), progress.bar("scoring", total=3, unit="texts") as advance:
        clock.sleep(4)
        advance(3)
    assert capsys.readouterr().err == "" and not progress._open


def test_long_work_tells_count_rate_and_time_left(clock, capsys):
    with progress.bar("scoring", total=4000, unit="texts") as advance:
        advance(1000)
        clock.sleep(5)
        assert capsys.readouterr().err == "scoring: 1,000/4,000 texts  200 texts/s  0:15 left\n"
        advance(3000)
        clock.sleep(29)
        assert capsys.readouterr().err == ""
        clock.sleep(1)
        assert capsys.readouterr().err == "scoring: 4,000/4,000 texts  114 texts/s\n"


def test_a_step_that_takes_long_is_reported_too_and_a_command_that_counts_nothing(clock, capsys):
    with progress.at_work("map"):
        clock.sleep(30)
        assert capsys.readouterr().err == "map: at work for 0:30\n"
        with progress.bar("outer", total=2, unit="soups"), progress.bar("inner", total=9):
            clock.sleep(20)
            assert capsys.readouterr().err == "outer: 0/2 soups; inner: 0/9\n"
        clock.sleep(29)
        assert capsys.readouterr().err == ""  # a sign of life was given just now
        clock.sleep(1)
        assert capsys.readouterr().err == "map: at work for 1:20\n"


def test_a_command_that_counts_nothing_says_what_it_does(clock, capsys):
    with progress.at_work("sample"):
        with progress.doing("loading a model"):
            clock.sleep(30)
        clock.sleep(30)
    assert capsys.readouterr().err == "sample: loading a model, at work for 0:30\nsample: at work for 1:00\n"


def test_what_a_step_says_comes_at_once_then_now_and_again_and_at_the_end(clock, capsys):
    with progress.bar("dpo", total=40, unit="steps", done=30) as advance:
        for step in range(31, 41):
            clock.sleep(4)
            advance()
            advance(0, f"loss {step}")
    lines = [re.sub(r"  \S+ steps/s|  \S+ left", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"dpo: {step}/40 steps  loss {step}" for step in (31, 34, 37, 40)]


def test_work_that_something_else_ends_promises_no_end(clock, capsys):
    with progress.bar("grpo", total=math.inf, unit="steps") as advance:
        for step in range(3):
            clock.sleep(10)
            advance(1, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "grpo: 0 steps" and lines[-1] == "grpo: 3 steps  0.1 steps/s  loss 2"


def test_the_watcher_looks_by_itself(monkeypatch, capsys):
    monkeypatch.setattr(progress, "TICK", 0.001)
    monkeypatch.setattr(progress, "FIRST", 0.0)
    looked = threading.Event()
    monkeypatch.setattr(progress, "_tell", lambda works: looked.set())
    with progress.bar("scoring", total=3):
        assert looked.wait(60)


def test_of_several_processes_the_first_tells(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress.at_work("dpo"):
        clock.sleep(40)
    assert capsys.readouterr().err == ""


def test_not_asked_for_nothing_is_shown(clock, capsys):
    with progress.bar("scoring", total=3, show=False) as advance:
        advance(1, "loss")
        clock.sleep(40)
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
