"""CEM's equations, written out in plain torch; and its file of inferences."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ecore import pretrained
from ecore.baselines.base import encode
from ecore.baselines.cem import diversity_weight
from ecore.baselines.inferences import RELATIONS, Inferences, InferenceSplit
from ecore.config import ModelConfig, TrainingConfig, for_model
from ecore.data.vocabulary import CLS, EOS
from ecore.errors import InputError
from ecore.training.trainer import train
from tests.ecore.training.conftest import TINY


def encoded(encoder, x):
    return encode(encoder, x[None], torch.ones(1, len(x), dtype=torch.bool))[0]


@torch.no_grad()
def test_equations(make):
    model, batch = make.model("cem").double(), make.batch("cem")
    encoding, table = model.encode(batch), model.embedding.word.weight * 24**0.5
    position = model.embedding.position
    for row, length in enumerate(batch.lengths.tolist()):
        state = model.embedding.state.weight[batch.state[row, :length]]
        h = encoded(model.encoder, table[batch.context[row, :length]] + position[:length] + state)
        inferred = []
        for name, ids in zip(RELATIONS, batch.inferences[row], strict=True):
            ids = ids[ids != 0]
            encoder = model.affective_encoder if name == "xReact" else model.cognitive_encoder
            inferred.append(encoded(encoder, table[ids] + position[: len(ids)]))
        vectors = [*(words[0] for words in inferred[:4]), inferred[4].mean(0)]
        refined = []
        for i, vector in enumerate(vectors):
            refiner = model.affective_refiner if i == 4 else model.cognitive_refiner
            joined = torch.cat([h, vector.expand(length, -1)], 1) @ refiner.projection.weight.T
            refined.append(encoded(refiner.encoder, joined + position[:length]))
        both = torch.cat(refined, 1)
        first, _, second = model.selection
        memory = ((torch.sigmoid(both) * both) @ first.weight.T).clamp(min=0) @ second.weight.T
        torch.testing.assert_close(encoding.memory[row, :length], memory)
        logits = model.perceiver.main.weight @ refined[4][0]
        torch.testing.assert_close(encoding.perceived.main_logits[row], logits)


def test_diversity_weight_by_hand():
    """Counts 0, 1, 3 give 1, 2/3, 0, whose mean is 5/9."""
    weight = diversity_weight(torch.tensor([0, 1, 3]))
    torch.testing.assert_close(weight, torch.tensor([1.0, 2 / 3, 0.0]) * 9 / 5)
    assert torch.equal(diversity_weight(torch.zeros(4, dtype=torch.int64)), torch.ones(4))


def test_training_counts_predictions_and_weighs_by_them(make):
    model, batch = make.model("cem", dropout=0.0).train(), make.batch("cem")
    output = model(batch)
    losses = model.loss(batch, health=True)
    real = batch.response != 0
    predicted = output.logits.argmax(-1)[real]
    count = torch.bincount(predicted[predicted != EOS], minlength=len(model.predicted))
    assert torch.equal(model.predicted, count)
    nll = F.cross_entropy(output.logits[real], batch.response[real], reduction="none")
    diversity = 1.5 * (diversity_weight(count)[batch.response[real]] * nll).sum() / 4
    torch.testing.assert_close(losses.health["diversity"], diversity.detach())
    torch.testing.assert_close(losses.generation, nll.sum() / 4)  # without label smoothing
    torch.testing.assert_close(losses.total, losses.generation + losses.emotion + diversity)
    with torch.no_grad():
        model.output.bias[EOS] = 1e3
    model.loss(batch)
    assert torch.equal(model.predicted, count)  # the end of a response is no word
    model.eval().loss(batch)
    model.score(batch)
    assert torch.equal(model.predicted, count)  # validation counts nothing


def written(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_the_file(make, tmp_path):
    path = written(
        tmp_path / "file.jsonl",
        '{"text": "Word1  word2!", "xReact": ["word3 word4", "none", "word5"], "xNeed": []}',
    )
    ids = make.vocabulary.encode(["word3", "word4", "word5"])
    for source in (Inferences.load(path), None):
        if source is None:
            Inferences.load(path).save(tmp_path / "copy.jsonl")
            source = Inferences.load(tmp_path / "copy.jsonl")
        assert source.ids("word1 word2 !", make.vocabulary) == [[CLS]] * 4 + [[CLS, *ids]]
        assert source.ids("word2", make.vocabulary) == [[CLS]] * 5


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"xReact": []}', r'file.jsonl:1: expected an object with "text"'),
        ("[1]", r'file.jsonl:1: expected an object with "text"'),
        ('{"text": "a", "xReact": "sad"}', r"file.jsonl:1: xReact: expected a list of texts"),
        ('{"text": "a", "xWant": [1]}', r"file.jsonl:1: xWant: expected a list of texts"),
        ('{"text": ', r"file.jsonl:1: "),
        ("", r"file.jsonl: is empty"),
    ],
)
def test_a_bad_file_gets_one_line(line, what, tmp_path):
    with pytest.raises(InputError, match=what):
        Inferences.load(written(tmp_path / "file.jsonl", line))


def test_a_file_of_other_utterances_is_refused(data, tmp_path):
    inferences = Inferences.load(written(tmp_path / "file.jsonl", '{"text": "quite another utterance"}'))
    with pytest.raises(InputError, match=r"no inferences for any of the 48 contexts of train"):
        InferenceSplit(data.train, inferences, data.vocabulary)


def test_a_split_finds_the_last_utterance(data, inferences_file):
    inferences = Inferences.load(inferences_file)
    split = InferenceSplit(data.train, inferences, data.vocabulary)
    batch = split.batch(range(len(split)))
    assert 0 < split.known < len(split)
    seen = 0
    for i in range(len(split)):
        expected = inferences.ids(data.train.texts(i)["context"][-1], data.vocabulary)
        assert [ids[ids != 0].tolist() for ids in batch.inferences[i]] == expected
        seen += len(expected[4]) > 1
    assert seen == split.known


def test_what_it_needs(data, inferences_file, tmp_path):
    config = for_model(TINY, "cem")
    with pytest.raises(InputError, match=r"model cem needs them; expected --inferences FILE"):
        train(tmp_path / "run", data, config, TrainingConfig(max_steps=1), progress=False)
    absent = dataclasses.replace(config, inferences=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=r"nowhere.jsonl: no such file"):
        train(tmp_path / "run", data, absent, TrainingConfig(max_steps=1), progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"copy: model cem"):
        train(tmp_path / "run", data, dataclasses.replace(absent, inferences=str(inferences_file), copy=True))
    with pytest.raises(InputError, match=r"inferences: of no use with model ecore"):
        ModelConfig(inferences="x")
    graphs = TrainingConfig(max_steps=1, cuda_graphs=True)
    with pytest.raises(InputError, match=r"--cuda-graphs: not with --model cem"):
        train(tmp_path / "run", data, dataclasses.replace(config, inferences=str(inferences_file)), graphs)


def test_the_folder_keeps_them(make, tmp_path):
    model = make.model("cem")
    pretrained.save(model, tmp_path / "model")
    assert pretrained.load(tmp_path / "model").inferences.texts.keys() == model.inferences.texts.keys()
    (tmp_path / "model" / "inferences.jsonl").unlink()
    with pytest.raises(InputError, match=r"inferences.jsonl: no such file"):
        pretrained.load(tmp_path / "model")
