"""Perceive emotions with a program that export_perception.py wrote: PyTorch alone, without this package.

python examples/perceive_exported.py perception.pt2 "I lost my keys." "Oh no." "I looked everywhere."
"""

import json
import re
import sys

import torch

UNKNOWN, CONTEXT, SPEAKER, LISTENER, CONTEXT_STATE = 1, 4, 1, 2, 3


def main(path, *turns):
    extra = {"names.json": ""}
    perceive = torch.export.load(path, extra_files=extra).module()
    names = json.loads(extra["names.json"])
    ids = {word: i for i, word in enumerate(names["words"])}
    context, state = [CONTEXT], [CONTEXT_STATE]
    for number, turn in enumerate(turns):
        # Close to the package's own tokenizer, which also splits contractions as NLTK does.
        words = re.findall(r"[a-z0-9']+|[^\sa-z0-9]", turn.lower())
        context += [ids.get(word, UNKNOWN) for word in words]
        state += [LISTENER if number % 2 else SPEAKER] * len(words)
    if not 2 <= len(context) - 1 <= 512:
        sys.exit(f"expected 2 to 512 words, got {len(context) - 1}")
    probabilities = perceive(torch.tensor([context]), torch.tensor([state]), torch.tensor([len(context)]))[0]
    for i in probabilities.argsort(descending=True)[:5].tolist():
        print(f"{names['emotions'][i]:<14} {probabilities[i]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
