"""E-CORE around a GPT-2: a tiny one with a tokenizer of its own, both made here; nothing is fetched."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ecore import pipeline, pretrained
from ecore.cli import main
from ecore.config import ModelConfig, TrainingConfig
from ecore.data.prepare import prepare
from ecore.data.prepared import PreparedData
from ecore.data.vocabulary import CLS, EOS, PAD, SPECIAL_WORDS, Vocabulary
from ecore.errors import InputError
from ecore.files import read_json
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate
from ecore.training.journal import read_metrics
from ecore.training.trainer import train

transformers = pytest.importorskip("transformers", reason="needs the extra `pretrained`")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from ecore.data.subwords.alignment import WordIntensity  # noqa: E402
from ecore.data.subwords.batches import TurnReader, context_batch  # noqa: E402
from ecore.data.subwords.vocabulary import OFFSET, SubwordVocabulary  # noqa: E402
from ecore.model.gpt2 import GPT2ECore  # noqa: E402
from ecore.pretrained import build  # noqa: E402

FEELINGS = {
    "afraid": ("A terrible noise scared me", "That sounds frightening, doesn't it?"),
    "angry": ("Someone broke my awful car", "That'd annoy me too!"),
    "joyful": ("We've had a wonderful, happy party", "How lovely for you."),
    "sad": ("My old dog died and I cried", "I'm so sorry."),
}
TINY = ModelConfig(dim=12, thresholds=(0.0, 0.02, 0.05), dropout=0.0, graph_dropout=0.0)
STEPS = TrainingConfig(
    batch_size=8, max_steps=12, warmup=6, log_every=3, validate_every=6, checkpoint_every=4
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty conversations of four turns a split; one of a test's opens with a blank turn."""
    folder = tmp_path_factory.mktemp("backbone")
    (folder / "corpus").mkdir()
    for split in ("train", "valid", "test"):
        lines = []
        for i in range(20):
            emotion = list(FEELINGS)[i % 4]
            said, answer = FEELINGS[emotion]
            more = " ".join(["really"] * (i % 3) + ["today"] * (i % 5))
            turns = [f"{said}  {more}.", f"{answer} What happened?", f"It was {more} bad.", answer]
            if split == "test" and i == 0:
                turns[0] = " "
            said_by = [{"speaker": ("speaker", "listener")[t % 2], "text": x} for t, x in enumerate(turns)]
            dialogue = {
                "conv_id": f"{split}:{i}",
                "emotion": emotion,
                "situation": said,
                "utterances": said_by,
            }
            lines.append(json.dumps(dialogue) + "\n")
        (folder / "corpus" / f"{split}.jsonl").write_text("".join(lines))
    prepare(folder / "corpus", folder / "prepared", progress=False)
    return PreparedData.load(folder / "prepared")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A GPT-2 with random weights and a byte-level tokenizer of some 400 tokens, as transformers saves them."""
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for texts in FEELINGS.values() for text in texts], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(data, gpt2_folder, tmp_path):
    """``make(**settings)``: a model in eval mode; ``joined``: its guidance's way into GPT-2 no longer 0."""

    def model(joined=True, **settings):
        torch.manual_seed(1)
        config = dataclasses.replace(TINY, **{"backbone": str(gpt2_folder), **settings})
        made = build(config, data, tmp_path / "none").eval()
        if joined and made.join_guidance is not None:
            torch.nn.init.normal_(made.join_guidance.weight, std=0.5)
        return made

    return model


def intensities(words, values, text):
    """[(character, intensity)] of ``text`` where ``words`` have ``values`` and an unknown word has 9."""
    vocabulary = Vocabulary(SPECIAL_WORDS + words, words[:1])
    table = np.array([0, 9, 0, 0, 0, *values], dtype=np.float32)
    return WordIntensity(vocabulary, table).subwords(text, [(i, i + 1) for i in range(len(text))])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Do not", [1, 1, 2, 2, 2, 2]),
        ("Don't do", [1, 1, 2, 2, 2, 1, 1, 1]),
        ("Don’t", [1, 1, 2, 2, 2]),
        ("won't", [3, 3, 3, 3, 3]),  # "will not": neither stands there, so the more intense
        ("do.Xy", [9, 9, 9, 9, 9]),  # one word for the tokenizer, and not known
        ('"will"', [9, 3, 3, 3, 3, 9]),
        ("İdo will", [9, 9, 9, 3, 3, 3, 3, 3]),
        ("will!", [3, 3, 3, 3, 4]),
        ("do!do", [1, 1, 4, 1, 1]),
    ],
)
def test_characters_have_their_words_intensity(text, expected):
    assert intensities(("do", "not", "will", "!"), (1, 2, 3, 4), text) == expected


