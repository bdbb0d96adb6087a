"""E-CORE: empathetic dialogue over a multi-resolution emotion graph (Fu et al., EMNLP 2023)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecore.pipeline import Conversation, ECore

__all__ = ["Conversation", "ECore"]


def __getattr__(name: str) -> Any:
    # On demand: importing torch takes seconds, and `ecore --help` should not.
    if name in __all__:
        from ecore import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
