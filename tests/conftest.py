import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub

import pytest
from hypothesis import settings

import fastalign

settings.register_profile("fastalign", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fastalign")


@pytest.fixture(params=["cpu", "reference"])
def each_backend(request):
    """Runs a test once on the compiled engine and once on the plain torch reference."""
    with fastalign.use_backend(request.param):
        yield request.param
