"""README's examples of the operators run as they stand, each by itself."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_operator_examples(capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    examples = [block for block in blocks if "ecore_kernels" in block]
    assert len(examples) == 2
    names: dict = {}
    for example in examples:
        alone: dict = {}
        exec(example, alone)
        names |= alone
    assert names["to_emotion"].shape == (2, 32)
    assert names["among_emotions"].shape == (2, 32, 32)
    assert names["new_edge"].shape == (2, 4, 50, 50)
    assert "otsu: " in capsys.readouterr().out
