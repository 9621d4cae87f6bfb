"""Soups: weighted sums of separately aligned models' weights, from file to file or in memory, and of LoRA adapters."""

from typing import TYPE_CHECKING

from fastalign._base.lazy import lazy
from fastalign.soup.checkpoint import open_checkpoint
from fastalign.soup.methods import METHODS
from fastalign.soup.methods.settings import simplex_grid
from fastalign.soup.recipes import read_recipe
from fastalign.soup.run import Merged, execute, merge

if TYPE_CHECKING:
    from fastalign.soup.front import SoupFront, choose
    from fastalign.soup.lora.apply import apply_adapters
    from fastalign.soup.lora.extract import extract_adapter
    from fastalign.soup.lora.mix import merge_adapters
    from fastalign.soup.measure import walk
    from fastalign.soup.memory import interpolate, mix

__all__ = [
    "METHODS", "Merged", "SoupFront", "apply_adapters", "choose", "execute", "extract_adapter", "interpolate", "merge",
    "merge_adapters", "mix", "open_checkpoint", "read_recipe", "simplex_grid", "walk",
]  # fmt: skip

# Merging files needs no torch; code for tensors in memory is imported, with torch, on first use.
if not TYPE_CHECKING:
    _HOMES = {
        "SoupFront": "front",
        "choose": "front",
        "walk": "measure",
        "merge_adapters": "lora.mix",
        "extract_adapter": "lora.extract",
        "apply_adapters": "lora.apply",
        "interpolate": "memory",
        "mix": "memory",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)
