"""Every option of every command, given what it cannot mean: one clear line, or usage, and never a traceback."""

import inspect
import typing
from pathlib import Path

import pytest
import typer
from test_outputs import COMMANDS, argued, contents, made, work  # noqa: F401
from turns import by_the_day
from typer.testing import CliRunner

from fastalign.cli.main import app

GROUP = typer.main.get_group(app)
BAD = {
    "integer": ("-1", "0", "1.5", "many"),  # not what is merely large: that is taken at its word
    "float": ("-1", "0", "nan", "inf", "much", "1e400"),
    "text": ("", " ", "nothing-like-it", "a=b=c", "\x1b[31m", "é" * 300, "../../etc/passwd", "{}", "1,,2", "0:1"),
    "path": ("", "no/such/file", "/dev/null", "work", "\0"),
}
KINDS = {int: "integer", float: "float", str: "text", Path: "path"}
WRITTEN = ("out", "html", "figures", "plot", "report", "ray", "server")  # tests of their own


def options(name):
    words = name.split(" --")[0].split()
    group = GROUP
    for word in words[:-1]:
        group = group.commands[word]
    command = group.commands[words[-1]]
    names = {one.name: one.opts[0] for one in command.params if one.param_type_name == "option"}
    result = []
    for one in inspect.signature(command.callback, eval_str=True).parameters.values():
        kept = {one.annotation, *typing.get_args(one.annotation)}
        kept |= {inner for outer in kept for inner in typing.get_args(outer)}
        kind = next((kind for cls, kind in KINDS.items() if cls in kept), None)
        if kind and one.name in names and one.name not in WRITTEN:
            result.append((names[one.name], kind))
    return result


CASES = [
    (name, option, value)
    for name in COMMANDS
    if " --" not in name
    for option, kind in options(name)
    for value in BAD[kind]
]
TODAY = by_the_day(CASES, 12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "option", "value"), TODAY, ids=lambda value: ascii(value)[1:40])
def test_a_value_that_means_nothing_is_one_line(name, option, value, work, monkeypatch):  # noqa: F811
    (work / "work").mkdir()
    before = contents(work)
    result = CliRunner().invoke(app, [str(word) for word in argued(name, option, value, "--out", "out")])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2, 3), result.stderr
    if result.exit_code == 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("fastalign: ")]
        assert lines and result.stderr.rstrip("\n").splitlines()[-1] == lines[-1] and len(lines[-1]) < 600, (
            result.stderr
        )
        assert "\x1b" not in result.stderr and not (work / "out").exists()
    assert {key: data for key, data in contents(work).items() if not key.startswith("out")} == before


def test_there_are_200_and_more():
    assert len(CASES) > 400
