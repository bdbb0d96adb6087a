"""The layout of Hugging Face kernels: relative imports, a namespace of its own, and the package `kernels` loads it."""

import ast
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import ecore_kernels

ROOT = Path(__file__).parents[2]
VARIANTS = ["torch-universal", "torch-cpu"]
script = runpy.run_path(str(ROOT / "kernels" / "hugging_face.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "ecore-kernels"
    script["main"]([str(out), "--variants", *VARIANTS])
    return out


@pytest.fixture
def load():
    """The package's loader, and the modules that it adds, gone afterwards."""
    # The bare name finds this repository's folder as well, where the package is missing.
    kernels = pytest.importorskip("kernels.load", reason="needs the package kernels")
    before = set(sys.modules)
    yield kernels.get_local_kernel
    for name in set(sys.modules) - before:
        if name.startswith("_ecore_kernels"):
            del sys.modules[name]


def agrees(kernel):
    """Return whether an operator of ``kernel`` gives what the installed package's reference gives."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 3) for _ in range(3))
    edge, gate = torch.rand(2, 2, 5, 5), torch.rand(2, 2, 5)
    found = kernel.edge_attention(query, key, value, edge, gate=gate, backend="reference")
    expected = ecore_kernels.edge_attention(query, key, value, edge, gate=gate, backend="reference")
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_imports_the_installed_package(folder, variant):
    files = list((folder / "build" / variant).rglob("*.py"))
    assert len(files) > 50
    for file in files:
        assert f'"{script["PACKAGE"]}' not in file.read_text()  # an operator's name, or a module's
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = [*file.parent.parts[: len(file.parent.parts) - node.level + 1]]
                place = Path(*parts, *(node.module or "").split("."))
                assert place.is_relative_to(folder / "build" / variant)
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{file}: {ast.unparse(node)}"
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.startswith("ecore") for name in names)


def test_both_variants_load_beside_the_installed_package(folder):
    """As the package `kernels` imports them: a file under a name of its own."""
    loaded = []
    for variant in VARIANTS:
        build = folder / "build" / variant
        name = json.loads((build / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        assert agrees(module)
        assert module.edge_attention is not ecore_kernels.edge_attention
        assert hasattr(torch.ops, name)
        assert sorted(module.__all__) == sorted(ecore_kernels.__all__)
        loaded.append(name)
    assert len(set(loaded)) == len(VARIANTS)
    pytest.importorskip("triton", reason="needs Triton")
    for operator in ("graph_attention", "edge_readout", "edge_attention", "linear_cross_entropy"):
        registration = sys.modules[f"{loaded[0]}.operators.registration"]
        assert registration.kernels("triton", operator).__name__ == f"{loaded[0]}.triton_kernels.{operator}"


def test_the_namespace_follows_the_sources(folder, tmp_path, monkeypatch):
    changed = script["sources"]() | {"refusals.py": "# changed\n"}
    monkeypatch.setitem(script["write"].__globals__, "sources", lambda: changed)
    script["write"](tmp_path, ["torch-cpu"])
    one, other = (
        json.loads((where / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
        for where in (folder, tmp_path)
    )
    assert one != other


@pytest.mark.parametrize("text", ["import ecore_kernels\n", "from ecore_kernels import(graph)\n"])
def test_an_import_that_would_stay_absolute_is_an_error(text):
    with pytest.raises(ValueError, match=r"graph\.py: expected an import of the form"):
        script["rewritten"]("graph.py", text, "_name")


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_loads_a_variant(folder, tmp_path, load, variant):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / variant).symlink_to(folder / "build" / variant)
    kernel = load(tmp_path)
    assert kernel.__name__.startswith(f"_ecore_kernels_{variant.removeprefix('torch-')}_")
    assert agrees(kernel)


def test_kernels_refuses_another_variants_name(folder, tmp_path, load):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "torch-noarch").symlink_to(folder / "build" / "torch-cpu")
    with pytest.raises(FileNotFoundError, match="noarch"):
        load(tmp_path)


def test_the_folders_own_tests_pass(folder, load):
    found = runpy.run_path(str(folder / "tests" / "test_ecore_kernels.py"))
    tests = [name for name in found if name.startswith("test_")]
    assert len(tests) == 2
    for name in tests:
        found[name]()


def test_the_card_names_every_operator(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert all(f"`{name}`" in card for name in ecore_kernels.__all__)


def test_bad_arguments_are_one_line(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    for given, line in (
        ([str(tmp_path)], "expected an empty folder"),
        (["x", "--variants", "torch-noarch"], "noarch"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script["main"](given)
        assert stopped.value.code == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "mine").read_text() == "kept"
