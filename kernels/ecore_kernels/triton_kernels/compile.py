"""Compile the kernels ahead of time, for GPUs that need not be there, and report what the compiler made of them.

The launchers themselves say what is launched: they run on ``meta`` tensors, and what they plan is compiled. Triton's
compiler is not made for threads, so every processor gets a process; none of them sees TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecore_kernels.triton_kernels import DEEPEST, NARROW_ROW, launch
from ecore_kernels.triton_kernels.launch import Launch


class Multiprocessor(NamedTuple):
    """What one multiprocessor (SM) of an architecture holds: CUDA C++ Programming Guide, technical specifications."""

    shared: int  # bytes
    warps: int
    blocks: int
    registers: int = 65_536

    @property
    def shared_per_block(self) -> int:
        """Bytes that one thread block may use: the driver keeps some for itself in every block."""
        return self.shared - RESERVED_SHARED


RESERVED_SHARED = 1024  # bytes a block
SHARED_UNIT = 128  # bytes that shared memory is handed out in
REGISTER_UNIT = 256  # registers that a warp gets at a time
WARP_UNIT = 4  # an SM's registers lie in four equal parts, and a warp in one of them

ARCHITECTURES = {
    80: Multiprocessor(shared=164 * 1024, warps=64, blocks=32),
    86: Multiprocessor(shared=100 * 1024, warps=48, blocks=16),
    89: Multiprocessor(shared=100 * 1024, warps=48, blocks=24),
    90: Multiprocessor(shared=228 * 1024, warps=64, blocks=32),
}

PAPER_HEAD = 100  # padded to 128: what an entry for heads of 128 is compiled for
PAPER_DEPTH = 1  # layers of history of the paper's last attention
SCARCEST = 86  # has the least shared memory, and by it histories are refused
_TYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32, "float64": torch.float64}
_SIZES = {"batch": 2, "resolutions": 3, "words": 128, "emotions": 32}  # vary at run time: any will do
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Entry(NamedTuple):
    """One kernel as an architecture runs it at one head size and depth of history."""

    kernel: str  # as in the launch table: "graph_attention_forward"
    arithmetic: str
    head: int
    depth: int
    architecture: int
    # "shared edge": edges that broadcast over batch and resolutions, with their gradient; "words": no others receive;
    # "delta": what runs before a backward in ieee and float64, with its launch configuration
    variant: str = ""

    @property
    def operator(self) -> str:
        return self.kernel.rpartition("_")[0]

    @property
    def direction(self) -> str:
        return self.kernel.rpartition("_")[2]


class Compiled(NamedTuple):
    """What the compiler made of an entry; of one that it could not compile only ``error``."""

    entry: Entry
    constants: dict[str, int] = {}  # noqa: RUF012 (never changed)
    warps: int = 0
    stages: int = 0
    registers: int = 0  # a thread
    shared: int = 0  # bytes a block
    spills: int = 0  # bytes a thread, stores and loads
    tensor_core: int = 0  # instructions of tensor cores in the code
    blocks: int = 0  # on one SM at a time
    limit: str = ""  # what keeps those from being more
    seconds: float = 0.0
    error: str = ""

    @property
    def problem(self) -> str:
        """Why a GPU of the architecture cannot run it; empty if it can."""
        if self.error:
            return f"does not compile: {self.error}"
        largest = ARCHITECTURES[self.entry.architecture].shared_per_block
        if self.shared > largest:
            return f"needs {self.shared:,} bytes of shared memory: sm_{self.entry.architecture} has {largest:,} a block"
        return "" if self.blocks else "one block needs more registers or warps than an SM has"


# What is compiled -----------------------------------------------------------------------------------------------


def entries(architecture: int) -> list[Entry]:
    """All that the launch table holds for an architecture.

    Every entry is there at its own head size and depth (100 standing for 128). In half and tf32 the paper's head size
    is there at up to three layers of history, so with the entry that a call of that depth is given; for sm_86 also
    with words alone receiving, and both head sizes at the greatest depth that is not refused. float64 and ieee stay at
    their own depths: they are for checking, and take the compiler longest.
    """
    found: dict[Entry, None] = {}
    for (kernel, arithmetic), rows in launch.table().items():
        operator = kernel.rpartition("_")[0]
        wanted = {(row["head"], row["depth"]) for row in rows if row["architecture"] <= architecture}
        if arithmetic in ("half", "tf32"):
            wanted |= {(128, depth) for depth in range(min(3, _deepest(operator, arithmetic, 128)) + 1)}
            if architecture == SCARCEST:
                wanted |= {(head, _deepest(operator, arithmetic, head)) for head in (128, 256)}
        for head, depth in sorted(wanted):
            if operator == "edge_readout" and arithmetic == "half":
                depth = max(depth, 1)  # without history there is nothing of that type
            entry = Entry(kernel, arithmetic, PAPER_HEAD if head == 128 else head, depth, architecture)
            found[entry] = None
            if (
                operator != "edge_readout"
                and entry.direction == "backward"
                and arithmetic in ("ieee", "float64")
            ):
                found[entry._replace(variant="delta")] = None
            if kernel == "edge_attention_backward" and entry.head == PAPER_HEAD:
                found[entry._replace(variant="shared edge")] = None
            is_the_papers = (operator, entry.head, depth) == ("graph_attention", PAPER_HEAD, PAPER_DEPTH)
            if is_the_papers and architecture == SCARCEST:
                found[entry._replace(variant="words")] = None
    return list(found)


def _deepest(operator: str, arithmetic: str, head: int) -> int:
    """The most layers of history that the operator takes; the dense one has none."""
    narrow, wide = DEEPEST.get(operator, (0, 0))
    return narrow if head * _TYPES[arithmetic].itemsize <= NARROW_ROW else wide


def _graph_attention(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    from ecore_kernels.triton_kernels import graph_attention

    batch, resolutions, words, emotions = _SIZES.values()
    mask = torch.empty(batch, resolutions, words, dtype=torch.bool, device="meta")
    word_weight, emotion_weight = number(batch, words), number(batch, emotions)
    correlation = number(emotions, emotions)
    history = [rows() for _ in range(entry.depth)], [rows() for _ in range(entry.depth)]
    row_factor = number(batch, resolutions, words + emotions) if entry.depth else None
    query, key, value = rows(), rows(), rows()
    precision, words_only = launch.dot_precision(entry.arithmetic), entry.variant == "words"
    output, saved = graph_attention.forward(
        query, key, value, word_weight, mask, emotion_weight, correlation, None, *history, row_factor, scale,
        words_only, precision,
    )  # fmt: skip
    graph_attention.backward(
        output, query, key, value, mask, correlation, None, *history, row_factor, output, saved, scale, words_only,
        needs=[True] * (3 + 2 * entry.depth) + [entry.depth > 0, True, True], precision=precision,
    )  # fmt: skip


def _edge_readout(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    from ecore_kernels.triton_kernels import edge_readout

    batch, resolutions, words, emotions = _SIZES.values()
    mask = torch.empty(batch, resolutions, words, dtype=torch.bool, device="meta")
    history = [rows() for _ in range(entry.depth)], [rows() for _ in range(entry.depth)]
    row_factor = number(batch, resolutions, words + emotions) if entry.depth else None
    graph = (mask, number(batch, emotions), number(emotions, emotions), None)
    precision = launch.dot_precision(entry.arithmetic)
    to_word, to_emotion = edge_readout.forward(*graph, *history, row_factor, scale, False, precision)
    needs = [True] * (2 * entry.depth) + [entry.depth > 0, True, True]
    edge_readout.backward(to_word, to_emotion, *graph, *history, row_factor, scale, False, needs, precision)


def _edge_attention(
    entry: Entry, scale: float, rows: Callable[[], Tensor], number: Callable[..., Tensor]
) -> None:
    from ecore_kernels.triton_kernels import edge_attention

    batch, resolutions, words, emotions = _SIZES.values()
    nodes = words + emotions
    edge = number(*((1, 1) if entry.variant == "shared edge" else (batch, resolutions)), nodes, nodes)
    neighbors = torch.empty(batch, resolutions, nodes, nodes, dtype=torch.bool, device="meta")
    factor = number(batch, resolutions, nodes)
    inputs = rows(), rows(), rows(), edge, neighbors, factor
    precision = launch.dot_precision(entry.arithmetic)
    output, new_edge, saved = edge_attention.forward(*inputs, scale, precision)
    edge_attention.backward(output, new_edge, *inputs, output, saved, scale, [True] * 5, precision)


_OPERATORS = {
    "graph_attention": _graph_attention,
    "edge_readout": _edge_readout,
    "edge_attention": _edge_attention,
}


def planned(entry: Entry, scale: float = 0.1) -> Launch:
    """The launch that the operator's own launcher makes for this entry, with every gradient asked for."""
    batch, resolutions, words, emotions = _SIZES.values()
    dtype = _TYPES[entry.arithmetic]
    accumulated = torch.float64 if dtype is torch.float64 else torch.float32

    def rows() -> Tensor:  # [B, K, N, d], the heads side by side
        shape = batch, words + emotions, resolutions, entry.head
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    def number(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=accumulated, device="meta")

    with launch.plan(entry.architecture) as launches:
        _OPERATORS[entry.operator](entry, scale, rows, number)
    if entry.variant == "delta":
        return launches[1]
    return launches[0] if entry.direction == "forward" else launches[-1]


