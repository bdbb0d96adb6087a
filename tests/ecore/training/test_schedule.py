"""The learning rate and the optimiser's constants."""

import pytest
import torch

from ecore.training.schedule import adam, noam


def rates(steps, steps_done=0, **options):
    optimizer = adam([torch.nn.Parameter(torch.zeros(1))])
    schedule = noam(optimizer, steps_done=steps_done, **options)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_follows_the_formula():
    expected = [0.5 * 300**-0.5 * min(n**-0.5, n * 5**-1.5) for n in range(1, 13)]
    assert rates(12, dim=300, warmup=5, factor=0.5) == pytest.approx(expected, rel=1e-12)


def test_reaches_the_papers_final_rate():
    assert rates(1, steps_done=26_999, dim=300, warmup=8000)[0] == pytest.approx(3.5e-4, rel=0.01)


def test_is_taken_up_where_it_stood():
    options = {"dim": 12, "warmup": 4}
    assert rates(9, **options)[3:] == rates(6, steps_done=3, **options)


def test_constants_of_adam():
    group = adam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0)
