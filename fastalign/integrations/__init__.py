"""Adapters to other libraries, one file each; each imports its library only when called."""

from fastalign.integrations import transformers, trl

__all__ = ["transformers", "trl"]
