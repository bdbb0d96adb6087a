"""Runs cases in a process of its own, for what crashes or hangs must not take the count with it.

``python -m tests.fuzz.worker SEED BACKEND...`` reads numbers of cases, one a line, and answers each with a line a
backend: "right", "refused", or what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ecore_kernels import triton_kernels
from tests.fuzz import cases, oracle
from tests.fuzz.cases import Case

INTERPRETED_MOST = 60  # nodes: Triton's interpreter takes seconds where a GPU takes microseconds


def run(case: Case, backend: str, threads: int) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        asked = oracle.asking(case, case.tensors)
        outputs = cases.call(case, asked, backend)
        if case.operator == "otsu":
            return dict(zip(("mask", "count", "threshold"), outputs, strict=True))
        return oracle.answer(case, asked, outputs, case.upstream)
    finally:
        torch.set_num_threads(before)


def wrong_otsu(case: Case, found: dict[str, Tensor]) -> str:
    """Describe a difference from the reference in float64 on the CPU: none is allowed."""
    wide = {"values": case.tensors["values"].double().cpu()}
    for (name, actual), exact in zip(found.items(), cases.call(case, wide, "reference"), strict=True):
        if not torch.equal(actual.cpu().double(), exact.double()):
            return f"{name} is not the float64 reference's"
    return ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN aside, which :meth:`oracle.Expected.wrong` finds."""
    return one.dtype == other.dtype and torch.equal(one, other)


def verdict(case: Case, backend: str, expected: oracle.Expected | None) -> str:
    """Return the verdict on a case on a backend."""
    nodes = case.tensors["query"].shape[2] if "query" in case.tensors else 0
    if case.operator == "sparse_attention":  # a program has one head of a node
        nodes = case.tensors["query"].shape[0] * case.tensors["query"].shape[1]
    if backend == "triton" and triton_kernels.INTERPRETED and nodes > INTERPRETED_MOST:
        return "refused"
    try:
        found = run(case, backend, case.threads[0])
    except RuntimeError as error:
        if "cannot run this call" in str(error):
            return "refused"
        return f"raised {type(error).__name__}: {error}"
    except Exception as error:  # a finding like any other
        return f"raised {type(error).__name__}: {error}"
    wrong = wrong_otsu(case, found) if expected is None else expected.wrong(found)
    if wrong:
        return wrong
    if backend != "reference":  # plain PyTorch's sums may depend on where a tensor lies
        again = run(case, backend, case.threads[1])
        differing = [name for name, x in found.items() if not same_bits(x, again[name])]
        differing = [x for x in differing if x.removeprefix("gradient of ") not in cases.broadcast(case)]
        if differing:
            return f"{differing[0]}: other bits in a second run, on {case.threads[1]} threads for {case.threads[0]}"
    return "right"


def examine(seed: int, index: int, backends: Sequence[str]) -> Iterator[str]:
    """The verdicts on a case, backend by backend."""
    drawn = {"cpu": cases.draw(seed, index)}
    expected = None if drawn["cpu"].operator == "otsu" else oracle.Expected(drawn["cpu"])
    for backend in backends:
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        case = drawn[device] if device in drawn else cases.draw(seed, index, device)
        # Memory that an operator allocates holds NaN: what it forgets to write is seen.
        torch.use_deterministic_algorithms(device == "cpu")
        found = verdict(case, backend, expected)
        yield found if found in ("right", "refused") else f"{found}; {case}"


def main() -> None:
    seed, *backends = sys.argv[1:]
    torch.set_num_threads(1)
    for line in sys.stdin:
        for found in examine(int(seed), int(line), backends):
            print(" ".join(found.split()), flush=True)


if __name__ == "__main__":
    main()
