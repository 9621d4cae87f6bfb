"""fastalign: align language models to several human values, with compiled losses, sampling and a MAP solver."""

from typing import TYPE_CHECKING

from fastalign._base.errors import UserError
from fastalign._base.lazy import lazy
from fastalign.backend import use_backend

if TYPE_CHECKING:
    from fastalign import data, decode, integrations, losses, ops, palette, reference, rewards, soup, train

__version__ = "0.1.0"
__all__ = [
    "UserError", "data", "decode", "integrations", "losses", "ops", "palette", "reference", "rewards", "soup", "train",
    "use_backend",
]  # fmt: skip
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, {name: name for name in __all__ if name not in ("UserError", "use_backend")})
