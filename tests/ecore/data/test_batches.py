import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecore.data.batches import Batch, ResidentSplit, Widths, context_batch, length_buckets
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.text import tokenize
from ecore.data.vocabulary import CLS, EOS, PAD
from ecore.errors import InputError


@pytest.fixture
def folder(jsonl_folder, tmp_path):
    relations = tmp_path / "relations.tsv"
    relations.write_text("dog\tIsA\tparty\t1\ndog\tIsA\tlottery\t2\nmiss\tIsA\tparty\t1\n")
    glove = tmp_path / "glove.txt"
    glove.write_text("dog 1 2\nsorry 3 4\n")
    prepare(jsonl_folder, tmp_path / "out", glove=[glove], relations=relations, progress=False)
    return tmp_path / "out"


@pytest.fixture
def data(folder):
    return PreparedData.load(folder)


def test_batches_hold_what_the_texts_say(data):
    for split in (data.train, data.valid, data.test):
        batch = split.batch(np.arange(len(split)))
        assert all(tensor.dtype == torch.int64 for tensor in batch)
        for i in range(len(split)):
            text = split.texts(i)
            turns = [tokenize(turn) for turn in text["context"]]
            words = [CLS, *data.vocabulary.encode(word for turn in turns for word in turn)]
            states = [3] + [1 + t % 2 for t, turn in enumerate(turns) for _ in turn]
            target = [*data.vocabulary.encode(tokenize(text["response"])), EOS]
            for row, expected in ((batch.context, words), (batch.state, states), (batch.response, target)):
                padding = [PAD] * (row.shape[1] - len(expected))
                assert row[i].tolist() == expected + padding
            assert batch.lengths[i] == split.context_lengths[i] == len(words)
            assert split.response_lengths[i] == len(target)
            assert data.vocabulary.emotions[batch.emotion[i]] == text["emotion"]
    assert data.train.texts(1) == {
        "conv_id": "t:0",
        "turn": 3,
        "context": ["My dog died yesterday.", "I'm so sorry!", "Thanks, I miss him."],
        "response": "I bet.",
        "emotion": "sad",
    }


def test_batches_are_no_wider_than_needed_and_in_order(data):
    batch = data.train.batch([3, 2])
    assert batch.context.shape == (2, data.train.context_lengths[[2, 3]].max())
    assert batch.response.shape == (2, data.train.response_lengths[[2, 3]].max())
    assert batch.concepts.shape == (2, 0)
    assert batch.emotion.tolist() == [1, 0]
    assert data.vocabulary.decode(data.train.batch([1]).concepts[0].tolist()) == ["party", "lottery"]


def test_raw_text_gives_the_same_batch(data):
    batch = data.train.batch(np.arange(4))
    raw = context_batch([data.train.texts(i)["context"] for i in range(4)], data.vocabulary, data.tables)
    for name in ("context", "state", "lengths", "concepts"):
        assert getattr(raw, name).tolist() == getattr(batch, name).tolist()
    assert raw.response.shape == (4, 0)
    assert raw.emotion.tolist() == [0] * 4


def test_raw_text_at_its_limits(data):
    batch = context_batch([[""], ["one two. dog", "dog dog"]], data.vocabulary, data.tables, max_words=4)
    assert batch.lengths.tolist() == [1, 5]
    assert batch.state.tolist() == [[3, 0, 0, 0, 0], [3, 1, 1, 2, 2]]
    for contexts in ([], [[]], [["a"], []]):
        with pytest.raises(InputError, match="expected at least one context"):
            context_batch(contexts, data.vocabulary, data.tables)


def test_moving_a_batch(data):
    batch = data.train.batch([0]).to("meta")
    assert isinstance(batch, Batch)
    assert all(tensor.device.type == "meta" for tensor in batch)


def test_empty_utterances_are_samples_too(jsonl_folder, tmp_path):
    utterances = [{"speaker": "speaker", "text": ""}, {"speaker": "listener", "text": " "}]
    record = {"conv_id": "e:9", "emotion": "sad", "situation": "", "utterances": utterances}
    with open(jsonl_folder / "test.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    prepare(jsonl_folder, tmp_path / "out", progress=False)
    batch = PreparedData.load(tmp_path / "out").test.batch([1])
    assert (batch.context.tolist(), batch.response.tolist()) == ([[CLS]], [[EOS]])


def test_embeddings_and_tables(data):
    words = data.vocabulary.encode(["dog", "yesterday"])
    np.testing.assert_array_equal(data.embeddings[words], [[1, 2], [np.nan, np.nan]])
    assert isinstance(data.embeddings, np.memmap)
    assert data.tables.related.dtype == torch.int32
    assert data.tables.intensity.dtype == data.tables.related_score.dtype == torch.float32


def test_no_embeddings_and_no_relations(jsonl_folder, tmp_path):
    prepare(jsonl_folder, tmp_path / "out", progress=False)
    data = PreparedData.load(tmp_path / "out")
    assert data.embeddings is None
    assert data.tables.related.shape == (len(data.vocabulary), 0)
    assert data.train.batch([0, 1]).concepts.shape == (2, 0)
    assert context_batch([["hi"]], data.vocabulary, data.tables).concepts.shape == (1, 0)


def test_thresholds(data):
    matched = tuple(data.meta["thresholds"].values())
    assert data.thresholds((0.0, 0.075, 0.15)) == (0.0, *matched)
    assert data.thresholds((0.0, 0.15)) == (0.0, matched[1])
    assert data.thresholds((0, 0.1), use_literal=True) == (0.0, 0.1)
    with pytest.raises(InputError, match=r"no match for 0\.1 .*known: 0\.0, 0\.075, 0\.15"):
        data.thresholds((0.0, 0.1))
    data.meta["intensity"] = "skep"
    assert data.thresholds((0.0, 0.1)) == (0.0, 0.1)
    data.meta["intensity"] = "none"
    assert data.thresholds((0.0, 0.1), use_literal=True) == (0.0, 0.0)


# folders that cannot be used


def refuses(folder, match):
    with pytest.raises(InputError, match=match) as caught:
        PreparedData.load(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_were_not_prepared(folder, tmp_path):
    refuses(tmp_path / "gone", "gone: no such folder; expected one made by `ecore prepare`")
    refuses(tmp_path, r"not a prepared folder \(no meta.json\)")
    (folder / "meta.json").write_text("{")
    refuses(folder, r"meta\.json:1: not valid JSON")
    (folder / "meta.json").write_text("[]")
    refuses(folder, "folder of format None, expected 1")


def test_another_format(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 2}))
    refuses(folder, r"meta\.json: folder of format 2, expected 1; prepare it again")
    del meta["vocabulary_fingerprint"]
    (folder / "meta.json").write_text(json.dumps(meta))
    refuses(folder, r"meta\.json: missing or damaged")


