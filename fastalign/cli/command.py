"""Command registration: help ends with an example, a user's mistake prints one line, and --json prints the result.

Exit codes: 0 success, 1 user error, 2 usage, 3 palette proved infeasible, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

import fastalign
from fastalign._base import outputs, progress, references, spending
from fastalign._base.errors import Terminated, UserError, printable
from fastalign._base.files import STDOUT

if TYPE_CHECKING:
    from rich.console import Console

UNWRAPPED = 400  # columns, so that output without a terminal is not wrapped
JSON = ("map_", "eval_")  # the commands whose output is JSON
OUTPUTS = ("out", "html", "figures", "plot", "report")  # the parameters that name output files
PLACES = ("model", "models", "base", "prompts", "data")  # string parameters that may be paths
# The commands whose output is a folder of their own.
FOLDERS = ("align", "distill", "dpo", "grpo", "ppo", "reward", "soup", "soup_front")
INFEASIBLE = 3
_AS_JSON: ContextVar[bool] = ContextVar("as_json", default=False)
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
Result = Mapping[str, Any]  # what a command returns and --json prints
AsJson = Annotated[bool, typer.Option("--json", help="Print the results, and nothing else, as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only results and errors.")]


Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class Registrar(Protocol):
    def __call__(
        self, example: str, *, serves: bool = False, former: Mapping[str, str] = MappingProxyType({})
    ) -> Decorator: ...


def registrar(app: typer.Typer) -> Registrar:
    """A decorator `command(example)` for `app`."""

    def command(example: str, *, serves: bool = False, former: Mapping[str, str] = MappingProxyType({})) -> Decorator:
        """Register a command: its help ends with `example`, and a user's mistake ends it with one line, not a
        traceback.

        serves: a server, which shows no progress. former: today's names of options and choices by their former ones;
        these, and options with underscores, are accepted but not shown.
        """

        def register(function: Command) -> Command:
            signature = inspect.signature(function, eval_str=True)

            @functools.wraps(function)
            def guarded(*args, as_json: bool = False, quiet: bool = False, **kwargs):
                json_before, quiet_before = _AS_JSON.set(as_json), _QUIET.set(quiet)
                try:
                    kwargs = {name: _at_home(name, value) for name, value in kwargs.items()}
                    arguments = signature.bind(*args, **kwargs).arguments
                    _protect(function.__name__, arguments)
                    if as_json and str(arguments.get("out")) == STDOUT:
                        raise UserError("give --out - or --json, not both: each writes JSON to stdout")
                    with (
                        _terminable(),
                        outputs.reporting_to(_not_said if quiet else _say, _ask),
                        nullcontext() if quiet else spending.shown(),
                        progress.hidden() if quiet else nullcontext() if serves else progress.at_work(name),
                    ):
                        result = function(*args, **kwargs)
                    if as_json:
                        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False, default=str))
                    if kwargs.get("allow_infeasible") is False and result["feasible"] is False:
                        raise typer.Exit(INFEASIBLE)
                except KeyboardInterrupt as stopped:
                    _fail(str(stopped) or "interrupted", 143 if isinstance(stopped, Terminated) else 130)
                except (typer.Exit, typer.Abort, typer.BadParameter):
                    raise
                except BrokenPipeError:  # the reader of stdout has closed it: `| head`
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest that would be flushed
                    raise typer.Exit(1) from None
                except Exception as error:
                    if not _is_users(error):
                        print(
                            "fastalign: this is a bug in fastalign; please report it with the traceback below",
                            file=sys.stderr,
                        )
                        raise
                    _fail(_in_options(_one_line(error), signature))
                finally:
                    _AS_JSON.reset(json_before)
                    _QUIET.reset(quiet_before)

            more = {"quiet": Quiet} | ({"as_json": AsJson} if signature.return_annotation is not None else {})
            added = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
                for name, kind in more.items()
            ]
            vars(guarded)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *added])
            name = function.__name__.rstrip("_").replace("_", "-")
            plain = [*signature.parameters, *(f"no_{parameter}" for parameter in signature.parameters)]
            today = {word: word.replace("_", "-") for word in plain}
            today |= {**former, **{word.replace("-", "_"): now for word, now in former.items()}}
            renaming = {"token_normalize_func": lambda word: today.get(word, word)}
            return app.command(name, epilog=f"[bold]Example[/bold]: {example}", context_settings=renaming)(guarded)

        return register

    return command


def console(out: Path | None = None) -> Console:
    """A rich console, without markup such as [bold], which names and texts may contain. out: the command's output file;
    for "-" the console prints to stderr. With --json it prints nothing."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else UNWRAPPED
    stderr = str(out) == STDOUT
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr, width=width, quiet=_AS_JSON.get())


def advise(console: Console, text: str) -> None:
    """Print what is no result but advice; not with --quiet."""
    if not _QUIET.get():
        console.print(text)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in this context, except in threads (which cannot set a handler) and if the signal is
    ignored."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _at_home(name: str, value: Any) -> Any:
    """Expands a ~ that the shell left in a path."""
    if isinstance(value, list):
        return [_at_home(name, one) for one in value]
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and name in PLACES else value


