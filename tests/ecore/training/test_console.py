"""The console: lines for those who want to see progress, and notices for everybody."""

import pytest

from ecore.training.console import Console

RESULTS = {"valid_ppl": 66.004, "valid_ppl_per_sample": 55.126, "valid_emotion_accuracy": 33.4}


@pytest.mark.parametrize("shows_progress", [True, False])
def test_only_notices_are_for_everybody(capsys, shows_progress):
    console = Console(shows_progress, step=3, max_steps=9)
    console.open("begins", "tensorboard is missing")
    console.advance()
    console.show_validation(4, RESULTS, best=True)
    console.notice("the graph is blind")
    console.close()
    printed = capsys.readouterr().err
    assert "the graph is blind" in printed
    for line in (
        "begins",
        "no events for TensorBoard: tensorboard is missing (pip install tensorboard)",
        "step 4: validation perplexity 66.00 per token, 55.13 per sample (best so far), emotion accuracy 33.40 %",
    ):
        assert (line in printed) == shows_progress


def test_a_validation_of_a_model_without_emotions(capsys):
    console = Console(True, step=0, max_steps=9)
    console.show_validation(5, {k: v for k, v in RESULTS.items() if "accuracy" not in k}, best=False)
    console.close()
    assert "step 5: validation perplexity 66.00 per token, 55.13 per sample\n" in capsys.readouterr().err
