"""The whole training step as CUDA graphs, one for each shape of batch: one launch instead of some thousands.

A graph repeats the launches of the step it was recorded from, on the same addresses: what differs from step to step has
to lie in tensors that stay where they are. These are weights and optimiser state, the samples' numbers, from which the
graph gathers its batch itself, and the learning rate. Gradients need not last: they come and go inside of the graph.
Random numbers go on as in other steps, because torch hands each replay the generator's state. Nothing in the step may
look at a tensor's value on the host.

A shape whose step cannot be recorded is launched kernel by kernel for the rest of the run.

So that there are few shapes, batches are padded to :func:`widened` sizes; padding changes no loss and no gradient.
EmpatheticDialogues in batches of 16 then has about 75 in 26,000 steps. Steps that are logged have values of health and
recordings of their own: the others do without their kernels.
"""

from __future__ import annotations

import ctypes
import gc
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from ecore.config import TrainingConfig
from ecore.data.batches import Batch, ResidentSplit, Widths
from ecore.errors import InputError

LEAST_CONTEXT, LEAST_RESPONSE, LEAST_TOKENS = 16, 64, 64
"""Least padded sizes of contexts, of responses, and of the words of a batch's responses.

Padding of contexts goes through encoder and graph, and that of all words through the decoder. Responses' own is only
attended over, the least of a step's work: they are wide, for the sake of few shapes.
"""


class Taken(NamedTuple):
    """Results of a step: its sums, and the values of health by name; on the device."""

    sums: Tensor
    health: dict[str, Tensor]


Work = Callable[[], Taken]


class CaptureFailed(RuntimeError):
    """Some work cannot be recorded; it was not done, and everything but the host's own objects is as before it."""


class Recorder(Protocol):
    """A recorder of work that can be replayed."""

    def warm_up(self, work: Work) -> Taken:
        """Do ``work`` once, so that no library has to set itself up, and no kernel to be compiled, in a recording."""

    def record(self, work: Work) -> Work:
        """Record ``work`` without doing it. What the result does overwrites what it gave before.

        Raises:
            CaptureFailed: it cannot be recorded.
        """