def test_a_subword_has_the_larger_intensity_of_what_it_spans(data):
    vocabulary = Vocabulary((*SPECIAL_WORDS, "do", "not"), ("do",))
    reader = WordIntensity(vocabulary, np.array([0, 9, 0, 0, 0, 1, 2], dtype=np.float32))
    assert reader.subwords("do not", [(0, 2), (1, 4), (2, 6), (5, 5)]) == [1, 2, 2, 2]


def test_split_holds_the_texts_as_subwords(make, data):
    model = make()
    split = model.view(data.test, progress=False)
    batch = split.batch(range(len(split)))
    assert len(split) == len(data.test) == 40
    eos = model.vocabulary.tokenizer.eos_token
    decode = model.vocabulary.tokenizer.decode
    for row in range(len(split)):
        text = data.test.texts(row)
        context = [i for i in batch.context[row].tolist() if i != PAD]
        assert context[0] == CLS
        assert len(context) == batch.lengths[row] == split.context_lengths[row]
        turns = [" ".join(turn.split()) for turn in text["context"]]
        decoded = decode([0 if i == EOS else i - OFFSET for i in context[1:]])
        assert decoded == (eos.join(turns) or eos)
        response = [i for i in batch.response[row].tolist() if i != PAD]
        assert len(response) == split.response_lengths[row]
        assert model.vocabulary.text(response) == " ".join(text["response"].split())
        assert response[-1] == EOS
        assert EOS not in response[:-1]
        assert model.vocabulary.emotions[batch.emotion[row]] == text["emotion"]
    assert (batch.intensity[batch.context == PAD] == 0).all()


def test_split_gives_every_subword_its_words_intensity(make, data):
    model = make()
    batch = model.view(data.train, progress=False).batch([0])
    pieces = [model.vocabulary.tokenizer.decode([i - OFFSET]) for i in batch.context[0, 1:].tolist()]
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    assert text.startswith("A terrible noise scared me")
    for word in ("terrible", "noise", "scared"):
        value = data.tables.intensity[data.vocabulary.encode([word])[0]]
        begin = text.index(word)
        parts = range(
            np.searchsorted(ends, begin, "right"), np.searchsorted(ends, begin + len(word) - 1, "right") + 1
        )
        assert word in "".join(pieces[i] for i in parts)
        assert all(batch.intensity[0, 1 + i] == value for i in parts)
        assert (value > 0.02) == (word != "noise")


def test_raw_contexts_read_as_the_split_does(make, data):
    model = make()
    split = model.view(data.test, progress=False)
    batch = split.batch(range(6))
    raw = model.read([data.test.texts(i)["context"] for i in range(6)])
    for name in ("context", "lengths", "intensity"):
        assert torch.equal(getattr(raw, name), getattr(batch, name))
    with pytest.raises(InputError, match="at least one turn"):
        model.read([[]])


def test_long_contexts_keep_their_latest_subwords(make, data):
    model = make()
    reader = TurnReader(model.vocabulary, data.tables.intensity.numpy())
    whole = context_batch([["It was bad.", "Why?"]], reader, 100)
    cut = context_batch([["It was bad.", "Why?"]], reader, 3)
    assert cut.context[0].tolist() == [CLS, *whole.context[0, -3:].tolist()]
    assert model.most_context + model.most_response == 256
    split = model.view(data.train, progress=False)
    model.most_context = 5
    short = model.view(data.train, progress=False)
    last, kept = split.batch([3]), short.batch([3])
    assert short.context_lengths.max() == 6
    assert kept.context[0].tolist() == [CLS, *last.context[0, -5:].tolist()]
    model.most_context = 128
    long = model.read([["bad " * 200]])
    assert long.lengths.tolist() == [model.most_context + 1]
    with torch.no_grad():
        generate(model, long, Decoding(max_length=model.most_response))  # all positions, and not one more
    with pytest.raises(InputError, match="max_length: expected at most 128, got 129"):
        generate(model, long, Decoding(max_length=model.most_response + 1))


