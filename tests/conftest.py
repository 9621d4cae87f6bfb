import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on CPU tensors, in Triton's interpreter

import pytest
from hypothesis import settings

import fastalign
from fastalign import kernels

settings.register_profile("fastalign", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fastalign")


def pytest_generate_tests(metafunc):
    """`each_backend`: the compiled engine, the plain torch reference and, in test_<op>.py, the op's Triton kernel."""
    if "each_backend" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[-1].removeprefix("test_")
        interpreted = op in kernels.names() and not metafunc.definition.get_closest_marker("not_interpreted")
        metafunc.parametrize("each_backend", ["cpu", "reference", *["triton"] * interpreted], indirect=True)


@pytest.fixture
def each_backend(request):
    with fastalign.use_backend(request.param):
        yield request.param
