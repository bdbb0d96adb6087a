"""Answers from several threads at once are each their own, and none is made from values that are not finite."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ecore import ECore
from ecore.errors import InputError

CONTEXTS = [
    ["my dog died"],
    ["we had a party", "how lovely", "yes it was"],
    ["i am afraid"],
    ["he broke my car"],
]


@pytest.mark.parametrize("training", [False, True])
def test_threads_have_answers_of_their_own(make, training):
    pipeline = ECore(make.model().train(training))
    for parameter in pipeline.model.parameters():  # answers that differ
        torch.nn.init.normal_(parameter, std=0.5)
    pipeline.model.eval()
    wanted = [(str(r), r.emotions) for r in (pipeline.respond(c, max_length=8) for c in CONTEXTS)]
    pipeline.model.train(training)
    begin = threading.Barrier(len(CONTEXTS))

    def ask(number):
        begin.wait()
        replies = [pipeline.respond(CONTEXTS[number], max_length=8) for _ in range(8)]
        return [(str(reply), reply.emotions) for reply in replies]

    with ThreadPoolExecutor(len(CONTEXTS)) as pool:
        found = list(pool.map(ask, range(len(CONTEXTS))))
    for answers, expected in zip(found, wanted, strict=True):
        assert answers == [expected] * 8
    assert all(module.training == training for module in pipeline.model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"method": "beam"}, {"method": "sample", "seed": 1}])
def test_values_that_are_not_finite_give_no_answer(make, value, options):
    pipeline = ECore(make.model())
    with torch.no_grad():
        pipeline.model.output.weight[:, 3] = value
    with pytest.raises(InputError, match="are not finite: the model's weights are damaged"):
        pipeline.respond(CONTEXTS[0], max_length=4, **options)
