"""The proof of an installation: right where all is right, and any fault of a backend has its row and the exit code."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ecore_kernels import backends, native, native_kernels, problems, triton_kernels, verify
from ecore_kernels.native_kernels import edge_readout, graph_attention
from ecore_kernels.native_kernels import otsu as native_otsu
from ecore_kernels.operators import registration

needs_native = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())
EVERY, BACKENDS = verify.CALLS, backends.BACKENDS
EDGE_CALLS = verify.EDGE_CALLS
FEW = (("graph_attention", "", 1), ("edge_readout", "", 1), ("edge_attention", "shared", 1))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small calls on the CPU, a few of them, without Triton's interpreter, which has a test of its own."""
    sizes = {"nodes": (17,), "batch": 2, "emotions": 4, "dim": 6}
    monkeypatch.setitem(verify.SIZES, "cpu", sizes)
    monkeypatch.setattr(verify.checks, "INTERPRETED_SIZES", sizes)
    monkeypatch.setattr(verify.checks, "CALLS", FEW)
    monkeypatch.setattr(verify.checks, "EDGE_CALLS", ())
    names = [name for name in backends.BACKENDS if name != "triton"]
    monkeypatch.setattr(backends, "BACKENDS", {name: backends.BACKENDS[name] for name in names})


def bad(rows):
    return {(row.operator, row.backend, row.precision) for row in rows if row.verdict in ("wrong", "failed")}


def test_every_call_is_right_on_this_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify.checks, "CALLS", EVERY)
    monkeypatch.setattr(verify.checks, "EDGE_CALLS", EDGE_CALLS)
    before = torch.get_float32_matmul_precision()
    assert verify.main(["--device", "cpu", "--out", str(tmp_path / "rows.json")]) == 0
    assert torch.get_float32_matmul_precision() == before
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["finished"]
    assert any(line.startswith("torch ") for line in record["installation"])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json"}
    right = [row for row in record["rows"] if row["verdict"] == "right"]
    ran = {(row["operator"], row["variant"], row["depth"], row["backend"]) for row in right}
    backends = ["reference"] + ["native"] * native.available()
    every = [*EVERY, *((*call, 0) for call in (*EDGE_CALLS, *verify.SEQUENCE_CALLS))]
    assert {(*call, backend) for call in every for backend in backends} <= ran
    assert all(row["same_bits"] for row in right)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("triton kernels: ") for line in printed)  # what is installed
    assert printed[-1].startswith(f"{len(right)} right, 0 wrong, 0 failed, ")


@pytest.mark.skipif(
    not triton_kernels.INTERPRETED or bool(triton_kernels.unavailable_reason()),
    reason="Triton's interpreter is not in use: TRITON_INTERPRET is not 1, or Triton is missing",
)
def test_triton_has_rows_under_its_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", BACKENDS)
    problem = problems.Problem("edge_readout", 17, batch=1, resolutions=1, emotions=4, dim=6)
    row = verify.make_row(verify.OperatorCheck(problem, "cpu"), "triton")
    assert (row.verdict, row.same_bits, row.reason) == ("right", True, "")


@needs_native
@pytest.mark.parametrize("module, part", [(graph_attention, "forward"), (graph_attention, "backward")])
@pytest.mark.parametrize("fault", ["one percent", "NaN", "one element"])
def test_a_wrong_number_is_found(monkeypatch, capsys, module, part, fault):
    right = getattr(module, part)

    def wrong(*arguments):
        right(*arguments)
        first = arguments[-1][0]
        if fault == "one percent":
            first.mul_(1.01)
        else:
            first[-1, 0, 3, 2] = math.nan if fault == "NaN" else first[-1, 0, 3, 2] + 0.01 * first.abs().max()

    monkeypatch.setattr(module, part, wrong)
    assert verify.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    named = lines[lines.index("Not right:") + 1 :]
    named = [line for line in named if "WRONG" in line]
    # float32 and float64, both masks; bfloat16 allows errors of a percent, and no NaN.
    count = 6 if fault == "NaN" else 4
    assert len(named) == count
    tensor = "output 0" if part == "forward" else "gradient of query"
    for line in named:
        assert line.startswith("graph_attention ")
        assert " native " in line
        if fault == "NaN":
            assert f"{tensor}: not finite" in line
        else:
            assert " times the error that is allowed" in line
            # A forward's output is read by its backward too: which tensor is worst is open.
            assert part == "forward" or tensor in line
    assert f"{count} wrong, 0 failed" in lines[-1]


@needs_native
def test_other_bits_the_second_time_are_found(monkeypatch):
    right, calls = edge_readout.forward, []

    def unsteady(*arguments):
        right(*arguments)
        first, _ = arguments[-1]
        calls.append(first)
        first.copy_(torch.nextafter(first, first + len(calls) % 2))

    monkeypatch.setattr(edge_readout, "forward", unsteady)
    rows = verify.run("cpu", lambda row: None)
    wrong = [row for row in rows if row.verdict == "wrong"]
    assert bad(rows) == {("edge_readout", "native", x) for x in ("ieee", "float64", "bfloat16")}
    assert all(row.same_bits is False and row.reason == "a second run gives other bits" for row in wrong)
    assert all(row.error <= row.allowed for row in wrong)


@needs_native
@pytest.mark.parametrize("call", EDGE_CALLS, ids=" ".join)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_number_of_any_graph_is_found(monkeypatch, call, direction):
    """In each result of each kernel."""
    module = registration.kernels("native", call[0])
    right, count = getattr(module, direction), 0
    check = verify.EdgeCheck(*call, "ieee", "cpu")
    assert verify.make_row(check, "native").verdict == "right"
    results = []

    def wrong(*arguments):
        right(*arguments)
        results[:] = [x for x in arguments[-1] if x is not None and x.numel()]
        results[count].mul_(1.01)

    monkeypatch.setattr(module, direction, wrong)
    verdicts = []
    while not results or count < len(results):
        verdicts.append(verify.make_row(check, "native").verdict)
        count += 1
    assert set(verdicts) == {"wrong"}, verdicts


