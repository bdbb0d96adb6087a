"""Captured steps: the same losses and weights as one launch at a time, from stand-ins for CUDA graphs."""

import contextlib
import functools
import os
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from ecore.config import TrainingConfig
from ecore.data.batches import Batch, Widths
from ecore.data.vocabulary import PAD
from ecore.errors import InputError
from ecore.files import read_json, write_json
from ecore.model import ECore
from ecore.training import cuda_graphs
from ecore.training.cuda_graphs import CapturedStep, CaptureFailed, CudaGraphs, Taken, recorder, widened
from ecore.training.journal import read_metrics
from ecore.training.schedule import adam, noam, set_rate
from ecore.training.trainer import NotFinite, Trainer, train
from ecore_kernels import use_backend
from tests.ecore.training.recordings import SLOW, Again, Repeater, assert_close, resident, still
from tests.ecore.training.runs import weights

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


@pytest.fixture
def coarse(monkeypatch):
    """One shape in a corpus of short texts."""
    monkeypatch.setattr(cuda_graphs, "LEAST_CONTEXT", 32)
    monkeypatch.setattr(cuda_graphs, "LEAST_TOKENS", 128)


def assert_same(run, other, numbers):
    assert numbers(run) == numbers(other)
    ours, theirs = weights(run), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Padding to few shapes


def test_sizes_are_widened_to_few():
    for least in (32, 128):
        sizes = [widened(n, least) for n in range(1, 600)]
        assert all(
            n <= size < max(n + least, 1.5 * n) and size % least == 0 for n, size in enumerate(sizes, 1)
        )
        assert sizes == sorted(sizes)
    few = [32, 64, 96, 128, 192, 256, 384, 512, 768]
    assert sorted({widened(n, 32) for n in range(1, 520)}) == few
    assert widened(300, 128) == 384
    assert widened(300, 64, parts=8) == 320