class CudaGraphs:
    """Records CUDA graphs on one stream and in one pool of memory.

    They may share the pool because they run one after the other, and what one leaves is copied before the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # They keep the pool open: it may not be used again once no graph is left that refers to it.
        self._failed: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, work: Work) -> Taken:
        """On the stream of the recordings, for which cuBLAS has a workspace of its own."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            taken = work()
        present.wait_stream(self._stream)
        return taken

    def record(self, work: Work) -> Work:
        """Capture ``work``; a call of the result queues it.

        Raises:
            CaptureFailed: a call in it cannot be captured, or there is no memory for the graph.
            RuntimeError: the device is lost: nothing more runs on it.
        """
        graph, present = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        failure: str | None = None
        try:
            with warnings.catch_warnings(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    taken = work()
                except Exception as error:
                    failure = _reason(error)
                if failure is None and _is_invalid(self._stream):
                    failure = "a call on another thread or stream invalidated the capture"
                if failure is not None:
                    warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                    _capture_anew(self._stream)
        except Exception as error:
            if failure is not None:  # not even an empty capture ends: nobody knows what still works
                raise
            failure = _reason(error)
        if failure is not None:
            # Where torch could not end the capture, it has not left its stream either.
            torch.cuda.set_stream(present)
            # Nodes of the autograd graph that outlive the capture would run on its stream.
            gc.collect()
            self._failed.append(graph)
            torch.cuda.synchronize(self._device)  # raises where not the capture has failed, but the device
            raise CaptureFailed(failure)

        def replay() -> Taken:
            graph.replay()
            return taken

        return replay


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first; the tensors that tracebacks hold are let go."""
    earlier: BaseException | None = error
    while earlier is not None:
        error = earlier
        traceback.clear_frames(error.__traceback__)
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_invalid(stream: torch.cuda.Stream) -> bool:
    """Return whether the capture on ``stream`` has failed, which torch would only notice at its end."""
    status = ctypes.c_int()
    _driver().cuStreamIsCapturing(ctypes.c_void_p(stream.cuda_stream), ctypes.byref(status))
    return status.value == 2  # CU_STREAM_CAPTURE_STATUS_INVALIDATED


def _capture_anew(stream: torch.cuda.Stream) -> None:
    """Put an empty capture in the place of one that has failed, for torch to end.

    At least until 2.13 torch does not clean up where the capture's end is an error: the allocator takes the capture for
    one that is under way and refuses the next, and random numbers outside of one (until 2.11) raise.
    """
    driver, handle, begun = _driver(), ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p()
    driver.cuStreamEndCapture(handle, ctypes.byref(begun))  # its error is the one that is known
    if begun:
        driver.cuGraphDestroy(begun)
    code = driver.cuStreamBeginCapture_v2(
        handle, 0
    )  # CU_STREAM_CAPTURE_MODE_GLOBAL, as torch.cuda.graph has it
    if code:
        raise RuntimeError(f"CUDA driver error {code}: no capture can begin after one that has failed")


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def recorder(
    config: TrainingConfig, backbone: str | None, device: torch.device, processes: int, resumed: bool
) -> Recorder | None:
    """Return the recorder of a training's steps; None where each step launches its kernels one by one.

    That is so without ``cuda_graphs``, and also where a run that was started with them continues without a GPU or in
    several processes: they change no number that matters.

    Raises:
        InputError: a new run wants graphs where there can be none.
    """
    if not config.cuda_graphs:
        return None
    for refused, why in (
        (device.type != "cuda", f"expected a GPU, this is {device.type}"),
        (processes > 1, f"expected one process, these are {processes}"),
        (backbone is not None, "not with --backbone, whose batches are not on the GPU"),
    ):
        if refused and resumed:
            return None
        if refused:
            raise InputError(f"--cuda-graphs: {why}")
    return CudaGraphs(device)


def widened(size: int, least: int, parts: int = 4) -> int:
    """``size`` rounded up to a multiple of ``least``, or of 1 / ``parts`` of the next power of two if that is more."""
    step = max(least, (1 << (size - 1).bit_length()) // parts)
    return -(-size // step) * step


class _Shape(NamedTuple):
    """Shape of the steps that one graph serves.

    ``tokens``: bound on the words of the responses; ``health``: the step has values of health.
    """

    widths: Widths
    tokens: int
    health: bool


class CapturedStep:
    """Training steps on the batches of a split, recorded where a shape comes for the second time.

    The first time a step of the shape goes as it would without a recording, which warms up. So does a batch of other
    than ``batch_size`` samples, the last one of an epoch.

    Args:
        split: where the samples are.
        batch_size: of the batches that are recorded.
        step: takes a step on a batch, whose responses have at most so many words, with values of health or without.
            It leaves no gradients behind, and nothing of its autograd graph: nodes that accumulate a parameter's
            gradient would run on their old stream.
        optimizer: what ``step`` uses; its learning rate becomes a tensor, to be set by
            :func:`ecore.training.schedule.set_rate`.
        recorder: makes the recordings.
        notice: gets a line for each shape that cannot be recorded.

    Attributes:
        failures: why they cannot, a line for each.
    """

    def __init__(
        self,
        split: ResidentSplit,
        batch_size: int,
        step: Callable[[Batch, int, bool], Taken],
        optimizer: Optimizer,
        recorder: Recorder,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._notice = notice
        self.failures: list[str] = []
        self._split, self._step, self._optimizer, self._recorder = split, step, optimizer, recorder
        self._rows = split.send(np.zeros(batch_size, dtype=np.int64))
        self._replays: dict[_Shape, Work | None] = {}
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=self._rows.device)

    @property
    def recorded(self) -> int:
        """Shapes that have a recording."""
        return sum(replay is not None for replay in self._replays.values()) - len(self.failures)

    @property
    def shapes(self) -> int:
        """Shapes that have come so far."""
        return len(self._replays)

    def __call__(self, indices: npt.NDArray[np.int64], health: bool = False) -> Taken:
        """Take a step on the samples of ``indices``; the next call may overwrite the values of health."""
        shape, rows = self._shape(indices, health), self._split.send(indices)
        if len(rows) != len(self._rows):
            return self._step(self._split.gather(rows, shape.widths), shape.tokens, health)
        self._rows.copy_(rows)

        def work() -> Taken:
            return self._step(self._split.gather(self._rows, shape.widths), shape.tokens, health)

        if shape not in self._replays:
            self._replays[shape] = None
            taken = self._recorder.warm_up(work)
        else:
            replay = self._replays[shape]
            if replay is None:
                replay = self._replays[shape] = self._record(shape, work)
            taken = replay()
        return taken._replace(sums=taken.sums.clone())

    def _shape(self, indices: npt.NDArray[np.int64], health: bool) -> _Shape:
        context, response, _ = self._split.widths(indices)
        widths = Widths(
            widened(context, LEAST_CONTEXT), widened(response, LEAST_RESPONSE), self._split.concepts
        )
        # The decoder adds a row to the words (ecore.model.packing): with it their number is a round one.
        rows = widened(self._split.tokens(indices) + 1, LEAST_TOKENS, parts=8)
        return _Shape(widths, min(rows - 1, len(indices) * widths.response), health)

    def _record(self, shape: _Shape, work: Work) -> Work:
        """A recording of ``work``, or ``work`` itself where there can be none."""
        # Adam wants this said where it is captured, and warns of it elsewhere; the fused one heeds it in nothing else.
        groups = self._optimizer.param_groups
        before = [group["capturable"] for group in groups]
        for group in groups:
            group["capturable"] = True
        try:
            return self._recorder.record(work)
        except CaptureFailed as error:
            self._optimizer.zero_grad(set_to_none=True)  # none of what backward has left was ever computed
            widths = shape.widths
            line = (
                f"CUDA graphs: batches of up to {widths.context} words of context, {widths.response} of a response "
                f"and {shape.tokens} of all responses go one launch at a time; recording failed: {error}"
            )
            self.failures.append(line)
            self._notice(line)
            return work
        finally:
            for group, capturable in zip(groups, before, strict=True):
                group["capturable"] = capturable
