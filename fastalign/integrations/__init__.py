"""Adapters to other people's libraries, one file each; each imports its library only when it is called."""

from fastalign.integrations import transformers, trl

__all__ = ["transformers", "trl"]