# Compiling ------------------------------------------------------------------------------------------------------


def _type_of(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_type_of, argument))
    return _POINTERS[argument.dtype] if isinstance(argument, Tensor) else "i32"


def source_of(launched: Launch) -> ASTSource:
    """A launch as its compiler wants it: types, constants, and which addresses are multiples of 16, as torch's are."""
    parameters = {parameter.name: parameter for parameter in launched.kernel.params}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(launched.kernel.arg_names):
        argument = launched.arguments[name]
        if parameters[name].is_constexpr or argument is None:
            signature[name] = "constexpr"
            constants[name] = argument
            continue
        signature[name] = parameters[name].annotation_type or _type_of(argument)
        if isinstance(argument, Tensor):
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, tuple):
            attributes.update({(index, inner): [["tt.divisibility", 16]] for inner in range(len(argument))})
        elif not parameters[name].do_not_specialize:
            raise ValueError(
                f"{launched.kernel.__name__}: {name} varies, but would be compiled anew for some values"
            )
    return ASTSource(launched.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _assembler_report(ptx: str, architecture: int) -> str:
    """What ``ptxas -v`` says, for the versions of Triton that do not hand it on."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        suffix = "a" if architecture >= 90 else ""
        command: list[str | Path] = [
            ptxas,
            "-v",
            f"--gpu-name=sm_{architecture}{suffix}",
            source,
            "-o",
            Path(folder, "kernel.cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def compile_launch(launched: Launch, entry: Entry) -> Compiled:
    """Compile a launch for an entry's architecture. Raises whatever the compiler raises."""
    began = time.perf_counter()
    target = GPUTarget("cuda", entry.architecture, 32)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        made = triton.compile(source_of(launched), target=target, options=launched.options)
    ptx = made.asm["ptx"]
    said = report.getvalue()
    if "registers" not in said:
        said = _assembler_report(ptx, entry.architecture)
    used = re.search(r"Used (\d+) registers", said)
    if used is None:
        raise ValueError(f"the assembler does not say how many registers are used: {said[:200]!r}")
    registers = int(used[1])
    warps = launched.options["num_warps"]
    blocks, limit = occupancy(entry.architecture, warps, registers, made.metadata.shared)
    row = launch.table()[entry.kernel, entry.arithmetic][0]
    return Compiled(
        entry,
        constants={name: launched.arguments[name] for name in row["constants"] if name in launched.arguments},
        warps=warps,
        stages=launched.options["num_stages"],
        registers=registers,
        shared=made.metadata.shared,
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
        blocks=blocks,
        limit=limit,
        seconds=time.perf_counter() - began,
    )


def occupancy(architecture: int, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """How many thread blocks an SM holds at a time, and what keeps them from being more.

    Args:
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
    """
    sm = ARCHITECTURES[architecture]
    if shared > sm.shared_per_block:
        return 0, "shared memory"
    of_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = sm.registers // of_warp // WARP_UNIT * WARP_UNIT
    of_block = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared // of_block,
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def compile_entry(entry: Entry) -> Compiled:
    """Plan and compile an entry; what goes wrong is in the result."""
    try:
        return compile_launch(planned(entry), entry)
    except Exception as error:  # the compiler raises whatever it likes
        while error.__cause__ is not None:  # the message of the innermost says what, the others where
            error = error.__cause__
        lines = str(error).strip().splitlines() or [""]
        return Compiled(entry, error=f"{type(error).__name__}: {lines[-1]}"[:300])


@contextlib.contextmanager
def _compilers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile without interpreter, without line numbers (40 % of the time), and leave nothing behind."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.update(
            # A cache of its own: from another run's, the assembler would not report anything.
            TRITON_CACHE_DIR=folder,
            TRITON_DUMP_PTXAS_LOG="1",
            TRITON_DISABLE_LINE_INFO="1",
            OMP_NUM_THREADS="1",
        )
        try:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                yield pool
        finally:
            os.environ.clear()
            os.environ.update(before)


def compile_all(
    wanted: Sequence[Entry],
    processes: int | None = None,
    progress: Callable[[Compiled], None] = lambda _: None,
) -> list[Compiled]:
    """Compile entries in parallel, in the order given.

    Args:
        processes: how many at a time; None for one a processor.
        progress: called with every result as it comes.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(wanted)) or 1
    # The longest first, so that no process is left alone with one at the end.
    kinds = ("half", "tf32", "ieee", "float64")
    queue = sorted(
        wanted, key=lambda e: (e.direction != "backward", -kinds.index(e.arithmetic), -e.depth, -e.head)
    )
    done: dict[Entry, Compiled] = {}

    def collect(jobs: dict[Future[Compiled], Entry]) -> None:
        for job in as_completed(jobs):
            with contextlib.suppress(BrokenProcessPool):
                done[jobs[job]] = job.result()
                progress(done[jobs[job]])

    with _compilers(processes) as pool:
        collect({pool.submit(compile_entry, entry): entry for entry in queue})
    for entry in queue:
        # A process died, by a failed assertion in the compiler or for want of memory: who was it?
        if entry not in done:
            with _compilers(1) as pool:
                collect({pool.submit(compile_entry, entry): entry})
        if entry not in done:
            done[entry] = Compiled(entry, error="the compiler's process died")
            progress(done[entry])
    return [done[entry] for entry in wanted]


# The report -----------------------------------------------------------------------------------------------------


def record(compiled: Compiled) -> dict[str, Any]:
    """A result as plain data, for JSON."""
    fields = compiled._asdict()
    del fields["entry"], fields["error"]
    return {
        **compiled.entry._asdict(),
        **fields,
        "warps_per_sm": compiled.blocks * compiled.warps,
        "problem": compiled.problem,
    }


def table(results: Sequence[Compiled]) -> str:
    """Results as aligned text, a line each."""
    head = [
        "kernel", "arithmetic", "d", "depth", "tile", "warps", "stages", "registers", "shared", "spills", "tensor core",
        "blocks/SM", "warps/SM", "limited by",
    ]  # fmt: skip
    lines = [head]
    for r in results:
        name = r.entry.kernel + (f" ({r.entry.variant})" if r.entry.variant else "")
        line = [name, r.entry.arithmetic, str(r.entry.head), str(r.entry.depth)]
        if not r.error:
            tile = " ".join(f"{name}={int(value)}" for name, value in r.constants.items())
            numbers = (
                r.warps,
                r.stages,
                r.registers,
                f"{r.shared:,}",
                r.spills,
                r.tensor_core,
                r.blocks,
                r.blocks * r.warps,
            )
            line += [tile, *map(str, numbers), r.limit]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(head))]
    left = {0, 1, 4, len(head) - 1}
    rows = []
    for line, result in zip(lines, [None, *results], strict=True):
        cells = [
            x.ljust(w) if i in left else x.rjust(w)
            for i, (x, w) in enumerate(zip(line, widths, strict=False))
        ]
        text = "  ".join(cells).rstrip()
        rows.append(text + (f"  ! {result.problem}" if result and result.problem else ""))
    return "\n".join(rows)
