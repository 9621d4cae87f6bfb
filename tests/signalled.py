"""The command line in a process of its own that sends itself a signal at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import pydoc
import signal
import sys

_server = multiprocessing.get_context("forkserver")  # imports once for all
_server.set_forkserver_preload(
    ["fastalign.cli.main", "fastalign.train.dpo", "fastalign.train.reward", "fastalign.train.ppo",
     "fastalign.train.value_head", "peft", "datasets", "transformers.models.llama.modeling_llama",
     "fastalign.decode.sampler", "fastalign.soup.measure", "accelerate", "tensorboard", "torch.utils.tensorboard"]
)  # fmt: skip


def run(arguments, errors, *, at, call, number, times=1):
    """Exit code of `fastalign *arguments`, its stderr in the file `errors`: as it calls `at` (dotted) for the
    `call`-th time, it gets the signal so often."""
    process = _server.Process(target=_main, args=([*map(str, arguments)], str(errors), at, call, number, times))
    process.start()
    process.join(120)
    return process.exitcode


def _main(arguments, errors, at, call, number, times) -> None:
    import torch

    torch.set_num_threads(1)
    # A suite that was started in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    owner, _, name = at.rpartition(".")
    owner = pydoc.locate(owner)
    called, function = [], getattr(owner, name)

    def signalled(*given, **named):
        called.append(name)
        if len(called) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*given, **named)

    setattr(owner, name, signalled)
    sys.argv = ["fastalign", *arguments]
    from fastalign.cli.main import main

    main()
