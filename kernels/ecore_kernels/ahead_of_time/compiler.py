"""Triton's compiler, run on entries for GPUs that need not be present.

The compiler is not thread-safe, so there is one process for each processor, all without TRITON_INTERPRET.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecore_kernels.ahead_of_time.architectures import ARCHITECTURES, occupancy
from ecore_kernels.ahead_of_time.table_entries import Entry, planned
from ecore_kernels.triton_kernels import launch
from ecore_kernels.triton_kernels.launch import Launch

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Compiled(NamedTuple):
    """Result of compiling an entry; if it does not compile, only ``error`` is set."""

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
        """The reason why a GPU of the architecture cannot run it; empty if it can."""
        if self.error:
            return f"does not compile: {self.error}"
        largest = ARCHITECTURES[self.entry.architecture].shared_per_block
        if self.shared > largest:
            return f"needs {self.shared:,} bytes of shared memory: sm_{self.entry.architecture} has {largest:,} a block"
        return "" if self.blocks else "one block needs more registers or warps than an SM has"


def _type_of(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_type_of, argument))
    return _POINTERS[argument.dtype] if isinstance(argument, Tensor) else "i32"


def source_of(launched: Launch) -> ASTSource:
    """A launch as the compiler takes it: types, constants, and which addresses are multiples of 16, as torch's are."""
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


def _assembler_report(ptx: str, architecture: int, options: Mapping[str, Any]) -> str:
    """Return the output of ``ptxas -v``, for versions of Triton that do not pass it on.

    Args:
        options: those of the launch; ``enable_fp_fusion``: whether a product and a sum may become one instruction.
    """
    programs = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        suffix = "a" if architecture >= 90 else ""
        arguments: list[str | Path] = [
            "-v",
            *([] if options.get("enable_fp_fusion", True) else ["--fmad=false"]),
            f"--gpu-name=sm_{architecture}{suffix}",
            source,
            "-o",
            Path(folder, "kernel.cubin"),
        ]
        refusal = f"none in {programs}"
        # Triton 3.9 writes PTX for sm_90 that only the second of its assemblers knows.
        for name in ("ptxas", "ptxas-blackwell"):
            if (programs / name).exists():
                result = subprocess.run([programs / name, *arguments], capture_output=True, text=True)
                if result.returncode == 0:
                    return result.stderr
                refusal = result.stderr[:200]
    raise ValueError(f"no assembler takes the PTX: {refusal}")


def compile_launch(launched: Launch, entry: Entry) -> Compiled:
    """Compile a launch for an entry's architecture. Exceptions of the compiler are not caught."""
    began = time.perf_counter()
    target = GPUTarget("cuda", entry.architecture, 32)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        made = triton.compile(source_of(launched), target=target, options=launched.options)
    ptx = made.asm["ptx"]
    said = report.getvalue()
    if "registers" not in said:
        said = _assembler_report(ptx, entry.architecture, launched.options)
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


def compile_entry(entry: Entry) -> Compiled:
    """Plan and compile an entry; errors are in the result."""
    try:
        return compile_launch(planned(entry), entry)
    except Exception as error:  # of any type: the compiler has no common one
        innermost: BaseException = error  # its message says what, the others say where
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        lines = str(innermost).strip().splitlines() or [""]
        return Compiled(entry, error=f"{type(innermost).__name__}: {lines[-1]}"[:300])


@contextlib.contextmanager
def _compilers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile without interpreter and line numbers (40 % of the time), and leave no files."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.update(
            # A fresh cache: for kernels in another run's cache the assembler would not report anything.
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
        processes: how many at a time; None for one per processor.
        progress: called with every result as it comes.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(wanted)) or 1
    # The longest first, so that no process works alone on one at the end.
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
        # A process died, of a failed assertion in the compiler or for lack of memory: find the entry.
        if entry not in done:
            with _compilers(1) as pool:
                collect({pool.submit(compile_entry, entry): entry})
        if entry not in done:
            done[entry] = Compiled(entry, error="the compiler's process died")
            progress(done[entry])
    return [done[entry] for entry in wanted]