@torch.no_grad()
def test_untrained_it_is_the_backbone_as_dialogpt_reads(make, data, gpt2_folder):
    """Its likelihoods are those of transformers' own GPT-2 on turns with an end-of-text token behind each."""
    model = make(joined=False)
    split = model.view(data.test, progress=False)
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    rows = [1, 2, 3, 7]
    nll = model.score(split.batch(rows)).nll
    for row, value in zip(rows, nll, strict=True):
        text = data.test.texts(row)
        turns = [
            " ".join(turn.split()) + tokenizer.eos_token for turn in [*text["context"], text["response"]]
        ]
        encoded = [tokenizer(turn, return_tensors="pt").input_ids for turn in turns]
        ids = torch.cat(encoded, dim=1)
        logits = gpt2(ids).logits[0, -encoded[-1].shape[1] - 1 : -1]
        expected = F.cross_entropy(logits, encoded[-1][0], reduction="sum")
        assert float(value) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_padding_changes_nothing(make, data, strategy):
    model = make(strategy=strategy)
    split = model.view(data.train, progress=False)
    batch = split.batch([0, 5, 10, 15])
    wider = {name: F.pad(getattr(batch, name), (0, 9)) for name in ("context", "intensity", "response")}
    scores, padded = model.score(batch), model.score(batch._replace(**wider))
    alone = [model.score(split.batch([row])) for row in (0, 5, 10, 15)]
    for name in ("guidance", "global_signal", "main_logits", "emotion_attention", "gate"):
        expected = getattr(scores.encoding.perceived, name)
        torch.testing.assert_close(getattr(padded.encoding.perceived, name), expected, rtol=1e-4, atol=1e-5)
        single = torch.cat([getattr(one.encoding.perceived, name) for one in alone])
        torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.nll, scores.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat([one.nll for one in alone]), scores.nll, rtol=1e-5, atol=0)
    assert torch.equal(padded.tokens, scores.tokens)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_cached_steps_equal_whole_responses(make, data, strategy):
    model = make(strategy=strategy)
    batch = model.view(data.train, progress=False).batch([0, 5, 10])
    whole = model(batch)
    cache = model.start(whole.encoding, 30)
    words = torch.full((3,), 2)
    for position in range(min(6, int((batch.response != PAD).sum(1).min()))):
        logits = model.step(words, cache)
        torch.testing.assert_close(logits, whole.logits[:, position], rtol=1e-4, atol=1e-4)
        words = batch.response[:, position]
        if position == 2:  # rows move with all that is kept of them
            order = torch.tensor([2, 0, 1])
            cache.select(order)
            words, batch = words[order], batch._replace(response=batch.response[order])
            whole = whole._replace(logits=whole.logits[order])
    assert cache.length > 3


@torch.no_grad()
def test_answers(make, data):
    model = make()
    batch = model.view(data.test, progress=False).batch(range(8))
    greedy = generate(model, batch, Decoding(max_length=8))
    assert greedy == generate(model, batch, Decoding(method="beam", beams=1, max_length=8))
    special = {*range(OFFSET), OFFSET + model.vocabulary.eos_token}
    beam = generate(model, batch, Decoding(method="beam", max_length=8))
    sampled = generate(model, batch, Decoding(method="sample", temperature=3.0, seed=1, max_length=8))
    assert sampled == generate(model, batch, Decoding(method="sample", temperature=3.0, seed=1, max_length=8))
    for answers in (greedy, beam, sampled):
        assert not special & {word for answer in answers for word in answer}
    reply = pipeline.ECore(model).respond(["I don't like <|endoftext|> it."], max_length=5)
    assert sum(share for _, share in reply.emotions) == pytest.approx(1)
    assert len(reply.relevant) == 3


