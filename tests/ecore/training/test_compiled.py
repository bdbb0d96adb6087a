"""Compiled code inside of recorded steps: the losses of plain steps, and nothing is compiled in a recording."""

import contextlib
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from ecore.data.batches import ResidentSplit
from ecore.model.losses import Losses
from ecore.training import trainer
from ecore.training.cuda_graphs import CapturedStep, Taken
from ecore.training.objective import objective
from ecore.training.schedule import adam, set_rate
from ecore.training.trainer import train
from tests.ecore.training.recordings import SLOW, Again, Repeater, assert_close, still

pytestmark = pytest.mark.usefixtures("fresh_compile", "narrow", "as_on_a_gpu")


class Programs:
    """A backend of torch.compile that counts its programs, and a stand-in for CUDA graphs that sees what they do.

    torch.compile lets code be while a dispatch mode is on, and the stand-in is one; a recording on a GPU is none. So it
    is off for the calls of compiled code, and on in the programs.
    """

    def __init__(self, backend):
        self.backend, self.mode = lookup_backend(backend), None
        self.compiled = self.called = 0

    def compile(self, graph, inputs, **_):
        self.compiled += 1
        program = self.backend(graph, inputs)

        def run(*arguments):
            self.called += 1
            with self.mode or contextlib.nullcontext():
                return program(*arguments)

        return run

    def around(self, loss):
        def call(*arguments):
            self.mode = _get_current_dispatch_mode()
            with _disable_current_modes():
                return loss(*arguments)

        return call


class Watched(Repeater):
    """The stand-in, which sees that one compiled program is recorded and none is made."""

    def __init__(self, programs):
        super().__init__()
        self.programs = programs

    def record(self, work):
        compiled, called = self.programs.compiled, self.programs.called
        replay = super().record(work)
        assert (self.programs.compiled, self.programs.called) == (compiled, called + 1)
        return replay


class Small(torch.nn.Module):
    """As few operations as have the losses of a batch of any widths."""

    def __init__(self, words):
        super().__init__()
        self.table, self.output = torch.nn.Embedding(words, 6), torch.nn.Linear(6, words)

    def loss(self, batch, health, tokens):
        mean = self.table(batch.context).sum(1) / batch.lengths[:, None]  # [B, 6]
        places = (batch.response == 0).flatten().to(torch.uint8).argsort(stable=True)[:tokens]
        states = torch.tanh(self.table(batch.response) + mean[:, None]).flatten(0, 1)[places]
        loss = F.cross_entropy(self.output(states), batch.response.flatten()[places], ignore_index=0)
        none = loss.new_zeros(())
        return Losses(
            loss, loss, none, none, none, none, none, {"mean": mean.detach().mean()} if health else {}
        )


def small_losses(data, compiled, records, around=lambda loss: loss):
    """Return the losses of steps on batches of several shapes, and the steps' recordings."""
    torch.manual_seed(0)
    model = Small(len(data.vocabulary))
    loss, optimizer = around(objective(model, compiled, 1)), adam(model.parameters())
    set_rate(optimizer, 0.01)

    def step(batch, tokens, health):
        losses = loss(batch, health, tokens)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Taken(losses.total.detach().clone(), losses.health)

    steps = CapturedStep(ResidentSplit(data.train, torch.device("cpu")), 8, step, optimizer, records)
    by_length = np.argsort(data.train.context_lengths, kind="stable")
    # The first batch has eight samples, of eight words: sizes that are equal by chance.
    batches = [by_length[first : first + 8] for first in (0, 8, 20, 30, 40)] + [by_length[:5]]
    taken = [steps(rows, health) for _ in range(4) for rows in batches for health in (True, False)]
    return torch.stack([one.sums for one in taken]), steps


def test_two_programs_serve_recordings_of_every_shape(data, monkeypatch):
    """One with values of health and one without; the backward pass is a program, too, and recorded with the rest."""
    programs = Programs("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=programs.compile))
    records = Watched(programs)
    losses, steps = small_losses(data, True, records, programs.around)
    plain, _ = small_losses(data, False, Again())
    assert (steps.recorded, records.replayed) == (8, 32)
    assert steps.failures == []
    assert programs.compiled == 2
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    assert losses[-1] < 0.9 * losses[0]


def test_recorded_steps_of_compiled_code_are_the_plain_ones(data, tiny, settings, tmp_path, monkeypatch):
    """A training of the model, compiled whole: what is between programs, the recording would not see."""
    config = still(replace(tiny, strategy="none"))
    settings = replace(settings, max_steps=20, log_every=1, **SLOW)  # one kind of steps, so one program
    train(tmp_path / "plain", data, config, settings, progress=False)
    programs = Programs("eager")
    records = Watched(programs)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=programs.compile))
    monkeypatch.setattr(trainer, "recorder", lambda *_, **__: records)
    monkeypatch.setattr(trainer, "objective", lambda *given: programs.around(objective(*given)))
    both = replace(settings, cuda_graphs=True, compile=True)
    train(tmp_path / "both", data, config, both, progress=False)
    assert records.replayed > 10
    assert programs.compiled == 1
    assert_close(tmp_path / "both", tmp_path / "plain")


def test_inductor_makes_no_graphs_of_its_own(data, monkeypatch):
    """Not even where the process asks for them, as TORCHINDUCTOR_CUDAGRAPHS=1 does."""
    from torch._inductor import compile_fx, config

    found = []

    def compiled(graph, inputs, config_patches=None, **_):
        with config.patch(config_patches):
            found.append(config.triton.cudagraphs)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compiled)
    batch = data.train.batch(np.arange(4))
    with config.patch({"triton.cudagraphs": True}):
        losses = objective(Small(len(data.vocabulary)), True, 1)(batch, False, batch.response.numel())
    assert losses.total.isfinite()
    assert found == [False]
