"""Layers: torch's own attention with its own weights, DGL's and EGT's layers with theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ecore_kernels.nn import EdgeAttention, EdgeTransformerLayer, biased_mha_weights, egt_weights

pytestmark = pytest.mark.usefixtures("backend")

BATCH, NODES, DIM, HEADS = 2, 6, 8, 2


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def pair(**options) -> tuple[EdgeAttention, nn.MultiheadAttention]:
    """Both attentions with the same weights, none of them 0."""
    theirs = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = EdgeAttention(DIM, HEADS, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_attention(assert_same, batch_first, bias):
    ours, theirs = pair(batch_first=batch_first, bias=bias)
    x = leaf(BATCH, NODES, DIM)
    expected, _ = theirs(x, x, x, need_weights=False)
    actual, new_edge = ours(x, x, x)
    assert new_edge is None
    assert_same([actual], [expected], [x], 1e-11)
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        (one,) = torch.autograd.grad(ours(x)[0].square().sum(), parameter)
        (wanted,) = torch.autograd.grad(theirs(x, x, x)[0].square().sum(), other)
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("of_heads", [True, False])
def test_torchs_masks_and_other_senders(assert_same, of_heads, additive):
    ours, theirs = pair(batch_first=True)
    query, key, value = leaf(BATCH, NODES, DIM), leaf(BATCH, 9, DIM), leaf(BATCH, 9, DIM)
    mask = torch.rand((BATCH * HEADS, NODES, 9) if of_heads else (NODES, 9)) > 0.7
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[1, 6:] = True
    mask[..., 0] = False
    if additive:
        mask = torch.where(mask, float("-inf"), torch.randn(mask.shape, dtype=torch.float64))
        padding = torch.zeros(BATCH, 9, dtype=torch.float64).masked_fill(padding, float("-inf"))
    options = {"key_padding_mask": padding, "attn_mask": mask}
    expected, _ = theirs(query, key, value, need_weights=False, **options)
    actual, _ = ours(query, key, value, **options)
    assert_same([actual], [expected], [query, key, value], 1e-11)


def test_dropout_is_for_training():
    ours = EdgeAttention(DIM, HEADS, 0.5, batch_first=True).double()
    x = leaf(BATCH, NODES, DIM)
    assert not ours(x, seed=1)[0].equal(ours(x, seed=2)[0])
    ours.eval()
    assert ours(x, seed=1)[0].equal(ours(x, seed=2)[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"query": torch.ones(2, 8)}, r"query: expected \[N, B, D\] with D = 8, got \[2, 8\]"),
        ({"query": torch.ones(3, 2, 8), "key": torch.ones(3, 2, 7)}, "key: expected"),
        (
            {"query": torch.ones(3, 2, 8), "attn_mask": torch.ones(3, 4)},
            r"attn_mask: it does not fit 2 batches of 3 receivers and 3 senders with 2 heads, got \[3, 4\]",
        ),
    ],
)
def test_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^EdgeAttention: {message}"):
        EdgeAttention(DIM, HEADS)(**arguments)


def test_unequal_heads_are_refused():
    with pytest.raises(
        ValueError, match="EdgeAttention: embed_dim: expected a positive multiple of the heads"
    ):
        EdgeAttention(7, 2)


def test_weights_of_biased_mha(assert_same):
    """DGL's BiasedMHA: four projections, a bias [B, N, N, H] that is added."""
    state = {f"{p}_proj.weight": leaf(DIM, DIM).detach() for p in ("q", "k", "v", "out")}
    state |= {f"{p}_proj.bias": leaf(DIM).detach() for p in ("q", "k", "v", "out")}
    x, bias = leaf(BATCH, NODES, DIM), leaf(BATCH, NODES, NODES, HEADS)

    def projected(name: str, of: Tensor) -> Tensor:
        return of @ state[f"{name}_proj.weight"].T + state[f"{name}_proj.bias"]

    query, key, value = (projected(p, x).view(BATCH, NODES, HEADS, -1) for p in "qkv")
    scores = torch.einsum("bihd,bjhd->bijh", query, key) * (DIM // HEADS) ** -0.5 + bias
    attended = torch.einsum("bijh,bjhd->bihd", scores.softmax(2), value)
    expected = projected("out", attended.flatten(2))

    ours = EdgeAttention(DIM, HEADS, batch_first=True).double()
    ours.load_state_dict(biased_mha_weights(state))
    actual, _ = ours(x, bias=bias.permute(0, 3, 1, 2))
    assert_same([actual], [expected], [x, bias], 1e-11)


def test_weights_of_egt(assert_same):
    """An EGT layer without gates, heads last in every projection."""
    edge_dim, hidden = 5, 2
    shapes = {
        "lin_QKV": (3 * DIM, DIM), "lin_E": (HEADS, edge_dim), "lin_G": (HEADS, edge_dim), "lin_O_h": (DIM, DIM),
        "lin_O_e": (edge_dim, HEADS), "lin_W_h_1": (hidden * DIM, DIM), "lin_W_h_2": (DIM, hidden * DIM),
        "lin_W_e_1": (hidden * edge_dim, edge_dim), "lin_W_e_2": (edge_dim, hidden * edge_dim),
        "mha_ln_h": (DIM,), "mha_ln_e": (edge_dim,), "ffn_ln_h": (DIM,), "ffn_ln_e": (edge_dim,),
    }  # fmt: skip
    state = {f"{name}.weight": leaf(*shape).detach() for name, shape in shapes.items()}
    state |= {f"{name}.bias": leaf(shape[0]).detach() for name, shape in shapes.items()}
    nodes, edges = leaf(BATCH, NODES, DIM), leaf(BATCH, NODES, NODES, edge_dim)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def feed_forward(of: str, x: Tensor) -> Tensor:
        return x + linear(
            f"lin_W_{of}_2", nn.functional.elu(linear(f"lin_W_{of}_1", norm(f"ffn_ln_{of}", x)))
        )

    head_dim = DIM // HEADS
    split = linear("lin_QKV", norm("mha_ln_h", nodes)).view(BATCH, NODES, -1, HEADS).split(head_dim, 2)
    query, key, value = split  # [B, N, d, H] each
    scores = (head_dim**-0.5 * torch.einsum("bldh,bmdh->blmh", query, key)).clamp(-5, 5)
    scores = scores + linear("lin_E", norm("mha_ln_e", edges))
    attended = torch.einsum("blmh,bmkh->blkh", scores.softmax(2), value).reshape(BATCH, NODES, DIM)
    expected = (
        feed_forward("h", nodes + linear("lin_O_h", attended)),
        feed_forward("e", edges + linear("lin_O_e", scores)),
    )

    ours = EdgeTransformerLayer(DIM, HEADS, edge_dim).double()
    ours.load_state_dict(egt_weights(state, HEADS))
    assert_same(ours(nodes, edges), expected, [nodes, edges], 1e-10)


def test_a_layer_can_leave_edges_alone():
    layer = EdgeTransformerLayer(DIM, HEADS, 3, update_edges=False).double()
    nodes, edges = leaf(BATCH, NODES, DIM), leaf(BATCH, NODES, NODES, 3)
    output, same = layer(nodes, edges, torch.rand(NODES, NODES) > 0.5)
    assert same is edges
    assert output.shape == nodes.shape


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_transformer_layer_in_half_precision(kind, backend):
    if backend == "interpreter" and kind is torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")
    layer = EdgeTransformerLayer(DIM, HEADS, 4).to(kind)
    given = torch.randn(BATCH, NODES, DIM, dtype=kind), torch.randn(BATCH, NODES, NODES, 4, dtype=kind)
    found, expected = layer(*given), layer.float()(*(x.float() for x in given))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is kind
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)