def test_guidance_and_intensities_matter(make, data):
    for strategy in ("soft", "hard"):
        model = make(strategy=strategy)
        batch = model.view(data.train, progress=False).batch([0, 1, 2, 3])
        guided, bare = model.score(batch), make(joined=False, strategy=strategy).score(batch)
        assert (guided.nll - bare.nll).abs().min() > 1e-3
        calm = model.score(batch._replace(intensity=torch.full_like(batch.intensity, 0.01)))
        assert (
            calm.encoding.perceived.global_signal - guided.encoding.perceived.global_signal
        ).abs().max() > 1e-3
        with torch.no_grad():  # all positions but the first change places
            model.gpt2.wpe.weight[1:] = model.gpt2.wpe.weight[1:].flip(0)
        assert (
            model.score(batch).encoding.perceived.global_signal - guided.encoding.perceived.global_signal
        ).abs().max() > 1e-3
        # From the answers alone, a gradient reaches the graph.
        model.loss(batch).generation.backward()
        layer = model.perceiver.graph_network.layers[0].attention
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@torch.no_grad()
def test_strategy_none_is_the_backbone_alone(make, data):
    plain, guided = make(strategy="none"), make(joined=False)
    assert plain.perceiver is None
    batch = plain.view(data.train, progress=False).batch([0, 1, 2, 3])
    torch.testing.assert_close(plain.score(batch).nll, guided.score(batch).nll)
    losses = plain.loss(batch, health=True)
    assert losses.total == losses.generation
    assert pipeline.ECore(plain).respond(["It was bad."], max_length=4).emotions == []


def test_smoothing_is_spread_over_all_tokens_and_token_0_counts(make, data):
    model = make(label_smoothing=0.2)
    batch = model.view(data.train, progress=False).batch([0, 1])
    batch.response[0, 0] = OFFSET  # the tokenizer's token 0: its end-of-text token here, "!" in GPT-2
    logits = model.output(model._decode(batch, model.encode(batch)))
    log_probability = logits.log_softmax(-1)
    target = model._tokens(batch.response)
    nll = -log_probability.gather(2, target[..., None])[..., 0]
    smoothed = 0.8 * nll - 0.2 * log_probability.mean(-1)
    counted = batch.response != PAD
    losses = model.loss(batch, tokens=int(counted.sum()) + 3)
    torch.testing.assert_close(losses.generation, (smoothed * counted).sum() / 2)
    torch.testing.assert_close(losses.nll, (nll * counted).sum())
    assert losses.tokens == counted.sum()


def test_dropout_reaches_the_backbone(make):
    gpt2 = make(dropout=0.3).gpt2
    assert (gpt2.drop.p, gpt2.h[0].mlp.dropout.p) == (0.3, 0.3)


def test_emotions_are_the_mean_of_their_words_subwords(make):
    model = make()
    subword_ids = model.vocabulary.encode([" joyful"])[0][0]
    assert len(subword_ids) > 1
    row = model.vocabulary.emotions.index("joyful")
    mean = model.gpt2.wte(torch.tensor(subword_ids) - OFFSET).mean(0)
    mixed = (model.gpt2.wte(model.emotion_words[row]) * model.emotion_share[row][:, None]).sum(0)
    torch.testing.assert_close(mixed, mean)


@pytest.mark.parametrize("ablation", ["graph", "co-p", "co-g", "co-loss", "gate-g", "gen-loss"])
def test_ablations_train(make, data, ablation):
    model = make(ablations=(ablation,))
    batch = model.view(data.train, progress=False).batch([0, 1, 2, 3])
    losses = model.loss(batch, health=True)
    losses.generation.backward()
    reached = (
        model.perceiver.graph_network.parameters()
        if ablation != "graph"
        else [model.perceiver.graph_network.query.weight]
    )
    silent = ablation in ("gen-loss", "graph", "co-g")  # co-g: the main emotion is a choice
    assert all((p.grad is None) == silent for p in list(reached)[:2])
    assert losses.total.isfinite()
    words = torch.arange(batch.context.shape[1]) < batch.lengths[:, None]
    words[:, 0] = False
    assert losses.health["dead_edges"] == (batch.intensity[words] == 0).float().mean()


@pytest.fixture
def one_run(data, gpt2_folder, tmp_path):
    """A run of twelve steps in ``tmp_path / "whole"``."""
    config = dataclasses.replace(TINY, backbone=str(gpt2_folder), strategy="hard", dropout=0.1)
    train(tmp_path / "whole", data, config, STEPS, progress=False)
    return tmp_path / "whole", config


