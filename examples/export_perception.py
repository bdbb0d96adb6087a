"""Write a run's encoder and emotion perception as a program of plain PyTorch, which runs without this package.

    python examples/export_perception.py ecore-demo/run perception.pt2
    python examples/perceive_exported.py perception.pt2 "I heard strange noises in the dark."

``torch.export`` records one context of 2 to 512 words. With the backend ``reference`` the operators are recorded by
name; ``run_decompositions`` replaces each with the PyTorch operations that define it. Related words (a run prepared
with ``--relations``) are left out.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor, nn

from ecore import ECore
from ecore.data.batches import MAX_CONTEXT_WORDS, Batch
from ecore.model.base import EmpatheticModel
from ecore_kernels import use_backend

EXAMPLE = ["I heard strange noises in the dark.", "Oh no, what was it?", "I do not know, I was so scared."]


class Perception(nn.Module):
    """Probabilities of the emotions in one context."""

    def __init__(self, model: EmpatheticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
        """Return [1, emotions].

        Args:
            context: ids, ``[CLS]`` first, [1, M].
            state: 3 for ``[CLS]``, 1 for the speaker's words, 2 for the listener's, [1, M].
            lengths: M, [1].
        """
        nothing = context.new_zeros(1, 0)
        batch = Batch(context, state, lengths, nothing, nothing, torch.zeros_like(lengths))
        _, words = self.model.encode_words(batch)
        return self.model.perceiver(words).main_logits.softmax(-1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or name on the Hugging Face hub")
    parser.add_argument("out", help="file to write, .pt2")
    given = parser.parse_args(arguments)
    model = ECore.from_pretrained(given.run).model.eval()
    if model.perceiver is None or model.config.backbone is not None:
        parser.error(f"{given.run}: expected a model with an emotion graph and its own encoder")
    module, (context, state, lengths, *_) = Perception(model), model.read([EXAMPLE])
    words = {1: torch.export.Dim("words", min=3, max=MAX_CONTEXT_WORDS + 1)}
    with torch.no_grad(), use_backend("reference"):
        program = torch.export.export(module, (context, state, lengths), dynamic_shapes=(words, words, None))
        program = program.run_decompositions()
        difference = (program.module()(context, state, lengths) - module(context, state, lengths)).abs().max()
    names = {"words": model.vocabulary.words, "emotions": model.vocabulary.emotions}
    torch.export.save(program, given.out, extra_files={"names.json": json.dumps(names)})
    print(
        f"{given.out}: {len(names['emotions'])} emotions; largest difference from the model {difference:.1e}"
    )


if __name__ == "__main__":
    main()
