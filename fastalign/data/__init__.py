"""Prompts and files: what goes in, and how results are written."""

from fastalign.data import prompts

__all__ = ["prompts"]
