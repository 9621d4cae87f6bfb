"""Soups: weighted sums of separately aligned models' weights, from file to file or in memory; and of their LoRA adapters."""

from typing import TYPE_CHECKING

from fastalign._base.lazy import lazy
from fastalign.soup.checkpoint import open_checkpoint
from fastalign.soup.merge import Merged, execute, merge
from fastalign.soup.methods import METHODS, simplex_grid
from fastalign.soup.recipe import read_recipe

if TYPE_CHECKING:
    from fastalign.soup.front import SoupFront, choose, walk
    from fastalign.soup.lora import merge_adapters
    from fastalign.soup.lora_extract import extract_adapter
    from fastalign.soup.lora_merge import apply_adapters
    from fastalign.soup.memory import interpolate, mix

__all__ = [
    "METHODS", "Merged", "SoupFront", "apply_adapters", "choose", "execute", "extract_adapter", "interpolate", "merge",
    "merge_adapters", "mix", "open_checkpoint", "read_recipe", "simplex_grid", "walk",
]  # fmt: skip

# Merges of files do without torch; what works on tensors in memory is imported with it, when it is asked for.
__getattr__, __dir__ = lazy(__name__, {
    "SoupFront": "front", "choose": "front", "walk": "front", "merge_adapters": "lora", "extract_adapter": "lora_extract",
    "apply_adapters": "lora_merge", "interpolate": "memory", "mix": "memory",
})  # fmt: skip
