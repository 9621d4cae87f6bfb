"""Soups: weighted sums of separately aligned models' weights, from file to file or in memory."""

from fastalign.soup.checkpoint import open_checkpoint
from fastalign.soup.memory import interpolate, mix
from fastalign.soup.merge import Merged, execute, merge
from fastalign.soup.methods import METHODS, simplex_grid

__all__ = ["METHODS", "Merged", "execute", "interpolate", "merge", "mix", "open_checkpoint", "simplex_grid"]
