"""Captured steps on a GPU: losses of plain steps, from CUDA graphs that never wait for the host."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ecore.model import ECore
from ecore.training.cuda_graphs import CapturedStep, CudaGraphs, Taken
from ecore.training.journal import read_metrics
from ecore.training.schedule import adam, set_rate
from ecore.training.trainer import Trainer
from tests.ecore.training.recordings import SLOW, Again, assert_close, resident, still

pytestmark = pytest.mark.gpu

LOSSES = ("loss", "gen", "nll", "valid_ppl")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["soft", "hard", "none"])
def test_graphs_train_as_the_plain_trainer_does(
    start, tiny, graphs, settings, narrow, tmp_path, strategy, precision
):
    options = {"model_config": still(replace(tiny, strategy=strategy)), "max_steps": 50, "device": "cuda"}
    start(tmp_path / "plain", replace(settings, precision=precision, **SLOW), **options)
    start(tmp_path / "graphs", replace(graphs, precision=precision, **SLOW), **options)
    rtol = 1e-3 if precision == "float32" else 2e-2
    assert_close(tmp_path / "graphs", tmp_path / "plain", rtol, LOSSES)


def test_graphs_draw_the_random_numbers_of_single_launches(start, graphs, narrow, tmp_path):
    config = replace(graphs, max_steps=50, **SLOW)
    start(tmp_path / "graphs", config, device="cuda")
    start(tmp_path / "again", config, Again(), device="cuda")
    assert_close(tmp_path / "graphs", tmp_path / "again", 1e-3, LOSSES)


def test_a_capture_that_fails_costs_its_shape_alone(start, graphs, narrow, monkeypatch, tmp_path, capsys):
    """The first step to be captured looks at a value, which no capture allows: the rest is as if it did not."""
    config, trainers, captures = replace(graphs, max_steps=50, **SLOW), [], []
    close, whole_step = Trainer.close, Trainer._whole_step

    def looks(self, batch, tokens, health):
        taken = whole_step(self, batch, tokens, health)
        if torch.cuda.is_current_stream_capturing():
            captures.append(batch.context.shape)
            if len(captures) == 1:
                taken.sums.sum().item()
        return taken

    monkeypatch.setattr(Trainer, "close", lambda self: (trainers.append(self), close(self)))
    monkeypatch.setattr(Trainer, "_whole_step", looks)
    start(tmp_path / "graphs", config, device="cuda")
    assert capsys.readouterr().err.count("CUDA graphs: batches of up to") == 1
    assert len(trainers[0].captured.failures) == 1
    assert trainers[0].captured.recorded >= 1
    torch.cuda.empty_cache()  # the allocator knows of no capture that is under way
    assert len(captures) == trainers[0].captured.recorded + 1
    start(tmp_path / "again", config, Again(), device="cuda")
    assert_close(tmp_path / "graphs", tmp_path / "again", 1e-3, LOSSES)


def test_graphs_resume(start, graphs, narrow, tmp_path):
    config = replace(graphs, max_steps=31, validate_every=31, **SLOW)
    start(tmp_path / "whole", config, device="cuda")
    start(tmp_path / "run", config, device="cuda", max_steps=17)
    start(tmp_path / "run", resume=True, max_steps=31, device="cuda")
    whole = {line["step"]: line for line in read_metrics(tmp_path / "whole")}
    for line in read_metrics(tmp_path / "run"):
        if line["step"] in whole:  # the first leg's last step, 17, was logged too
            assert line["loss"] == pytest.approx(whole[line["step"]]["loss"], rel=1e-3)


@pytest.mark.parametrize("rows", [16, 128])
def test_a_step_does_not_wait_for_the_gpu(data, tiny, rows):
    """Neither does a replay nor a step as it comes; 128 rows look up more words than one kernel takes (3,072)."""
    model = ECore(still(tiny), data.vocabulary, data.tables, data.embeddings).cuda().train()
    optimizer = adam(model.parameters())
    set_rate(optimizer, 1e-3)

    def step(batch, tokens, health):
        losses = model.loss(batch, True, tokens)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Taken(losses.total.detach(), losses.health)

    records = CudaGraphs(torch.device("cuda"))
    steps = CapturedStep(resident(data, "cuda"), rows, step, optimizer, records)
    samples = np.arange(rows) % len(data.train)
    first = [float(steps(samples).sums) for _ in range(3)]  # compiles, records, replays
    try:
        torch.cuda.set_sync_debug_mode("error")
        taken = [steps(samples).sums for _ in range(5)]
        taken.append(steps(samples[:-1]).sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.recorded == 1
    assert all(float(loss) < first[0] for loss in taken[:-1])


@pytest.mark.slow
def test_graphs_of_compiled_steps(start, tiny, graphs, settings, tmp_path):
    options = {"model_config": still(tiny), "max_steps": 20, "device": "cuda"}
    start(tmp_path / "plain", replace(settings, **SLOW), **options)
    start(tmp_path / "graphs", replace(graphs, compile=True, **SLOW), **options)
    assert_close(tmp_path / "graphs", tmp_path / "plain", 1e-3, LOSSES)
