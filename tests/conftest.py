import os
import signal
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on CPU tensors, in Triton's interpreter

import pytest
import quick_interpreter  # noqa: F401
import torch
from hypothesis import settings
from turns import not_today

import fastalign
from fastalign import kernels
from fastalign._base import progress

LARGE = 8  # cases of an interpreted matrix
# The files that take longest.
FIRST = """cli_train align grpo_models gpu_jobs linear_token_logprobs policy build remote_sampler grpo_resume
grpo_trainer vocab_parallel resample preference linear_sample_tokens sampler kernels docs token_logprobs
outputs cli sample_tokens integrations_trl signals scale reward_trainer dpo_trainer processes
distill_trainer shared_prompt gae streams judge pareto_report compile_gate layouts map_statistics
enumerable report""".split()
settings.register_profile("fastalign", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fastalign")


def pytest_generate_tests(metafunc):
    """`each_backend`: the native extension, the plain torch reference and, in test_<op>.py, the op's Triton kernel."""
    if "each_backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[-1].removeprefix("test_")
        interpreted = op in kernels.names() and not metafunc.definition.get_closest_marker("not_interpreted")
        metafunc.parametrize("each_backend", ["cpu", "reference", *["triton"] * interpreted], indirect=True)


def pytest_collection_modifyitems(config, items):
    """Long files first. A sixth of each slow matrix a day: those marked so, and those of Triton's interpreter, which
    takes thirty times as long as what is compiled."""
    order = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))  # or a worker is left alone with one of them

    def test_of(item):
        return item.nodeid.partition("[")[0]

    def is_interpreted(item):
        return "callspec" in vars(item) and item.callspec.params.get("each_backend") == "triton"

    sizes = Counter(test_of(item) for item in items if is_interpreted(item))
    marked = [item for item in items if item.get_closest_marker("slow_matrix")]
    interpreted = [i for i in items if is_interpreted(i) and sizes[test_of(i)] >= LARGE and i not in {*marked}]
    left_out = not_today([*marked, *interpreted], group=test_of, name=lambda item: item.nodeid, parts=6)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def as_on_a_quick_machine(monkeypatch):
    """Tests of what stands on stderr do not see the lines that long work tells, however slow the machine is."""
    monkeypatch.setattr(progress, "FIRST", 3600.0)
    monkeypatch.setattr(progress, "EVERY", 3600.0)


@pytest.fixture
def each_backend(request):
    with fastalign.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
