"""fastalign: align language models to several human values, with compiled losses, sampling and a MAP solver."""

import torch as _torch  # noqa: F401  torch's OpenMP runtime must be the one that the CPU engine finds

from fastalign import data, decode, integrations, losses, ops, palette, reference, rewards, soup
from fastalign.backend import use_backend
from fastalign.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "UserError", "data", "decode", "integrations", "losses", "ops", "palette", "reference", "rewards", "soup",
    "use_backend",
]  # fmt: skip
