"""The operators' benchmark problems: inputs as documented, an oracle that is right and that refuses what is wrong."""

import dataclasses
import functools

import pytest
import torch

from benchmarks.operators import candidates, floors, problems
from benchmarks.operators.problems import Problem

CASES = [
    ("graph_attention", 0),
    ("graph_attention", 1),
    ("graph_attention", 2),
    ("edge_readout", 2),
    ("edge_attention", 0),
    ("edge_attention", 1),
]


def small(operator="graph_attention", depth=1, **options):
    return dataclasses.replace(
        Problem(operator, 17, batch=2, resolutions=3, emotions=4, dim=6, depth=depth), **options
    )


@pytest.mark.parametrize("masks", problems.MASKS)
def test_inputs_have_the_models_layout_and_repeat(masks):
    problem = small(masks=masks, precision="bfloat16")
    tensors = problems.draw(problem, 3, "cpu")
    for name in ("query", "key", "value", "query0", "key0"):
        assert tensors[name].shape == (2, 3, 17, 6)
        assert tensors[name].dtype == torch.bfloat16
        assert tensors[name].transpose(1, 2).is_contiguous()
    assert tensors["upstream0"].dtype == torch.bfloat16
    assert tensors["gate0"].dtype == torch.float32
    again, other = problems.draw(problem, 3, "cpu"), problems.draw(problem, 4, "cpu")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert not torch.equal(tensors["query"], other["query"])


def test_words_take_part_as_documented():
    everyone = problems.draw_graph(Problem("graph_attention", 160), torch.Generator().manual_seed(0))
    assert bool(everyone.participants().all())
    problem = Problem("graph_attention", 288, batch=4000, masks="real")
    graph = problems.draw_graph(problem, torch.Generator().manual_seed(0))
    coarse, fine, finest = graph.word_mask[1:].unbind(1)
    lengths = coarse.sum(1)
    assert graph.word_mask[0, 0].all()  # the longest
    assert float(lengths.float().mean()) == pytest.approx(38, abs=1.5)
    assert float(lengths.float().quantile(0.9)) == pytest.approx(67, abs=3)
    for mask, expected, wider in ((fine, 2.0, coarse), (finest, 1.5, fine)):
        assert mask[:, 0].all()
        assert not (mask & ~wider).any()
        assert float(mask.sum(1).float().mean()) == pytest.approx(expected, abs=0.08)
    # A zero would hide a mistake in the weight of its word.
    assert float(graph.word_weight[1:][coarse & (torch.arange(256) > 0)].min()) > 0


