"""Reading users' prompts, conversations, preference pairs and palettes."""

from typing import TYPE_CHECKING

from fastalign._base.lazy import lazy

if TYPE_CHECKING:
    from fastalign.data import hub, preferences, prompts

__all__ = ["hub", "preferences", "prompts"]
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, {name: name for name in __all__})