@pytest.mark.parametrize("strategy", ["soft", "hard", "none"])
def test_padding_changes_neither_losses_nor_gradients(data, tiny, strategy):
    model = ECore(still(replace(tiny, strategy=strategy)), data.vocabulary, data.tables, data.embeddings)
    split, rows = resident(data), torch.tensor([0, 3, 7, 20])
    found = []
    for widths, tokens in ((split.widths(rows), split.tokens(rows)), (Widths(40, 33, 3), 64)):
        batch = split.gather(rows, widths)
        assert batch.context.shape[1] == widths.context
        losses = model.loss(batch, True, tokens)
        losses.total.backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (plain, gradients), (padded, others) = found
    for name in ("total", "generation", "emotion", "correlation", "nll", "tokens", "correct"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    for name, value in plain.health.items():
        torch.testing.assert_close(padded.health[name], value)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_few_shapes_arise(data, tiny, start, graphs, coarse, tmp_path):
    records = Repeater()
    start(tmp_path / "run", replace(graphs, max_steps=20), records)
    assert records.recorded == 2  # every text here is short; logged steps have their own
    # Per epoch 4 whole batches and one of 8 samples, which is none of them: 16 steps, of each kind the first as it is.
    assert records.replayed == 14


# What is recorded


def test_a_recording_gathers_the_batch_of_the_present_samples(data, coarse):
    """Each time all of it: nothing is left of a longer one before."""
    split, seen = resident(data), Counter()

    def step(batch: Batch, tokens: int, health: bool) -> Taken:
        seen["Python"] += 1
        return Taken(torch.cat([part.flatten() for part in batch]), {"tokens": torch.tensor(float(tokens))})

    optimizer = adam([torch.nn.Parameter(torch.zeros(1))])
    steps = CapturedStep(split, 5, step, optimizer, Repeater())
    random, kept = np.random.default_rng(0), []
    for _ in range(12):
        rows = random.choice(len(data.train), 5, replace=False)
        sums, _ = steps(rows)
        wanted = data.train.batch(rows)
        for name, width in zip(("context", "state", "concepts", "response"), (32, 32, 0, 64), strict=True):
            extra = width - getattr(wanted, name).shape[1]
            wanted = wanted._replace(
                **{name: torch.nn.functional.pad(getattr(wanted, name), (0, extra), value=PAD)}
            )
        kept.append((sums, torch.cat([part.flatten() for part in wanted])))
    for sums, wanted in kept:  # only now: later steps must not have overwritten them
        assert torch.equal(sums, wanted)
    assert seen["Python"] == 2  # as it comes, and recorded
    assert steps.recorded == 1


def test_the_rate_is_read_at_each_replay(data):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = adam([weight])

    def step(batch, tokens, health):
        (weight.sum() * batch.lengths.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Taken(weight.detach().clone(), {})

    records = Repeater()
    steps, rows = CapturedStep(resident(data), 2, step, optimizer, records), np.array([0, 1])
    before = 0.0
    for rate in (0.5, 0.25, 0.125, 1.0):
        set_rate(optimizer, rate)
        (after, *_), _ = steps(rows)
        assert before - after.item() == pytest.approx(rate, rel=1e-5)
        before = after.item()
    assert records.replayed == 3
    assert optimizer.state[weight]["step"] == 4
    assert optimizer.param_groups[0]["capturable"] is False
    assert weight.grad is None


@pytest.mark.parametrize(
    "strategy, ablations", [("soft", ()), ("hard", ()), ("none", ()), ("soft", ("graph",))]
)
def test_a_step_asks_nothing_of_the_host(data, tiny, monkeypatch, strategy, ablations):
    """Tensors without content: whatever looks at one, or mixes it with the host's, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no such device
    config = replace(tiny, strategy=strategy, ablations=ablations)
    model = ECore(config, data.vocabulary, data.tables, data.embeddings).to("meta").train()
    split = resident(data, "meta")
    with use_backend("reference"):
        batch = split.gather(torch.zeros(4, dtype=torch.int64, device="meta"), Widths(32, 32, split.concepts))
        losses = model.loss(batch, True, 64)
        losses.total.backward()
    assert all(tensor.is_meta for tensor in tree_leaves(tuple(losses)))


# Whole trainings


@pytest.mark.parametrize(
    "strategy, precision", [("soft", "float32"), ("hard", "float32"), ("soft", "bfloat16")]
)
def test_recordings_are_the_steps_bit_for_bit(
    start, tiny, graphs, narrow, numbers, tmp_path, strategy, precision
):
    """50 steps of many shapes with dropout, whose random numbers go on as if nothing had been recorded."""
    config = replace(graphs, max_steps=50, validate_every=20, precision=precision)
    records = Repeater()
    for name, one in (("recorded", records), ("again", Again())):
        start(tmp_path / name, config, one, model_config=replace(tiny, strategy=strategy))
    assert records.recorded == 6  # three shapes, of logged steps and of others
    assert records.replayed > 25
    assert_same(tmp_path / "recorded", tmp_path / "again", numbers)


@pytest.mark.parametrize("strategy", ["soft", "hard", "none"])
def test_fifty_steps_are_the_plain_trainers(start, tiny, graphs, settings, narrow, tmp_path, strategy):
    options = {"model_config": still(replace(tiny, strategy=strategy)), "max_steps": 50}
    records = Repeater()
    start(tmp_path / "recorded", replace(graphs, **SLOW), records, **options)
    start(tmp_path / "plain", replace(settings, **SLOW), **options)
    assert records.replayed > 25
    assert_close(tmp_path / "recorded", tmp_path / "plain")


def test_interrupted_and_resumed_is_as_never_stopped(start, graphs, narrow, numbers, monkeypatch, tmp_path):
    config = replace(graphs, max_steps=31)
    start(tmp_path / "whole", config, Repeater())
    take_step = Trainer._take_step

    def interrupted(self):
        if self.state.step == 16:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_take_step", interrupted)
        first = Repeater()
        assert start(tmp_path / "run", config, first)["step"] == 17
    assert first.replayed > 0
    second = Repeater()
    start(tmp_path / "run", records=second, resume=True)
    assert second.replayed > 0
    assert_same(tmp_path / "run", tmp_path / "whole", numbers)


def test_checkpoints_serve_with_and_without(start, tiny, graphs, settings, narrow, tmp_path):
    options = {"model_config": still(tiny)}
    settings, graphs = replace(settings, **SLOW), replace(graphs, **SLOW)
    start(tmp_path / "whole", replace(settings, max_steps=20), **options)
    for name, ours, theirs in (("off", graphs, False), ("on", settings, True)):
        run, records = tmp_path / name, Repeater() if theirs else None
        start(run, ours, Repeater() if ours.cuda_graphs else None, max_steps=10, **options)
        config = read_json(run / "config.json")
        write_json(run / "config.json", config | {"training": config["training"] | {"cuda_graphs": theirs}})
        start(run, records=records, resume=True, max_steps=20)
        assert_close(run, tmp_path / "whole")
        assert records is None or records.replayed > 0


def test_settings_of_older_runs_have_no_graphs(start, settings, tmp_path):
    start(tmp_path / "run", settings, max_steps=3)
    config = read_json(tmp_path / "run/config.json")
    for name in ("cuda_graphs", "compile"):
        assert config["training"].pop(name) is False
    write_json(tmp_path / "run/config.json", config)
    assert start(tmp_path / "run", resume=True, max_steps=5)["step"] == 5


def test_weights_that_break_are_seen_in_a_replay(start, graphs, monkeypatch, tmp_path):
    take_step = Trainer._take_step

    def broken(self):
        if self.state.step == 10:
            self.model.output.bias.data.fill_(torch.nan)
        take_step(self)

    monkeypatch.setattr(Trainer, "_take_step", broken)
    with pytest.raises(NotFinite, match=r"the generation loss is nan at step 11 \(step 10 is kept"):
        start(tmp_path / "run", graphs, Repeater())


# Where recording fails


@pytest.mark.parametrize("failing", [1, 2])
def test_a_shape_that_cannot_be_recorded_goes_step_by_step(
    start, graphs, narrow, numbers, monkeypatch, tmp_path, capsys, failing
):
    """The others are still recorded, and losses and weights are those of single steps; gradients are not added up."""
    config, trainers = replace(graphs, max_steps=50, validate_every=20), []
    close = Trainer.close
    monkeypatch.setattr(Trainer, "close", lambda self: (trainers.append(self), close(self)))
    records = Repeater(failing)
    start(tmp_path / "recorded", config, records)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert line.startswith("CUDA graphs: batches of up to ")
    assert line.endswith("recording failed: operation not permitted when stream is capturing")
    start(tmp_path / "again", config, Again())
    assert "CUDA graphs: batches" not in capsys.readouterr().err
    assert (records.asked, records.recorded) == (6, 5)
    assert trainers[0].captured.recorded == 5
    assert trainers[0].captured.failures == [line]
    assert trainers[0].optimizer.param_groups[0]["capturable"] is False
    assert_same(tmp_path / "recorded", tmp_path / "again", numbers)


def test_a_lost_device_ends_the_run(start, graphs, tmp_path):
    class Lost(Repeater):
        def record(self, work):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        start(tmp_path / "run", graphs, Lost())


class FakeCuda:
    """torch's captures and the driver's, as far as a failed one goes: the driver has to end it, then torch."""

    def __init__(self, monkeypatch, lost=False):
        self.status, self.stream, self.lost = 0, "present", lost
        self.cuStreamIsCapturing = self._ask
        for name in ("CUDAGraph", "graph", "current_stream", "set_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(cuda_graphs, "_driver", lambda: self)
        self.graphs = object.__new__(CudaGraphs)
        vars(self.graphs).update(_device="cuda", _pool=(0, 1), _stream=self, _failed=[])
        self.cuda_stream = 7

    def CUDAGraph(self):
        return object()

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        before, self.stream, self.status = self.stream, "capturing", 1
        yield  # as torch has it: an exception of the body comes after its own
        status, self.status = self.status, 0
        if status != 1:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
        self.stream = before

    def current_stream(self, device):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def synchronize(self, device):
        if self.lost:
            raise RuntimeError("CUDA error: device lost")

    def _ask(self, stream, status):
        status._obj.value = self.status

    def cuStreamEndCapture(self, stream, graph):
        self.status = 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        assert self.status == 0
        self.status = 1
        return 0


def test_a_failed_capture_is_ended_and_left(monkeypatch):
    fake = FakeCuda(monkeypatch)

    def asks():
        try:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors ..."
            )
        finally:
            fake.status = 2
            raise RuntimeError("what followed from it")

    with pytest.raises(
        CaptureFailed, match=r"^CUDA error: operation not permitted when stream is capturing$"
    ):
        fake.graphs.record(asks)
    assert (fake.status, fake.stream, len(fake.graphs._failed)) == (0, "present", 1)

    with pytest.raises(CaptureFailed, match="another thread"):
        fake.graphs.record(lambda: setattr(fake, "status", 2))
    assert (fake.status, fake.stream) == (0, "present")

    fake.graphs.record(lambda: None)
    assert len(fake.graphs._failed) == 2


def test_a_capture_that_fails_with_the_device_is_not_just_a_capture(monkeypatch):
    fake = FakeCuda(monkeypatch, lost=True)
    with pytest.raises(RuntimeError, match="device lost") as raised:
        fake.graphs.record(lambda: 1 / 0)
    assert not isinstance(raised.value, CaptureFailed)


# Where there can be no graphs


def test_refusals(data, tiny, graphs, tmp_path):
    with pytest.raises(InputError, match=r"^--cuda-graphs: expected a GPU, this is cpu$"):
        train(tmp_path / "run", data, tiny, graphs, progress=False)
    assert not (tmp_path / "run").exists()
    cuda = torch.device("cuda")
    with pytest.raises(InputError, match="expected one process, these are 2"):
        recorder(graphs, None, cuda, 2, resumed=False)
    with pytest.raises(InputError, match="not with --backbone"):
        recorder(graphs, "gpt2", cuda, 1, resumed=False)
    assert recorder(replace(graphs, cuda_graphs=False), None, cuda, 1, resumed=False) is None
    with pytest.raises(InputError, match="expected accumulate 1, got 2"):
        TrainingConfig(cuda_graphs=True, accumulate=2)
    with pytest.raises(InputError, match="expected precision float32, tf32 or bfloat16"):
        TrainingConfig(cuda_graphs=True, precision="float16")


def test_a_run_with_graphs_goes_on_without_a_gpu(start, graphs, tmp_path):
    start(tmp_path / "run", graphs, Repeater(), max_steps=6)
    assert start(tmp_path / "run", resume=True, max_steps=12)["step"] == 12


# Compiled


def test_compiled_steps_are_the_plain_ones(start, tiny, settings, tmp_path, fresh_compile, monkeypatch):
    """Traced, with health values and without them; inductor's code comes next."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = {"model_config": still(tiny), "max_steps": 12}
    start(tmp_path / "plain", replace(settings, **SLOW), **options)
    start(tmp_path / "compiled", replace(settings, compile=True, **SLOW), **options)
    assert_close(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
def test_steps_in_inductors_code_are_the_plain_ones(start, tiny, settings, tmp_path, fresh_compile):
    every_step = {
        **SLOW,
        "log_every": 1,
    }  # one program: that without health values takes as long again to compile
    options = {"model_config": still(tiny), "max_steps": 6}
    start(tmp_path / "plain", replace(settings, **every_step), **options)
    start(tmp_path / "compiled", replace(settings, compile=True, **every_step), **options)
    assert_close(tmp_path / "compiled", tmp_path / "plain")


def test_compiling_is_for_one_process(data, tiny, settings, tmp_path):
    from ecore.training.distributed import Processes

    with pytest.raises(InputError, match=r"^--compile: expected one process, these are 2$"):
        train(tmp_path / "run", data, tiny, replace(settings, compile=True), processes=Processes(0, 2))
    assert not (tmp_path / "run").exists()


def test_the_rate_of_a_recorded_step_is_logged_exactly(start, graphs, tmp_path):
    start(tmp_path / "run", graphs, Repeater())
    for line in read_metrics(tmp_path / "run"):
        assert line["lr"] == noam(line["step"], 12, graphs.warmup, graphs.factor)