def test_short_batches_are_not_cut_long_ones():
    """Padded to 32 words, a batch holds contexts of up to 32, and not longer ones cut off there."""
    lengths = problems.draw_lengths(4000, 32, torch.Generator().manual_seed(0))
    assert int(lengths[0]) == 32
    assert 2 <= int(lengths.min()) <= int(lengths.max()) <= 32
    assert float((lengths == 32).float().mean()) < 0.08
    assert problems.draw_lengths(3, 1, torch.Generator().manual_seed(0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("operator, depth", CASES)
def test_the_reference_passes_and_a_wrong_answer_does_not(monkeypatch, operator, depth, slices):
    if slices:
        monkeypatch.setattr(problems, "LARGEST_FULL_CHECK", 16)
        monkeypatch.setattr(problems, "RECEIVERS_CHECKED", 5)
    problem = small(operator, depth, masks="real" if depth == 1 else "all")
    problems.set_precision("ieee")
    tensors = problems.draw(problem, 0, "cpu")
    oracle = problems.oracle(problem, tensors, backward=True)
    assert (oracle.receivers is not None) == (slices and operator != "edge_readout")
    candidate = candidates.build("reference", problem, "cpu", backward=True)
    outputs, gradients = candidates.outputs_and_gradients(candidate, tensors, oracle.upstream, backward=True)
    assert set(gradients) == set(problem.leaves)
    errors = oracle.errors(outputs, gradients)
    assert len(errors) == len(outputs) + len(problem.leaves)
    assert max(max(pair) for pair in errors.values()) < problems.LIMITS["ieee"]

    for name in problem.leaves:
        wrong = gradients | {name: gradients[name] * 1.001}
        assert oracle.errors(outputs, wrong)[f"gradient of {name}"][0] > problems.LIMITS["ieee"]
    for index, output in enumerate(outputs):
        spoiled = output.clone()
        spoiled[(0,) * output.dim()] += 1.0
        found = oracle.errors([spoiled if i == index else x for i, x in enumerate(outputs)], gradients)
        assert found[f"output{index}"][1] > 10 * problems.LIMITS["ieee"]
        spoiled[(0,) * output.dim()] = float("nan")
        found = oracle.errors([spoiled if i == index else x for i, x in enumerate(outputs)], gradients)
        assert found[f"output{index}"] == (float("inf"), float("inf"))


@pytest.mark.parametrize("operator, depth", CASES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["reference", "compiled", "flex"])
def test_every_candidate_gives_the_same_answer(monkeypatch, operator, depth, backward, name):
    """Without the compiler, whose work is the same: that is tested below, once."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = small(operator, depth, masks="real")
    reads_scores = operator == "edge_readout" or (operator == "edge_attention" and depth == 1)
    if name == "flex" and (reads_scores or backward):
        why = "returns no scores" if reads_scores else "has no backward on CPU"
        with pytest.raises(candidates.UnsupportedError, match=why):
            candidates.build(name, problem, "cpu", backward)
        return
    candidate = candidates.build(name, problem, "cpu", backward)
    tensors = problems.draw(problem, 0, "cpu")
    oracle = problems.oracle(problem, tensors, backward)
    answer = candidates.outputs_and_gradients(candidate, tensors, oracle.upstream, backward)
    errors = oracle.errors(*answer)
    assert max(max(pair) for pair in errors.values()) < problems.LIMITS["ieee"]
    sets = [candidate.prepare(problems.draw(problem, seed, "cpu")) for seed in (0, 1)]
    call = candidates.timed_call(candidate, sets, backward)
    first, second, third = (call(number)[0] for number in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("name, compiler", [("flex", "inductor"), ("compiled", "aot_eager")])
def test_compiled_candidates_do_not_recompile_for_other_inputs(monkeypatch, name, compiler):
    """FlexAttention's lowering has demands of its own, so it gets the real compiler; that takes many seconds."""
    if compiler == "aot_eager" and torch.__version__ < (2, 8):
        pytest.skip("torch 2.7 takes the result of nan_to_num for contiguous, which aot_eager relies on")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    problem = small(masks="real")
    candidate = candidates.build(name, problem, "cpu", backward=False)
    for seed, masks in enumerate(problems.MASKS):
        this = dataclasses.replace(problem, masks=masks)
        tensors = problems.draw(this, seed, "cpu")
        oracle = problems.oracle(this, tensors, backward=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            answer = candidates.outputs_and_gradients(candidate, tensors, oracle.upstream, backward=False)
        assert max(max(pair) for pair in oracle.errors(*answer).values()) < problems.LIMITS["ieee"]


def test_flex_gradient_of_dense_edges_is_carried_on():
    """FlexAttention cannot compute the edges' gradient on a CPU; the reference's reaches the same leaves."""
    problem = small(depth=0, masks="real")
    tensors = problems.draw(problem, 0, "cpu")
    oracle = problems.oracle(problem, tensors, backward=True)
    flex = candidates._flex(problem, "cuda", backward=True)
    dense = dataclasses.replace(problem, operator="edge_attention")
    edge, neighbors = problems.graph_of(tensors).dense()
    tensors |= {"edge": edge, "neighbors": neighbors}
    reference = candidates.build("reference", dense, "cpu", backward=True)
    outputs, gradients = candidates.outputs_and_gradients(reference, tensors, oracle.upstream, backward=True)
    assert set(gradients) == set(flex.leaves)
    errors = oracle.errors(outputs, flex.finish(tensors, gradients))
    assert set(errors) == {"output0", *(f"gradient of {name}" for name in problem.leaves)}
    assert max(max(pair) for pair in errors.values()) < problems.LIMITS["ieee"]


def test_a_cpus_memory_is_not_filled():
    huge = Problem("graph_attention", 200_000, batch=1)
    for name in ("reference", "compiled", "flex"):
        with pytest.raises(candidates.UnsupportedError, match="GiB of memory"):
            candidates.build(name, huge, "cpu", backward=False)


@pytest.mark.parametrize("masks", problems.MASKS)
def test_counted_pairs_are_the_graphs(masks):
    problem = small(masks=masks)
    tensors = problems.draw(problem, 0, "cpu")
    graph = problems.graph_of(tensors)
    neighbors = graph.dense()[1]
    emotional = int(neighbors[..., problem.words :].sum())
    expected = (int(graph.participants().sum()), int(neighbors.sum()), emotional)
    assert floors.pairs(problem, tensors["word_mask"]) == expected


def test_work_is_counted_by_hand():
    problem = small("graph_attention", 1)
    tensors = problems.draw(problem, 0, "cpu")
    nodes, pairs, _ = floors.pairs(problem, tensors["word_mask"])
    rows = 4 * 6 * nodes
    small_inputs = 4 * (2 * 13 + 2 * 4 + 4 * 4) + 2 * 3 * 13
    forward = floors.work(problem, tensors, backward=False)
    assert forward.operations == 2 * 6 * 3 * pairs
    assert forward.bytes == 6 * rows + small_inputs + 4 * nodes
    both = floors.work(problem, tensors, backward=True)
    assert both.operations == 2 * 6 * (3 + 8) * pairs
    # Inputs again, upstream and output, gradients of five tensors, of the gate and of the graph.
    assert both.bytes == 2 * forward.bytes + rows + 5 * rows + 4 * nodes + small_inputs
    assert floors.floor(forward, floors.Ceilings(forward.bytes / 2, forward.operations)) == (2.0, "memory")
    assert floors.floor(forward, floors.Ceilings(forward.bytes, forward.operations / 3)) == (
        3.0,
        "arithmetic",
    )
