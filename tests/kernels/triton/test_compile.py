"""Proofs about the GPU kernels without a GPU: they compile for every architecture, fit, and do not spill."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ecore_kernels import info, triton_kernels
from ecore_kernels.info import ARCHITECTURES

pytest.importorskip("triton", reason="needs Triton's compiler")

import triton

from ecore_kernels import ahead_of_time
from ecore_kernels.ahead_of_time import Entry
from ecore_kernels.triton_kernels import launch
from tests.kernels.triton import record

SHARED_OF_RTX_3090 = 101_376  # bytes a block may use on sm_86
PAPER_HEAD = 100
SPILL_FREE = {
    "graph_attention": 1,
    "edge_readout": 2,
    "edge_attention": 0,
}  # up to this many layers of history
# Bytes of the stated sizes that versions of Triton other than that of constraints.txt spill all the same.
KNOWN_SPILLS = {
    "3.6": {
        ("edge_attention_backward", "tf32", ""): 36,
        ("edge_attention_backward", "tf32", "shared edge"): 20,
    },
}


def test_no_kernel_chains_more_than_two_conditions():
    """Triton 3.3's compiler stops at ``a and b and c`` and at ``a < b < c``; its interpreter takes them."""
    kernels, chains = 0, []
    for file in Path(triton_kernels.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            decorators = map(ast.unparse, getattr(function, "decorator_list", []))
            if not any("jit" in decorator for decorator in decorators):
                continue
            kernels += 1
            for node in ast.walk(function):
                chained = isinstance(node, ast.BoolOp) and len(node.values) > 2
                if chained or (isinstance(node, ast.Compare) and len(node.ops) > 1):
                    chains.append(f"{file.name}, {function.name}: {ast.unparse(node)}")
    assert kernels > 50
    assert chains == []


def python(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Python where the compiler can be used: not under the interpreter, and without line numbers.

    Those change no program, and take 40 % of the compiler's time.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def name(row: dict[str, Any]) -> str:
    return " ".join(str(row[x]) for x in ("kernel", "variant", "arithmetic", "head", "depth", "architecture"))


def operator(row: dict[str, Any]) -> str:
    return row["kernel"].rpartition("_")[0]


EVERYWHERE = os.environ.get("ECORE_COMPILE_EVERYWHERE") == "1"
SHOWN = ARCHITECTURES if EVERYWHERE else {"sm_86": 86}
"""Architectures that the whole table is compiled for: by default the one with least memory;
all four take four times as long."""


class Proof(NamedTuple):
    rows: list[dict[str, Any]]
    made: list[Entry]  # compiled now; the others' rows come from the record


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """Rows of every kernel of the launch table: from the record what did not change, the others compiled now."""
    report = tmp_path_factory.mktemp("compiled") / "report.json"
    result = python("-m", "tests.kernels.triton.record", report)
    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text())
    return Proof(found["kernels"], [Entry(*entry) for entry in found["compiled"]])


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    """Every kernel of the launch table, for the architectures that are shown."""
    if not EVERYWHERE:
        return request.getfixturevalue("proof").rows
    report = tmp_path_factory.mktemp("everywhere") / "report.json"
    result = python("-m", "ecore_kernels.info", "--compile", *SHOWN, "--json", report)
    assert result.returncode in (0, 1), result.stderr
    print(result.stdout)  # with deeper histories, for which nothing is promised but that they run
    return json.loads(report.read_text())["kernels"]


def takes_minutes(test: Callable[..., None]) -> Callable[..., None]:
    """Compiling counts as part of the first test that asks for it."""
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


SAMPLE = [
    Entry("graph_attention_forward", "half", 100, 1, 86),
    Entry("graph_attention_backward", "tf32", 100, 0, 86),
    Entry("edge_readout_backward", "half", 100, 1, 86),
    Entry("edge_attention_forward", "tf32", 100, 0, 86),
]
AGAIN = f"""
import json
from ecore_kernels import ahead_of_time
if __name__ == "__main__":
    entries = [ahead_of_time.Entry(*entry) for entry in {[tuple(entry) for entry in SAMPLE]}]
    print(json.dumps([ahead_of_time.record(one) for one in ahead_of_time.compile_all(entries)]))
"""


@takes_minutes
def test_the_record_is_what_the_compiler_says(proof, tmp_path):
    """Four of its kernels, compiled without it."""
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    result = python(script)
    assert result.returncode == 0, result.stderr
    rows = {record.key(row): row for row in proof.rows}
    for row in json.loads(result.stdout):
        assert (
            rows[record.key(row)].items() >= {k: v for k, v in row.items() if k not in record.TIMES}.items()
        )


@takes_minutes
def test_the_record_is_complete(proof):
    """A record that lags compiles its gaps in every test run."""
    if triton.__version__ != record.version():
        pytest.skip(f"the record is Triton {record.version()}'s, this is {triton.__version__}")
    assert proof.made == [], "python -m tests.kernels.triton.record compiles these and writes them down"


def test_what_changes_a_kernel_changes_its_digest():
    script = """
from tests.kernels.triton.record import digest
from ecore_kernels.ahead_of_time import Entry
from ecore_kernels.triton_kernels import launch
entry = Entry("graph_attention_forward", "half", 100, 0, 86)
before = digest(entry)
assert digest(entry) == before
given = launch.configuration
def other(change):
    launch.configuration = lambda *kind: change(*given(*kind))
    return digest(entry)
digests = {
    before,
    other(lambda constants, options: (constants, options | {"num_stages": options["num_stages"] + 1})),
    other(lambda constants, options: ({n: 2 * v for n, v in constants.items()}, options)),
    digest(entry._replace(depth=1)),
    digest(entry._replace(arithmetic="tf32")),
}
assert len(digests) == 5, digests
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr


@takes_minutes
@pytest.mark.parametrize("architecture", SHOWN.values(), ids=SHOWN)
def test_every_entry_of_the_table_compiles_and_fits(compiled, architecture):
    rows = [row for row in compiled if row["architecture"] == architecture]
    assert [f"{name(row)}: {row['problem']}" for row in rows if row["problem"]] == []
    assert all(row["registers"] > 0 and row["blocks"] > 0 for row in rows)
    # Nothing was left out.
    used = {
        (
            row["kernel"],
            row["arithmetic"],
            launch.padded(row["head"]),
            row["warps"],
            row["stages"],
            str(row["constants"]),
        )
        for row in rows
    }
    for row in json.loads(launch.TABLE.read_text()):
        kind = row["kernel"], row["arithmetic"], row["head"]
        constants, options = launch.configuration(*kind, row["depth"], architecture)
        assert (*kind, *options.values(), str(constants)) in used


@takes_minutes
def test_the_other_architectures_compile(proof):
    rows = [row for row in proof.rows if row["architecture"] != 86]
    assert {row["architecture"] for row in rows} == {80, 89, 90}
    assert [f"{name(row)}: {row['problem']}" for row in rows if row["problem"]] == []
    forwards = [row for row in rows if row["kernel"] == "graph_attention_forward"]
    assert {row["arithmetic"] for row in forwards if row["architecture"] == 90} == {"half", "tf32"}
    assert [f"{name(row)}: {row['spills']} bytes" for row in forwards if row["spills"]] == []


SCALES = """
import json
from ecore_kernels import ahead_of_time
from ecore_kernels.triton_kernels import launch
def key(kernel, arithmetic, scale):
    entry = ahead_of_time.Entry(kernel, arithmetic, 100, 0, 86)
    launched = ahead_of_time.planned(entry, scale)
    assert launched.options["enable_fp_fusion"] is False
    assert launched.arguments["scale_bits"] == launch.bits(scale)
    return ahead_of_time.source_of(launched).hash()
kernels = [f"{o}_{d}" for o in ("graph_attention", "edge_readout", "edge_attention") for d in ("forward", "backward")]
scales = (0.0, 1.0, 16.0, -0.3, 1e-300)
print(json.dumps([len({key(k, a, s) for s in scales}) for k in kernels for a in ("tf32", "float64")]))
"""


def test_values_of_scale_share_a_kernel():
    result = python("-c", SCALES)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [1] * 12


@takes_minutes
def test_shared_memory_suffices_on_an_rtx_3090(compiled):
    rows = [row for row in compiled if row["architecture"] == 86]
    assert {row["arithmetic"] for row in rows} == {"half", "tf32", "ieee", "float64"}
    assert [name(row) for row in rows if row["shared"] > SHARED_OF_RTX_3090] == []
    assert any(row["shared"] > SHARED_OF_RTX_3090 // 4 for row in rows)  # it is measured at all


@takes_minutes
def test_no_spills_at_the_papers_sizes(compiled):
    rows = [
        row
        for row in compiled
        if row["architecture"] == 86
        and row["arithmetic"] in ("half", "tf32")
        and row["head"] == PAPER_HEAD
        and row["depth"] <= SPILL_FREE[operator(row)]
        and row["variant"] != "options"  # everything at once: the forward spills 40 to 100 bytes
    ]
    found = {(row["kernel"], row["arithmetic"], row["depth"]) for row in rows}
    for kind, deepest in SPILL_FREE.items():
        for direction in ("forward", "backward"):
            for arithmetic in ("half", "tf32"):
                assert (f"{kind}_{direction}", arithmetic, deepest) in found
    known = KNOWN_SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})
    allowed = [known.get((row["kernel"], row["arithmetic"], row["variant"]), 0) for row in rows]
    spilling = [row for row, most in zip(rows, allowed, strict=True) if row["spills"] > most]
    assert [f"{name(row)}: {row['spills']} bytes" for row in spilling] == []


@takes_minutes
def test_tensor_cores_multiply_where_they_should(compiled):
    for row in compiled:
        multiplies = operator(row) != "edge_readout" or row["depth"] > 0
        if row["arithmetic"] == "ieee":
            assert row["tensor_core"] == 0, name(row)
        elif row["arithmetic"] in ("half", "tf32"):
            assert (row["tensor_core"] > 0) == multiplies, name(row)


@takes_minutes
def test_deeper_histories_are_reported(compiled):
    for kind in ("graph_attention", "edge_readout"):
        for arithmetic in ("half", "tf32"):
            depths = {
                row["depth"]
                for row in compiled
                if operator(row) == kind and row["arithmetic"] == arithmetic and row["head"] == PAPER_HEAD
            }
            assert {1, 2, 3} <= depths


@takes_minutes
def test_every_depth_that_is_not_refused_fits_where_shared_memory_is_scarcest(compiled):
    found = {
        (operator(row), row["arithmetic"], row["head"], row["depth"])
        for row in compiled
        if row["architecture"] == 86 and row["shared"] <= SHARED_OF_RTX_3090 and not row["problem"]
    }
    for kind, (narrow, wide) in triton_kernels.DEEPEST.items():
        for arithmetic, size in (("half", 2), ("tf32", 4)):
            for head in (PAPER_HEAD, 256):
                row_bytes = launch.padded(head) * size
                depth = narrow if row_bytes <= triton_kernels.NARROW_ROW else wide
                assert (kind, arithmetic, head, depth) in found


TOO_LARGE = """
import json
from ecore_kernels import ahead_of_time
from ecore_kernels.triton_kernels import launch
constants = {"BLOCK": 64, "STEP": 32, "PIECE": 128}
launch.configuration = lambda *_: (constants, {"num_warps": 8, "num_stages": 2})
if __name__ == "__main__":
    entry = ahead_of_time.Entry("graph_attention_forward", "tf32", 100, 1, 86)
    both = [ahead_of_time.compile_entry(entry._replace(architecture=architecture)) for architecture in (86, 80)]
    print(json.dumps([ahead_of_time.record(one) for one in both]), ahead_of_time.table(both), sep="\\n")
"""


def test_a_block_too_large_for_shared_memory_is_reported(tmp_path):
    script = tmp_path / "too_large.py"
    script.write_text(TOO_LARGE)
    result = python(script)
    assert result.returncode == 0, result.stderr
    records, *table = result.stdout.splitlines()
    small, large = json.loads(records)
    assert small["shared"] == large["shared"] > SHARED_OF_RTX_3090
    assert small["problem"] == (
        f"needs {small['shared']:,} bytes of shared memory: sm_86 has {SHARED_OF_RTX_3090:,} a block"
    )
    assert small["blocks"] == 0
    assert (large["problem"], large["blocks"]) == ("", 1)
    assert small["problem"] in table[1]
    assert "!" not in table[2]


def test_what_does_not_compile_is_reported(monkeypatch):
    entry = ahead_of_time.Entry("graph_attention_forward", "half", PAPER_HEAD, 0, 86)

    def broken(_):
        raise RuntimeError("at 12:3\nno such operation")

    monkeypatch.setattr(ahead_of_time.compiler, "planned", broken)
    result = ahead_of_time.compile_entry(entry)
    assert result.problem == "does not compile: RuntimeError: no such operation"
    assert result.problem in ahead_of_time.table([result])


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "blocks", "limit"),
    [
        (86, 4, 238, 45_568, 2, "registers"),  # 8 warps of 7,680 registers
        (86, 4, 168, 29_184, 3, "registers"),  # 12 warps of 5,376
        (86, 4, 166, 36_992, 2, "shared memory"),  # 2 * (36,992 + 1,024) of 102,400 bytes
        (86, 4, 32, 33_500, 2, "shared memory"),  # the driver's 1,024 bytes count
        (86, 2, 182, 0, 4, "registers"),  # 11 warps of 5,888 would fit, of which 8 in four equal parts
        (86, 4, 32, 0, 12, "warps"),
        (86, 1, 32, 0, 16, "blocks"),
        (80, 4, 32, 0, 16, "warps"),
        (89, 1, 32, 0, 24, "blocks"),
        (90, 8, 128, 77_824, 2, "registers"),
        (90, 4, 64, 231_424, 1, "shared memory"),
        (86, 16, 255, 0, 0, "registers"),
    ],
)
def test_occupancy(architecture, warps, registers, shared, blocks, limit):
    assert ahead_of_time.occupancy(architecture, warps, registers, shared) == (blocks, limit)


def test_info_names_the_state_of_the_kernels(monkeypatch):
    (line,) = [line for line in info.report().splitlines() if line.startswith("triton kernels: ")]
    if triton_kernels.unavailable_reason():
        assert triton_kernels.unavailable_reason() in line
    else:
        assert line.startswith("triton kernels: run here")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda: "runs on CUDA GPUs: none is visible")
    assert "do not run here: runs on CUDA GPUs: none is visible; --compile" in info.report()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compile", "sm_75"], "info: --compile: expected sm_80, sm_86, sm_89, sm_90, got 'sm_75'"),
        (["--compile", "sm_86", "86"], "info: --compile: expected sm_80, sm_86, sm_89, sm_90, got '86'"),
        (["--compile", "sm_86", "--json", "missing/report.json"], "info: --json: missing: no such folder"),
        (["--json", "report.json"], "info: --json goes with --compile"),
    ],
)
def test_info_refuses_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_code:
        info.main(arguments)
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == said + "\n"


def test_info_says_that_triton_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit) as exit_code:
        info.main(["--compile", "sm_86"])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == "info: --compile needs Triton: pip install triton\n"
