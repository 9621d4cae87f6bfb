"""Common behaviour of all loaders: quiet without a terminal, one line per error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastalign._base.errors import UserError

_PLAIN = {  # beginnings of transformers' messages whose first line does not say what is wrong
    "You set `ignore_mismatched_sizes`": "its weights have other shapes than its config.json says",
    "Couldn't instantiate the backend tokenizer": "it has no tokenizer that can be read",
}


@contextmanager
def one_line_errors(name: str | os.PathLike[str], where: str = "") -> Iterator[None]:
    """Turns the errors of transformers for a model that cannot be loaded into a one-line UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None:  # from the operating system: disk full, no permission
            raise
        raise UserError(f"{name}: cannot be loaded as a model: {where}{_first_line(error)}") from None
    except Exception as error:  # safetensors, JSON, tokenizers and transformers each have their own types
        raise UserError(f"{name}: cannot be loaded as a model: {_first_line(error)}") from None


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Silences transformers' progress bars if stderr is not a terminal, and its long report of weights."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    silence = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if silence:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return next((plain for began, plain in _PLAIN.items() if first.startswith(began)), first)
