"""The learning rate and the optimiser's constants."""

import pytest
import torch

from ecore.training.schedule import adam, noam, set_rate


def test_follows_the_formula():
    expected = [0.5 * 300**-0.5 * min(n**-0.5, n * 5**-1.5) for n in range(1, 13)]
    assert [noam(n, 300, warmup=5, factor=0.5) for n in range(1, 13)] == expected
    assert max(expected) == expected[4]


def test_reaches_the_papers_final_rate():
    assert noam(27_000, dim=300, warmup=8000) == pytest.approx(3.5e-4, rel=0.01)


def test_is_the_rate_of_the_next_step():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = adam([parameter])
    for rate in (0.5, 0.25):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        set_rate(optimizer, rate)
        optimizer.step()
        assert before - parameter.item() == pytest.approx(
            rate
        )  # of a gradient that stays, Adam's step is the rate


def test_a_rate_in_a_tensor_stays_where_it_is():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = adam([parameter])
    place = optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is place
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.5)


def test_constants_of_adam():
    group = adam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0)
