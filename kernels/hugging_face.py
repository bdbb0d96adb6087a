"""The operators as a kernel of the Hugging Face Hub: ``python kernels/hugging_face.py OUT [--variants torch-cpu ...]``.

Writes the layout that the package ``kernels`` loads, from the sources in ``ecore_kernels``: for each build variant a
folder of Python and Triton with relative imports, an operator namespace of its own (so that it loads beside an
installed ``ecore_kernels``, and beside another variant) and ``metadata.json``; a card and a test. The compiled
extension is not in it: on a CPU the operators run in plain PyTorch there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "ecore_kernels"
SOURCES = Path(__file__).resolve().parent / PACKAGE
NAME, VERSION, LICENSE = "ecore-kernels", 1, "apache-2.0"
LEFT_OUT = ("verify", "ahead_of_time", "info.py", "problems.py")
"""Modules left out, which check the package or compile for absent devices: nothing else imports them."""
BACKENDS = {"torch-universal": "cpu", "torch-cpu": "cpu", "torch-cuda": "cuda"}
"""Build variants, and the backend that each declares: the universal one the least that it needs."""

CARD = """---
library_name: kernels
license: {license}
tags:
- kernels
- attention
- triton
---

# {name}

Fused operators of E-CORE: attention whose scores are multiplied by learned edge weights and which updates these,
and parts of a training step. Triton on CUDA, plain PyTorch on a CPU.

```python
from kernels import get_kernel

ecore = get_kernel("USER/{name}", version={version}, trust_remote_code=True)
output, new_edge = ecore.edge_attention(query, key, value, edge, neighbors, gate=gate, edge_scale=edge_scale)
```

Exports: {exports}.
"""

TEST = '''"""The folder as the package `kernels` loads it: an operator against its formula, and its gradient."""

from pathlib import Path

import torch
from kernels import get_local_kernel

ecore = get_local_kernel(Path(__file__).resolve().parents[1])
device = "cuda" if torch.cuda.is_available() else "cpu"


def test_edge_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 17, 20, device=device, requires_grad=True) for _ in range(3))
    edge = torch.rand(2, 3, 17, 17, device=device)
    output, _ = ecore.edge_attention(query, key, value, edge, scale=None)
    expected = (query @ key.mT * 20**-0.5 * edge).softmax(-1) @ value
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad(output.square().sum(), query)
    wanted = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_linear_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, device=device), torch.randn(50, 8, device=device)
    target = torch.randint(50, (9,), device=device)
    loss, _ = ecore.linear_cross_entropy(hidden, weight, None, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, target), rtol=1e-3, atol=1e-3)
'''


def sources() -> dict[str, str]:
    """Return the text of every file that goes into a variant, by its path in the package."""
    found = {}
    for path in sorted([*SOURCES.rglob("*.py"), *SOURCES.rglob("*.json")]):
        place = path.relative_to(SOURCES)
        if place.parts[0] not in LEFT_OUT and "__pycache__" not in place.parts:
            found[str(place)] = path.read_text(encoding="utf-8")
    return found


def rewritten(place: str, text: str, namespace: str) -> str:
    """Return a module with relative imports, and with ``namespace`` where the package's name is a value.

    Raises:
        ValueError: an import of the package is left.
    """
    dots = "." * len(Path(place).parts)

    def relative(match: re.Match[str]) -> str:
        return f"{match[1]}from {dots}{match[2] or ''} import "

    text = re.sub(rf"^( *)from {PACKAGE}(?:\.([\w.]+))? import ", relative, text, flags=re.MULTILINE)
    # Operators' names, and modules that are imported by name: the package is loaded under its namespace.
    text = re.sub(rf"""(["']){PACKAGE}(?=["'.:])""", rf"\g<1>{namespace}", text)
    text = text.replace(f"torch.ops.{PACKAGE}", f"torch.ops.{namespace}")
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if any(name.split(".")[0] == PACKAGE for name in names):
            raise ValueError(f"{place}: expected an import of the form `from {PACKAGE}... import ...`")
    return text


def write(out: Path, variants: Sequence[str]) -> None:
    """Write the kernel's folder: ``build/VARIANT`` for each variant, ``README.md`` and ``tests``."""
    files = sources()
    content = hashlib.sha256("\0".join(f"{place}\0{text}" for place, text in files.items()).encode())
    for variant in variants:
        namespace = f"_{PACKAGE}_{variant.removeprefix('torch-')}_{content.hexdigest()[:8]}"
        folder = out / "build" / variant
        for place, text in files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(
                rewritten(place, text, namespace) if place.endswith(".py") else text, encoding="utf-8"
            )
        metadata = {
            "name": NAME,
            "id": namespace,
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": BACKENDS[variant]},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    exported = ast.literal_eval(files["__init__.py"].partition("__all__ = ")[2])
    exports = ", ".join(f"`{name}`" for name in exported)
    card = CARD.format(name=NAME, version=VERSION, license=LICENSE, exports=exports)
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "tests").mkdir(exist_ok=True)
    (out / "tests" / "test_ecore_kernels.py").write_text(TEST, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the folder to write, which must not exist or be empty"
    )
    parser.add_argument("--variants", nargs="+", choices=list(BACKENDS), default=["torch-universal"])
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out}: expected an empty folder, or a path that is not there yet")
    write(arguments.out, arguments.variants)
    print(f"{arguments.out}: {', '.join(arguments.variants)}")


if __name__ == "__main__":
    main()
