"""E-CORE: empathetic dialogue over a multi-resolution emotion graph (Fu et al., EMNLP 2023)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecore.conversation import Conversation
    from ecore.pipeline import ECore

__all__ = ["Conversation", "ECore"]


def __getattr__(name: str) -> Any:
    # On demand: importing torch takes seconds, and `ecore --help` should not.
    if name == "ECore":
        from ecore.pipeline import ECore

        return ECore
    if name == "Conversation":
        from ecore.conversation import Conversation

        return Conversation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
