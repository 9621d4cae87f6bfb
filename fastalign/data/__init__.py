"""Prompts, preference pairs and files: what goes in, and how results are written."""

from fastalign.data import hub, preferences, prompts

__all__ = ["hub", "preferences", "prompts"]
