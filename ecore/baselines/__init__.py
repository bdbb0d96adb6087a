"""The paper's rivals, from their papers' equations, on this package's encoder, decoder, data and training."""

from __future__ import annotations

from ecore.baselines.base import Baseline
from ecore.baselines.cem import CEM
from ecore.baselines.empdg import EmpDG
from ecore.baselines.kemp import KEMP
from ecore.baselines.mime import MIME
from ecore.baselines.transformer import MultitaskTransformer

BASELINES: dict[str, type[Baseline]] = {
    "transformer": MultitaskTransformer,
    "mime": MIME,
    "kemp": KEMP,
    "empdg": EmpDG,
    "cem": CEM,
}
"""By the name that ``ModelConfig.model`` has for each."""

__all__ = ["BASELINES", "Baseline"]