def test_resuming_equals_never_having_stopped(one_run, data, tmp_path):
    run, config = one_run
    train(tmp_path / "parts", data, config, dataclasses.replace(STEPS, max_steps=7), progress=False)
    # A run with a checkpoint needs the folder that it was started from no more.
    settings = read_json(tmp_path / "parts" / "config.json")
    settings["model"]["backbone"] = str(tmp_path / "gone")
    (tmp_path / "parts" / "config.json").write_text(json.dumps(settings))
    train(tmp_path / "parts", data, resume=True, max_steps=12, progress=False)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(r)] for r in (run, tmp_path / "parts")]
    assert dict(losses[0]).items() <= dict(losses[1]).items()
    assert losses[0][-1][1] < 0.95 * losses[0][0][1]
    whole, parts = (pretrained.load(r, "last").state_dict() for r in (run, tmp_path / "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_travels_whole(one_run, data, tmp_path):
    run, _ = one_run
    model = pretrained.load(run)
    assert isinstance(model, GPT2ECore)
    assert model.gpt2.config.resid_pdrop == 0.1
    pretrained.save(model, tmp_path / "saved")
    again = pretrained.load(tmp_path / "saved")
    turns = ["Someone broke my awful car."]
    assert pipeline.ECore(again).respond(turns, max_length=6) == pipeline.ECore(model).respond(
        turns, max_length=6
    )
    (tmp_path / "saved" / "backbone" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file$"):
        pretrained.load(tmp_path / "saved")


def test_commands(data, gpt2_folder, tmp_path, capsys):
    run, prepared = str(tmp_path / "run"), str(data.folder)
    flags = ["--preset", "tiny", "--max-steps", "3", "--device", "cpu", "--backbone", str(gpt2_folder)]
    assert main(["train", "--data", prepared, "--out", run, *flags]) == 0
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    size = OFFSET + len(transformers.AutoTokenizer.from_pretrained(gpt2_folder))
    assert f"'subword' vocabulary of {size} subwords" in printed
    assert "Kneser-Ney" not in printed
    assert "naive Bayes" in printed
    assert main(["generate", run, "--text", "My dog died.", "--device", "cpu"]) == 0
    assert "perceived:" in capsys.readouterr().out
    assert main(["train", "--data", prepared, "--out", run + "2", *flags, "--heads", "2"]) == 2
    assert "--heads: of no use with --backbone" in capsys.readouterr().err
    assert main(["train", "--data", prepared, "--out", run + "2", *flags[:-1], str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "its tokenizer has no token for"),
        ("model.safetensors", b"version https://git-lfs", "cannot be loaded"),
        ("config.json", "width", "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(make, gpt2_folder, tmp_path, name, content, message):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    if content is None:
        for file in folder.glob("*token*"):
            file.unlink()
    elif content == "width":  # of another model than the weights
        (folder / name).write_text(json.dumps(read_json(folder / name) | {"n_embd": 64}))
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        make(backbone=str(folder))


def test_every_flipped_bit_of_what_a_run_keeps_of_its_backbone_is_seen(make, tmp_path):
    pretrained.save(make(), tmp_path / "model")
    files = sorted((tmp_path / "model/backbone").iterdir())
    assert {"config.json", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for bit in (1, 8 * len(content) // 2 + 1, 8 * len(content) - 40):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"backbone/{path.name}"):
                pretrained.load(tmp_path / "model")
        path.write_bytes(content)
    (tmp_path / "model/backbone/checksums.json").unlink()  # as of folders made before
    pretrained.load(tmp_path / "model")


def test_what_is_no_gpt2_is_refused(make, gpt2_folder, tmp_path, data, monkeypatch):
    settings = read_json(gpt2_folder / "config.json")
    for change in ({"tie_word_embeddings": False}, {"model_type": "gptj"}):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match="expected a GPT-2 that shares its word embedding"):
            build(dataclasses.replace(TINY, backbone=str(tmp_path)), data, tmp_path)
    tokenizer = make().vocabulary.tokenizer
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="with an end-of-text token"):
        SubwordVocabulary(tokenizer, data.vocabulary)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'ecore\[pretrained\]'"):
        make()


def test_no_code_of_a_folder_runs(make, gpt2_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    for name, change in (
        ("config.json", {"auto_map": names}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
    ):
        (folder / name).write_text(json.dumps(read_json(folder / name) | change))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is trusted
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    make(backbone=str(folder))
    assert not (tmp_path / "ran").exists()


def test_responses_must_fit_the_positions(make, data):
    model = make()
    model.most_response = 5
    with pytest.raises(
        InputError, match=r"test: the response of turn \d of test:\d+ has \d+ subwords, expected at most 5"
    ):
        model.view(data.test, progress=False)


def test_weights_of_few_bits_are_refused(make):
    with pytest.raises(InputError, match="weights: expected float32: with a pre-trained backbone"):
        make().quantize("int8")
    make().quantize("float32")
