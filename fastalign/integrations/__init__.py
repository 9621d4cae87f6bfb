"""Adapters to other people's libraries, one file each; each imports its library only when it is called."""

from fastalign.integrations import trl
from fastalign.models import loading as transformers

__all__ = ["transformers", "trl"]
