"""The generation benchmark on a small model: every configuration decodes the same, a wrong one is refused, and the
tables say what was measured."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import generation, generation_report
from benchmarks.workload import workload
from ecore.generation import Decoding, generate
from ecore.model import ECore
from ecore.model import decoder as decoder_module


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "WORDS_EACH": 4,
        "BATCHES": (1, 3),
        "CONTEXTS": (8,),
        "BEAMS": (1, 2),
        "SAID": (1, 6),
        "COMPARED": (1, 3),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(generation, name, value)


@pytest.fixture(scope="module")
def model() -> ECore:
    """It answers differently; in float64, so that rounding decides nothing."""
    model = workload(None, "tiny", number=1).model().double().eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return model


def contexts(rows: int) -> generation.Batch:
    return generation.Contexts(None, 23_000, "cpu")(rows)


def test_configurations_decode_the_same(model: ECore) -> None:
    batch = contexts(3)
    expected = generate(model, batch, Decoding(max_length=4))
    found = generation.configurations(model, compiled=False)
    assert list(found)[-1].startswith("all")
    for stepper, parts in found.values():
        with generation.only(parts):
            generation.check(model, stepper, batch)
            assert generate(stepper, batch, Decoding(max_length=4)) == expected


def test_only_takes_the_others_out(model: ECore) -> None:
    project, attend = decoder_module.project, decoder_module.attend
    with generation.only(("small attention",)):
        assert decoder_module.project is F.linear
        assert decoder_module.attend is attend
    with generation.only(("split products",)):
        assert decoder_module.project is project
        assert decoder_module.attend is not attend
    assert (decoder_module.project, decoder_module.attend) == (project, attend)


def test_a_wrong_step_is_not_timed(model: ECore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "project", lambda x, weight, bias: F.linear(x, weight))
    with torch.no_grad():
        model.decoder.blocks[0].feed_forward[2].bias.add_(1.0)
    with pytest.raises(SystemExit, match="word 1 has not the logits"):
        generation.check(model, model, contexts(2))


def test_parts_make_up_the_whole(model: ECore) -> None:
    for table in generation.parts(model, contexts(2), 2).values():
        assert min(table.values()) > 0.0
        assert {"encode", "self-attention", "cross-attention", "feed-forward", "output projection"} < set(
            table
        )


def test_contexts_have_the_length_asked_for() -> None:
    batch = generation.Contexts(None, 23_000, "cpu")(2, 40)
    assert batch.lengths.tolist() == [41, 41]
    assert int(batch.context.max()) < 23_000


def test_run(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    generation.main(
        ["--preset", "tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "r.json")]
    )
    assert torch.get_num_threads() == threads
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["batch"] for row in result["compared"]] == [1, 3]
    assert result["growth"]["beams"].keys() == {"1", "2"}
    printed = capsys.readouterr().out
    per_word = result["compared"][0]["timings"]["all (what ecore does)"]["median"] / 4
    assert f"{per_word / result['u']:.4f}" in printed
    assert "where it goes" in printed


def test_plot_of_what_was_kept(tmp_path) -> None:
    growth = {
        "batch": {"1": 0.01, "4": 0.004},
        "context words": {"32": 0.02},
        "words already said": {"9": 0.03},
    }
    kept = tmp_path / "kept.json"
    results = [{"preset": preset, "growth": growth} for preset in ("one", "two")]
    kept.write_text(json.dumps({"benchmark": "generation", "results": results}))
    images = []
    for name in ("a.svg", "b.svg"):
        generation.main(["--from", str(kept), "--plot", str(tmp_path / name)])
        images.append((tmp_path / name).read_text())
    assert images[0] == images[1]
    assert "two, context words" in images[0]
    with pytest.raises(SystemExit):
        generation.main(["--from", str(kept)])

    throughput, cost = generation_report.drawn(results).axes
    assert [line.get_xydata().tolist() for line in throughput.lines] == [[[1, 100], [4, 250]]] * 2
    assert [line.get_xydata().tolist() for line in cost.lines] == [[[32, 20]], [[9, 30]]] * 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ('{"benchmark": "training", "results": []}', "expected results"),
        (json.dumps({"benchmark": "generation", "results": [{}] * 4}), "at most 3 results, got 4"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, capsys: pytest.CaptureFixture[str], text, told) -> None:
    kept, image = tmp_path / "kept.json", tmp_path / "image.svg"
    if text is not None:
        kept.write_text(text)
    with pytest.raises(SystemExit):
        generation.main(["--from", str(kept), "--plot", str(image)])
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not image.exists()
