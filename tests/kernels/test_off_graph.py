"""Values off the graph are never read: NaN and infinity there change no bit of any result or gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecore_kernels import EdgeUpdate, EmotionGraph, edge_attention, edge_readout, graph_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning"
)  # NumPy's, under the interpreter

NAN, INFINITY = float("nan"), float("inf")
SMALL = (2, 5, 4)  # batch, words, emotions
LARGE = (1, 300, 34)  # more than one of the native kernels' tiles each way
LAYERS = 2


@pytest.fixture(params=[(SMALL, NAN), (SMALL, INFINITY), (SMALL, -INFINITY), (LARGE, NAN)], ids=str)
def setting(request: pytest.FixtureRequest, backend: str) -> tuple[tuple[int, int, int], float]:
    """Sizes, and what stands off the graph."""
    if backend == "interpreter":
        if request.param[0] is LARGE or request.param[1] != INFINITY:
            pytest.skip("the interpreter is slow: it gets infinity alone, which times 0 is NaN")
        return (1, 4, 3), INFINITY
    return request.param


@pytest.fixture
def size(setting: tuple[tuple[int, int, int], float]) -> tuple[int, int, int]:
    return setting[0]


@pytest.fixture
def poison(setting: tuple[tuple[int, int, int], float]) -> float:
    return setting[1]


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that results by name are equal, and finite."""
    differing = [name for name, x in expected.items() if not torch.equal(actual[name], x)]
    assert not differing
    assert all(x.isfinite().all() for x in expected.values())


