"""Adapters to other libraries, one file each; each imports its library only when called."""

from fastalign.integrations import trl
from fastalign.models import loading as transformers

__all__ = ["transformers", "trl"]
