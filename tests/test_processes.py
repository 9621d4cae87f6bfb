"""The native extension in many threads and after forks; a small part of the daily tools/sanitize.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from turns import on_its_day

from fastalign import backend

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


def child(code, **environment):
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", code]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PYTHONPATH": paths} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


FORKED = """
import faulthandler, os, sys
import sanitize, torch
from fastalign import backend

def all_of_it():
    return {name: call() for name, call in sanitize.work().items()}

torch.set_num_threads(4)
expected = all_of_it() if sys.argv[1] == "used" else None
pid = os.fork()
if pid == 0:
    faulthandler.dump_traceback_later(60, exit=True)
    assert backend.threads() == 1
    assert torch.get_num_threads() == (1 if expected else 4)
    torch.set_num_threads(4)  # as a user may: the extension still uses one
    assert backend.threads() == 1
    torch.set_num_threads(1)
    found = all_of_it()
    same = expected is None or all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name]))
    os._exit(0 if same else 3)
assert os.waitpid(pid, 0)[1] == 0, "the child"
assert backend.threads() == 4
all_of_it()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("before", ["used", "unused"])
def test_a_forked_process_does_all_of_it_in_one_thread(before):
    done = child(FORKED.replace("sys.argv[1]", repr(before)))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_workers_of_a_data_loader_may_call_ops():
    code = """
import torch
from fastalign import ops
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        return ops.token_logprobs(torch.full((64, 3000), float(i)), torch.arange(64))
whole = torch.stack([Rows()[i] for i in range(8)])
loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
assert torch.equal(torch.cat(list(loader)), whole)
"""
    done = child(code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_many_threads_at_once_give_what_one_gives():
    done = child("import sanitize; sanitize.hammer(threads=6, rounds=3, pool=3)", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]


@on_its_day("sanitize")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs g++ with its sanitizers")
def test_a_sanitizer_finds_nothing():
    """One of three and one of the levels, in turn; `python tools/sanitize.py` does more of each."""
    command = [sys.executable, ROOT / "tools" / "sanitize.py", "--in-turn", "--short"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "nothing found" in done.stdout