def placed(tensors: dict[str, Tensor], where: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    """The tensors with ``value`` where the masks are true."""
    return tensors | {name: tensors[name].masked_fill(mask, value) for name, mask in where.items()}


def answer(call, tensors: dict[str, Tensor], leaves: list[str]) -> dict[str, Tensor]:
    """Outputs and gradients by name; ``tensors`` has the outputs' gradients as upstream0, ..."""
    asked = tensors | {name: tensors[name].detach().requires_grad_() for name in leaves}
    outputs = call(asked)
    upstream = [tensors[f"upstream{number}"] for number in range(len(outputs))]
    gradients = torch.autograd.grad(outputs, [asked[name] for name in leaves], upstream)
    found = {f"output {number}": x.detach() for number, x in enumerate(outputs)}
    return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


# The emotion graph ------------------------------------------------------------------------------------------


def graph_problem(size: tuple[int, int, int], *, shared: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Inputs of the graph operators, and names of those that get gradients. All but one emotion take part somewhere."""
    batch, words, emotions = size
    lead = (batch, 2, words + emotions)
    word_mask = torch.rand(batch, 2, words) > 0.4
    word_mask[:, :, 2] = False  # a word that is out everywhere
    word_mask[:, :, 0] = False  # [CLS] takes part whatever stands there
    emotion_mask = torch.rand(batch, emotions) > 0.4
    emotion_mask[:, 0], emotion_mask[:, 1] = True, False
    tensors = {
        "word_weight": torch.rand(batch, words),
        "word_mask": word_mask,
        "emotion_weight": torch.rand(batch, emotions),
        "correlation": torch.rand(emotions, emotions) if shared else torch.rand(batch, emotions, emotions),
        "emotion_mask": emotion_mask,
        "query": torch.randn(*lead, 7),
        "key": torch.randn(*lead, 7),
        "value": torch.randn(*lead, 9),
    }
    for m in range(LAYERS):
        tensors |= {f"{name}{m}": torch.randn(*lead, 7) for name in ("query", "key")}
        tensors |= {f"gate{m}": torch.randn(lead), f"edge_scale{m}": torch.tensor(0.7)}
    return tensors, [name for name in tensors if name not in ("word_weight", "word_mask", "emotion_mask")]


def graph_of(tensors: dict[str, Tensor]) -> EmotionGraph:
    names = ("word_weight", "word_mask", "emotion_weight", "correlation", "emotion_mask")
    return EmotionGraph(*(tensors[name] for name in names))


def history_of(tensors: dict[str, Tensor]) -> list[EdgeUpdate]:
    names = ("query", "key", "gate", "edge_scale")
    return [EdgeUpdate(*(tensors[f"{name}{m}"] for name in names)) for m in range(LAYERS)]


def attention(receivers: str):
    def call(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        nodes = [tensors[name] for name in ("query", "key", "value")]
        history = history_of(tensors)
        return (graph_attention(*nodes, graph_of(tensors), history, scale=0.3, receivers=receivers),)

    return call


def readout(per_word: bool):
    def call(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return edge_readout(graph_of(tensors), history_of(tensors), scale=0.3, per_word=per_word)

    return call


def absent(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Masks, by input, of what takes no part."""
    out = ~graph_of(tensors).participants()  # [B, K, N]
    words = tensors["word_mask"].shape[2]
    nobody = ~tensors["emotion_mask"]  # [B, P]
    if place == "queries, keys and values":
        names = [name for name in tensors if name.startswith(("query", "key", "value"))]
        return dict.fromkeys(names, out[..., None])
    if place == "gates":
        return {f"gate{m}": out for m in range(LAYERS)}
    if place == "weights of words":
        everywhere = out[:, :, :words].all(1)
        everywhere[:, 0] = True  # [CLS] sends 1, whatever stands there
        return {"word_weight": everywhere}
    if place == "weights of emotions":
        return {"emotion_weight": nobody}
    between = torch.eye(nobody.shape[1], dtype=torch.bool) | nobody[:, :, None] | nobody[:, None]
    return {"correlation": between if tensors["correlation"].dim() == 3 else between.all(0)}


PLACES = ["queries, keys and values", "gates", "weights of words", "weights of emotions", "correlation"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("receivers", ["all", "words"])
def test_what_takes_no_part_in_attention(size, poison, place, receivers):
    tensors, leaves = graph_problem(size, shared=receivers == "all")
    rows = size[1] if receivers == "words" else size[1] + size[2]
    tensors["upstream0"] = torch.randn(size[0], 2, rows, 9)
    where = absent(tensors, place)
    results = [answer(attention(receivers), placed(tensors, where, x), leaves) for x in (poison, 0.0)]
    same_bits(*results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("per_word", [False, True])
def test_what_takes_no_part_in_the_readout(size, poison, place, per_word):
    batch, words, emotions = size
    tensors, leaves = graph_problem(size, shared=not per_word)
    leaves = [name for name in leaves if name not in ("query", "key", "value")]
    tensors["upstream0"] = torch.randn(batch, words, emotions) if per_word else torch.randn(batch, emotions)
    tensors["upstream1"] = torch.randn(batch, emotions, emotions)
    where = absent(tensors, place)
    results = [answer(readout(per_word), placed(tensors, where, x), leaves) for x in (poison, 0.0)]
    same_bits(*results)


@pytest.mark.parametrize("receivers", ["all", "words"])
def test_gradients_of_rows_that_take_no_part(size, poison, receivers):
    tensors, leaves = graph_problem(size, shared=True)
    out = ~graph_of(tensors).participants()[..., None]
    out = out[:, :, : size[1]] if receivers == "words" else out
    tensors["upstream0"] = torch.randn(*out.shape[:3], 9)
    results = [
        answer(attention(receivers), placed(tensors, {"upstream0": out}, x), leaves) for x in (poison, 0.0)
    ]
    same_bits(*results)


def test_gradients_of_edges_that_are_not_there(size, poison):
    """The readout's: of words and emotions that take no part in any resolution, and of the diagonal."""
    _, words, emotions = size
    tensors, leaves = graph_problem(size, shared=True)
    leaves = [name for name in leaves if name not in ("query", "key", "value")]
    out = (~graph_of(tensors).participants()).all(1)  # [B, N]
    off = out[:, :, None] | out[:, None, words:]
    off[:, words:] |= torch.eye(emotions, dtype=torch.bool)
    tensors["upstream0"], tensors["upstream1"] = torch.randn(off.shape).split([words, emotions], dim=1)
    where = {"upstream0": off[:, :words], "upstream1": off[:, words:]}
    results = [answer(readout(True), placed(tensors, where, x), leaves) for x in (poison, 0.0)]
    same_bits(*results)


def test_a_value_that_some_hear_changes_no_other_row(size, poison, backend):
    if backend in ("interpreter", "cuda"):
        pytest.skip("its kernels multiply whole tiles: what is not finite reaches those beside who hears it")
    tensors, _ = graph_problem(size, shared=True)
    batch, words, emotions = size
    tensors["word_mask"][:, :, 3:] = True
    tensors["upstream0"] = torch.randn(batch, 2, words + emotions, 9)
    _, neighbors = graph_of(tensors).dense()
    hears = neighbors[..., 3]  # words after it, and [CLS]
    assert hears.any()
    assert not hears.all()
    spoilt, clean = (
        tensors | {"value": tensors["value"].index_fill(2, torch.tensor([3]), x)} for x in (poison, 0.0)
    )
    results = [answer(attention("all"), x, ["query"]) for x in (spoilt, clean)]
    for name in results[0]:
        assert torch.equal(results[0][name][~hears], results[1][name][~hears])
    assert not results[0]["output 0"][hears].isfinite().any(-1).any()


# Any dense graph --------------------------------------------------------------------------------------------


def dense_problem(size: tuple[int, int, int], *, shared: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Inputs of edge_attention: a row that hears nobody, a sender that nobody hears; names of those with gradients."""
    batch, nodes = size[0], size[1] + size[2]
    lead = (batch, 2, nodes)
    neighbors = torch.rand(*((1, 1, nodes) if shared else lead), nodes) > 0.5
    neighbors[..., 1, :] = neighbors[..., 3] = False
    neighbors[..., 0, :3] = torch.tensor([True, True, False])  # the third is heard by some
    neighbors[..., 2, 2] = True
    tensors = {
        "query": torch.randn(*lead, 7),
        "key": torch.randn(*lead, 7),
        "value": torch.randn(*lead, 9),
        "edge": torch.randn(*((nodes,) if shared else lead), nodes),
        "gate": torch.randn(lead),
        "edge_scale": torch.tensor(0.7),
        "neighbors": neighbors,
        "upstream0": torch.randn(*lead, 9),
        "upstream1": torch.randn(*lead, nodes),
    }
    return tensors, ["query", "key", "value", "edge", "gate", "edge_scale"]


def dense(updated: bool):
    def call(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        of = tensors
        update = {name: of[name] for name in ("gate", "edge_scale")} if updated else {}
        outputs = edge_attention(
            of["query"], of["key"], of["value"], of["edge"], of["neighbors"], **update, scale=0.3
        )
        return tuple(x for x in outputs if x is not None)

    return call


def off_neighbors(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Masks, by input, of what is off the graph."""
    off = ~tensors["neighbors"]
    mute, silent = off.all(-2)[..., None], off.all(-1, keepdim=True)
    return {
        "edges": {"edge": off if tensors["edge"].dim() == 4 else off[0, 0]},
        "senders": {"key": mute, "value": mute},
        "receivers": {"query": silent},
        "gates": {"gate": silent[..., 0]},
        "gradients of outputs": {"upstream0": silent},
        "gradients of new edges": {"upstream1": off},
    }[place]


@pytest.mark.parametrize(
    "place", ["edges", "senders", "receivers", "gates", "gradients of outputs", "gradients of new edges"]
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("updated", [False, True])
def test_what_is_off_the_graph_of_edge_attention(size, poison, place, shared, updated):
    if not updated and place in ("gates", "gradients of new edges"):
        pytest.skip("not among the inputs")
    tensors, leaves = dense_problem(size, shared=shared)
    leaves = leaves if updated else leaves[:4]
    where = off_neighbors(tensors, place)
    results = [answer(dense(updated), placed(tensors, where, x), leaves) for x in (poison, 0.0)]
    same_bits(*results)


def test_a_value_that_some_hear_changes_no_other_row_of_edge_attention(size, poison):
    tensors, _ = dense_problem(size, shared=False)
    hears = tensors["neighbors"][..., 2]
    assert hears.any()
    assert not hears.all()
    spoilt, clean = (
        tensors | {"value": tensors["value"].index_fill(2, torch.tensor([2]), x)} for x in (poison, 0.0)
    )
    results = [answer(dense(True), x, ["query", "edge", "gate"]) for x in (spoilt, clean)]
    for name in results[0]:
        assert torch.equal(results[0][name][~hears], results[1][name][~hears])
    assert not results[0]["output 0"][hears].isfinite().any(-1).any()