def test_another_vocabulary(folder):
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary["words"].append("extra")
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    refuses(folder, "not the vocabulary that the folder was prepared with")


ARRAYS = ("intensity", "related", "related_score", "embeddings", "train.words", "valid.states")
ARRAYS += ("test.samples", "train.concepts", "train.text_offsets")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied", "shorter", "flatter"])
def test_damaged_arrays(name, damage, folder):
    path = folder / f"{name}.npy"
    content = path.read_bytes()
    array = np.load(path)
    if damage == "missing":
        path.unlink()
    elif damage in ("truncated", "emptied"):
        path.write_bytes(content[:-3] if damage == "truncated" else b"")
    else:
        np.save(path, array[:-1] if damage == "shorter" else array[..., None])
    refuses(folder, "missing or damaged .*prepare it again")


@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied"])
def test_damaged_texts(damage, folder):
    path = folder / "valid.texts.jsonl"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-3] if damage == "truncated" else b"")
    refuses(folder, "missing or damaged .*prepare it again")


# length buckets


class Lengths:
    """As much of a split as the buckets look at."""

    def __init__(self, lengths):
        self.context_lengths, self.response_lengths = np.array(lengths, dtype=np.int64).reshape(-1, 2).T

    def __len__(self):
        return len(self.context_lengths)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=300),
    st.integers(1, 8),
    st.integers(0, 2**40),
    st.integers(0, 5),
)
def test_buckets_hold_every_sample_once(lengths, batch_size, seed, epoch):
    batches = length_buckets(Lengths(lengths), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    again = length_buckets(Lengths(lengths), batch_size, seed, epoch)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]


def test_buckets_are_alike_in_length_and_change():
    random = np.random.default_rng(0)
    split = Lengths(np.stack([random.geometric(1 / 36, 4000), random.geometric(1 / 14, 4000)], axis=1))
    first, second, other = (length_buckets(split, 16, *key) for key in ((0, 0), (0, 1), (1, 0)))
    padded = sum(split.context_lengths[b].max() * len(b) for b in first)
    assert split.context_lengths.sum() / padded > 0.9
    for changed in (second, other):
        assert {frozenset(b.tolist()) for b in first}.isdisjoint(frozenset(b.tolist()) for b in changed)
    # Short and long batches alternate at random: neighbours do not come sorted.
    means = np.array([split.context_lengths[b].mean() for b in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("error")  # its files are mapped read-only, which torch warns of
def test_a_split_on_a_device_gives_the_same_batches(data, device):
    for split in (data.train, data.valid):
        resident, random = ResidentSplit(split, device), np.random.default_rng(0)
        for size in (1, 2, len(split)):
            indices = random.permutation(len(split))[:size]
            for ours, wanted in zip(resident.batch(indices), split.batch(indices), strict=True):
                assert ours.device.type == device
                assert torch.equal(ours.cpu(), wanted)


def test_a_wider_batch_is_padded(data):
    resident, rows = ResidentSplit(data.train, "cpu"), np.array([3, 1])
    narrow, split = resident.widths(rows), data.train.batch(rows)
    assert narrow == (split.context.shape[1], split.response.shape[1], split.concepts.shape[1])
    assert resident.tokens(rows) == (split.response != PAD).sum()
    widths = Widths(narrow.context + 5, narrow.response + 3, resident.concepts)
    assert resident.concepts == 2
    batch = resident.gather(resident.send(rows), widths)
    for name, width in zip(("context", "response", "concepts"), widths, strict=True):
        wide, kept = getattr(batch, name), getattr(split, name)
        assert wide.shape[1] == width
        assert torch.equal(wide[:, : kept.shape[1]], kept)
        assert (wide[:, kept.shape[1] :] == PAD).all()
    assert (batch.state[:, split.state.shape[1] :] == 0).all()
    assert torch.equal(batch.lengths, split.lengths)
