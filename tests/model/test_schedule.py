"""Shared and routed blocks run concurrently: the same numbers, from parts that are whole graphs."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from molcli.kernels import backend
from molcli.kernels.segment_attention import segment_attention_reference
from molcli.model import schedule
from molcli.model.decoding.graphs import ForwardGraphs
from molcli.model.schedule import ConcurrentSchedule


def concurrent(model, monkeypatch, compile_part):
    """Make a schedule whose parts `compile_part` compiles."""
    monkeypatch.setattr(schedule, "compile_part", compile_part)
    return ConcurrentSchedule(model.device, {})


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(restrict_attention=False),
        dict(num_shared_blocks=0),
        dict(num_blocks=2, num_blocks_per_tok=0),
    ],
)
@torch.no_grad()
def test_parts_one_after_the_other_are_the_layer(make_model, monkeypatch, changes):
    model = make_model(**changes)
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = model.model(ids, use_cache=False)
    model.model.schedule = concurrent(model, monkeypatch, lambda part: part)
    parts = model.model(ids, use_cache=False)
    assert torch.equal(parts.last_hidden_state, whole.last_hidden_state)
    assert len(parts.routing) == len(whole.routing)
    for a, b in zip(parts.routing, whole.routing, strict=True):
        assert torch.equal(a.blocks, b.blocks) and torch.equal(a.weights, b.weights)


@torch.no_grad()
def test_parts_run_in_calls_to_record_and_nowhere_else(make_model, monkeypatch):
    model = make_model(layer_structures=["mixture"] * 3, layer_mixers=["attention"] * 3).eval()
    begun = []
    concurrent(model, monkeypatch, lambda part: lambda *args: begun.append(part) or part(*args))
    graphs = ForwardGraphs(model)
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    graphs(ids, use_cache=False)  # on a CPU
    assert not begun
    monkeypatch.setattr(ForwardGraphs, "_ids", lambda self, ids, **_: ids)
    graphs(ids, use_cache=False)
    assert len(begun) == 3 * len(model.model.layers)
    model(ids, use_cache=False)
    assert len(begun) == 3 * len(model.model.layers)


def test_parts_are_whole_graphs_for_all_layers(make_model, monkeypatch):
    """As on a GPU, but that the kernel inside the operator is stood in for."""
    kernels = pytest.importorskip("molcli.kernels.segment_attention.triton_kernels")

    def stand_in(q, k, v, segments, cu_seqlens):
        return segment_attention_reference(q, k, v, cu_seqlens), q.new_zeros(q.shape[:2]).float()

    monkeypatch.setattr(kernels, "forward", stand_in)
    monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype in backend.DTYPES)
    # One routed block: grouped products of several would go block by block on a CPU.
    blocks = dict(num_blocks=2, num_shared_blocks=1, num_blocks_per_tok=1)
    widths = dict(head_dim=16, d_thin=32)
    model = make_model(
        layer_structures=["mixture"] * 3,
        layer_mixers=["attention"] * 3,
        dtype=torch.float16,
        **blocks,
        **widths,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(97, (2, length), generator=generator) for length in (24, 30, 36)]

    def run():
        found = []
        for ids in texts:  # documents of one length would be a batch
            documents = torch.arange(ids.shape[1]).ge(9).long().expand_as(ids)
            out = model.model(ids, document_ids=documents, use_cache=False)
            found.append(out.last_hidden_state)
        return found

    with torch.no_grad():
        eager = run()
        counter = CompileCounter()
        compile_part = partial(torch.compile, backend=counter, fullgraph=True)
        model.model.schedule = concurrent(model, monkeypatch, compile_part)
        torch.testing.assert_close(run(), eager, rtol=0, atol=0)
    assert counter.frame_count <= 2 * 3  # of each part, for the first length and for any


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "gated_deltanet"])
@torch.no_grad()
def test_a_graph_with_two_streams_repeats_itself(make_model, kind):
    """Were memory used on one stream while the other still reads it, bits would change."""
    settings = dict(
        layer_kinds=[kind] * 6,
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        d_thin=256,
        d_ff_thin=512,
        initializer_range=0.05,
    )
    model = make_model(device="cuda", dtype=torch.bfloat16, **settings).eval()
    plain = make_model(device="cuda", dtype=torch.bfloat16, **settings).eval()
    exact = make_model(device="cuda", **settings).eval()
    for one in (plain, exact):
        one.load_state_dict(model.state_dict())
    model.compile()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(97, (1, 4096), generator=generator).cuda() for _ in range(2)]
    model(texts[0], use_cache=False)  # compiles
    first = [model(text, use_cache=False).logits for text in texts]
    assert len(model._compiled_call_impl.recorded) == 1
    for text, found in zip(texts, first, strict=True):
        eager, right = (one(text, use_cache=False).logits.float() for one in (plain, exact))
        error, allowed = ((x.float() - right).norm() / right.norm() for x in (found, eager))
        print(f"{kind}: {error:.4f} (eager bf16 {allowed:.4f})")
        assert error < 2 * allowed
    assert not torch.equal(*first)
    for _ in range(20):
        for text, found in zip(texts, first, strict=True):
            assert torch.equal(model(text, use_cache=False).logits, found)
