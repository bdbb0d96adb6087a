"""Reasons against a call that several backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wants_gradient(tensor: Tensor) -> bool:
    """Return True if ``tensor`` requires a gradient at any level of torch.func."""
    while not tensor.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def no_gradient_to_words(graph: Any) -> list[str]:
    """Intensities come from a lexicon: the fused kernels do not differentiate them, and must not pretend to."""
    asked = graph is not None and torch.is_grad_enabled() and wants_gradient(graph.word_weight)
    return ["gives no gradient to word_weight"] if asked else []


def only_edges(query: Any, key: Any, options: dict[str, Any]) -> list[str]:
    """The reason against what kernels of attention on a dense graph do not have; empty if the call wants none of it."""
    wanted = [name for name in ("bias", "sender_gate", "edge_bias", "clamp") if options.get(name) is not None]
    wanted += ["dropout"] if options.get("dropout") else []
    wanted += ["return_lse"] if options.get("return_lse") else []
    wanted += ["update='all'"] if options.get("update") == "all" else []
    wanted += ["no edge"] if options.get("edge") is None else []
    wanted += (
        ["a gate or an edge_scale alone"]
        if (options.get("gate") is None) != (options.get("edge_scale") is None)
        else []
    )
    wanted += ["keys unlike queries"] if key.shape != query.shape else []
    return [f"has no kernel with {', '.join(wanted)}"] if wanted else []
