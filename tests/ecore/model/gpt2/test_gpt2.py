"""E-CORE around a GPT-2: what the model computes."""

import pytest
import torch
import torch.nn.functional as F

from ecore import pipeline
from ecore.data.vocabulary import PAD
from ecore.errors import InputError
from ecore.generation.decoding import Decoding
from ecore.generation.search import generate

transformers = pytest.importorskip("transformers", reason="needs the extra `pretrained`")

from ecore.data.subwords.vocabulary import OFFSET  # noqa: E402


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


def test_weights_of_few_bits_are_refused(make):
    with pytest.raises(InputError, match="weights: expected float32: with a pre-trained backbone"):
        make().quantize("int8")
    make().quantize("float32")
