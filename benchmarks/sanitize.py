"""Every GPU kernel once, forward and backward, on small inputs: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: PyTorch's cache of memory would hide what lies beyond a tensor's end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.operators import candidates, problems
from benchmarks.operators.problems import Problem
from ecore_kernels import otsu
from ecore_kernels.native_kernels import otsu as native_otsu

SMALL = Problem("", 77, batch=2, resolutions=2, emotions=7)
CASES = (
    ("graph_attention", 1),
    ("edge_readout", 2),
    ("edge_attention", 1),
    ("graph_attention", 0),
    ("edge_attention", 0),
)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__).parse_args(argv)
    if not torch.cuda.is_available():
        print("sanitize: there is no CUDA device", file=sys.stderr)
        sys.exit(2)
    for precision in problems.PRECISIONS:
        problems.set_precision(precision)
        for operator, depth in CASES:
            for masks in problems.MASKS:
                problem = dataclasses.replace(
                    SMALL, operator=operator, depth=depth, masks=masks, precision=precision
                )
                tensors = problems.draw(problem, 0, "cuda")
                candidate = candidates.build("fused", problem, "cuda", backward=True)
                sent = problems.upstream(tensors)
                candidates.outputs_and_gradients(candidate, tensors, sent, backward=True)
            torch.cuda.synchronize()
            print(f"{operator}, depth {depth}, {precision}", flush=True)
    values = torch.randn(37, 32, device="cuda")
    if native_otsu.why_not(values):
        harness.fail_for({"otsu": str(native_otsu.why_not(values))})
    else:
        otsu(values, backend="native")
        torch.cuda.synchronize()
        print("otsu")


if __name__ == "__main__":
    main()