@needs_native
def test_a_split_that_is_off_by_one_is_found(monkeypatch):
    right = native_otsu.otsu

    def wrong(values, most):
        mask, count, threshold = right(values, most)
        count[7] += 1
        return mask, count, threshold

    monkeypatch.setattr(native_otsu, "otsu", wrong)
    rows = verify.run("cpu", lambda row: None)
    assert bad(rows) == {("otsu", "native", "ieee"), ("otsu", "native", "float64")}


@needs_native
def test_an_exception_fails_its_row_alone(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise OSError("no space\nleft")

    monkeypatch.setattr(graph_attention, "backward", broken)
    path = tmp_path / "rows.json"
    assert verify.main(["--device", "cpu", "--out", str(path)]) == 1
    record = json.loads(path.read_text())
    failed = [row for row in record["rows"] if row["verdict"] == "failed"]
    assert {(row["operator"], row["backend"]) for row in failed} == {("graph_attention", "native")}
    assert {row["reason"] for row in failed} == {"OSError: no space left"}
    assert {row["operator"] for row in record["rows"] if row["verdict"] == "right"} >= {
        "edge_attention",
        "otsu",
    }


@needs_native
def test_a_lost_gpu_stops_it_in_one_line(monkeypatch, capsys, tmp_path):
    def lost(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(edge_readout, "forward", lost)
    path = tmp_path / "rows.json"
    assert verify.main(["--device", "cpu", "--out", str(path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "verify: stopped, for nothing runs on the GPU after this: RuntimeError: CUDA error: an illegal"
    )
    record = json.loads(path.read_text())
    assert not record["finished"]
    assert record["rows"][-1]["operator"] == "edge_readout"
    assert record["rows"][-1]["verdict"] == "failed"
    assert not any(row["operator"] == "edge_attention" for row in record["rows"])


def test_refusals_are_no_failures_and_come_once(monkeypatch, capsys):
    monkeypatch.setattr(verify.checks, "EDGE_CALLS", EDGE_CALLS[-2:])
    monkeypatch.setattr(native_kernels, "why_not", lambda *tensors: ["takes a holiday"])
    assert verify.main(["--device", "cpu"]) == 0
    refused = [line for line in capsys.readouterr().out.splitlines() if "refused: takes a holiday" in line]
    assert [line.split()[0] for line in refused] == [
        "linear_cross_entropy",
        "dropout_add_layer_norm",
        "varlen_attention",
        "graph_attention",
        "edge_readout",
        "edge_attention",
        "sparse_attention",
    ]


@pytest.mark.parametrize(
    "arguments, line",
    [
        pytest.param(
            ["--device", "cuda"],
            "verify: --device cuda: torch sees no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (
            ["--out", "/no/such/folder/rows.json"],
            "verify: --out: /no/such/folder/rows.json.partial: No such file",
        ),
        (["--device", "abacus"], "argument --device: invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, line, capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main(arguments)
    assert ended.value.code == 2
    assert line in capsys.readouterr().err


def test_tf32_that_is_cut_and_not_rounded_is_wrong():
    """Products on operands cut to tf32, against a plain operator's on rounded ones, as PyTorch's are on a GPU."""

    def product(bits):
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, a, b):
                ctx.save_for_backward(a, b)
                return torch.bmm(bits(a).flatten(0, 1), bits(b).flatten(0, 1)).unflatten(0, a.shape[:2])

            @staticmethod
            def backward(ctx, grad):
                a, b = ctx.saved_tensors
                return Product.apply(grad, b.mT), Product.apply(a.mT, grad)

        exact = torch.Tensor.__matmul__
        return lambda a, b: Product.apply(a, b) if a.dtype is torch.float32 else exact(a, b)

    def kept(x, add):
        return ((x.contiguous().view(torch.int32) + add) & ~0x1FFF).view(torch.float32)

    problem = problems.Problem("graph_attention", 77, batch=2, depth=2, masks="all", precision="tf32")
    check, verdicts = verify.OperatorCheck(problem, "cpu"), []
    with pytest.MonkeyPatch.context() as patch:
        rounded = product(lambda x: kept(x, 0x1000))
        patch.setattr(torch.Tensor, "__matmul__", rounded)
        row = check.row("reference")
        check.judge(row, check.run("reference"))
        verdicts.append(row.verdict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", product(lambda x: kept(x, 0)))
        row = check.row("reference")
        check.judge(row, check.run("reference"))
        verdicts.append(row.verdict)
    assert verdicts == ["right", "wrong"]


def test_processes_that_cannot_compile_hold_nothing_up(monkeypatch):
    """On a GPU kernels compile in other processes; here those find no GPU, or one process alone is left."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda: "")
    monkeypatch.setattr(verify.compilers, "WORKERS", 2)
    monkeypatch.setattr(verify.compilers, "WORKER_BYTES", 1)
    monkeypatch.setattr(verify.compilers.os, "sched_getaffinity", lambda _: {0, 1})
    kept = [problems.Problem("graph_attention", nodes, masks=m) for nodes in (40, 50) for m in problems.MASKS]
    checks = [verify.OperatorCheck(problem, "cuda") for problem in kept]
    compilers = verify.Compilers(checks, "cuda")
    try:
        assert len(set(map(id, compilers._jobs.values()))) == 1  # neither size nor masks are other kernels
        for check in checks:
            compilers.wait_for(check)
        (job,) = set(compilers._jobs.values())
        assert job.exception() is not None
    finally:
        compilers.close()