def _protect(command: str, arguments: Mapping[str, Any]) -> None:
    """A command never writes over, or into, one of its inputs."""
    given = [value for name, value in arguments.items() if name not in OUTPUTS]
    flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
    texts = [str(one) for one in flat if isinstance(one, str | Path)]
    named = [part.removeprefix("vllm:").partition("#")[0] for text in texts for part in {text, *text.split(",")}]
    named += [path for text in texts for path in references.local_inputs(text)]
    written = {name: arguments[name] for name in OUTPUTS if arguments.get(name) is not None}
    for name, path in written.items():
        if str(path) == STDOUT and (name != "out" or command not in JSON):
            raise UserError(
                f"{name} must be a path; - is stdout, for the JSON of {' and '.join(JSON).replace('_', '')}"
            )
    for name, path in written.items():
        if str(path) != STDOUT:
            own = name == "out" and command in FOLDERS
            outputs.not_an_input(path, [place for place in named if place], folder=own)
    places = [os.path.realpath(path) for path in written.values()]
    if len(set(places)) < len(places):
        options = " and ".join(f"--{name}" for name in written)
        raise UserError(f"{options} must be different, got {', '.join(map(str, written.values()))}")


def given(context: typer.Context) -> dict[str, str]:
    """The parameters given on the command line, by their option names."""
    options = {one.name: one.opts[0] for one in context.command.params if one.name}
    return {
        name: option
        for name, option in options.items()
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }


def names(option: str, text: str) -> list[str]:
    """Comma-separated names, at least one."""
    if not (result := references.split(text)):
        raise UserError(f"{option} must be names, comma-separated, at least one, got {text!r}")
    return result


def numbers(option: str, text: str) -> list[float]:
    """Comma-separated numbers, none for empty text; an error names the option."""
    try:
        return [float(field) for field in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{option} must be numbers, comma-separated, got {text!r}") from None


def named_values(option: str, fields: list[str]) -> dict[str, Any]:
    """name=value fields with unique names; a value is parsed as JSON if possible, else kept as text."""
    result: dict[str, Any] = {}
    for field in fields:
        name, mark, value = field.partition("=")
        name = name.strip()
        if not mark or not name or name in result:
            raise UserError(f"{option} must be name=value, each name once, got {field!r}")
        try:
            result[name] = json.loads(value)
        except (ValueError, RecursionError):
            result[name] = value
    return result


def warn_in_one_line() -> None:
    """Prints fastalign's own warnings as one line each, without the source line."""
    plain = warnings.formatwarning

    def one_line(message, category, filename, lineno, line=None) -> str:
        ours = Path(filename).is_relative_to(Path(fastalign.__file__).parent)
        return f"fastalign: {_one_line(message)}\n" if ours else plain(message, category, filename, lineno, line)

    warnings.formatwarning = one_line


def _is_users(error: BaseException) -> bool:
    """Whether it is a user error or an operating-system error. Everything else is a bug in fastalign."""
    # csrc/isa.cpp checks FASTALIGN_ISA.
    return isinstance(error, UserError | OSError) or str(error).startswith("FASTALIGN_ISA")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return " ".join(printable(str(error)).split()) or type(error).__name__


def _in_options(message: str, signature: inspect.Signature) -> str:
    """Replaces parameter names in a message by their options, if the name begins the message, is requested ("give
    lam"), has several words, or has a value. Quoted text is the user's own and stays."""
    for name, parameter in signature.parameters.items():
        declared = [
            d for d in getattr(parameter.annotation, "__metadata__", ()) if isinstance(d, typer.models.OptionInfo)
        ]
        if not declared:
            continue
        # In Annotated, the first name replaces the default.
        given = [d for d in (declared[0].default, *(declared[0].param_decls or ())) if isinstance(d, str)]
        on, _, off = (given or ["--" + name.rstrip("_").replace("_", "-")])[0].partition("/")
        alone = rf"(?<![\w./'\"-]){name}"
        message = re.sub(rf"^{name.replace('_', '[_-]')}(?=[ \[])", on, message)
        if message.startswith("give "):
            message = re.sub(rf"(?<!\ba )(?<!the ){alone}(?![\w./-])", on, message)
        message = re.sub(rf"{alone}=True\b", on, message)
        message = re.sub(rf"{alone}=False\b", off or f"no {on}", message)
        if "_" in name:
            message = re.sub(rf"{alone}(?![\w./'\"])", on, message)
    return message


def _ask(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(f"fastalign: {question}", err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # under torchrun, only the first process prints
        print(f"fastalign: {line}", file=sys.stderr, flush=True)


def _not_said(line: str) -> None:
    pass


def _fail(message: str, code: int = 1) -> None:
    _say(message)
    raise typer.Exit(code)
