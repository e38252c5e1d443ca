"""Compiled layers compute what eager ones do, from one graph for all layers."""

import pytest
import torch

from molcli.kernels import backend
from molcli.kernels.segment_attention import segment_attention_reference
from molcli.model.compiled import compile_layers


def test_the_choice_of_kernels_is_no_cut_in_a_graph():
    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        return x + backend.use_triton(x)

    assert torch.equal(chosen(torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize("kind", ["softmax", "dense"])
def test_layers_of_ragged_documents_are_whole_graphs(make_model, monkeypatch, kind):
    """As on a GPU, but that the kernel inside the operator is stood in for."""
    kernels = pytest.importorskip("molcli.kernels.segment_attention.triton_kernels")

    def stand_in(q, k, v, segments, cu_seqlens):
        return segment_attention_reference(q, k, v, cu_seqlens), q.new_zeros(q.shape[:2]).float()

    monkeypatch.setattr(kernels, "forward", stand_in)
    monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype in backend.DTYPES)
    # One routed block: grouped products of several would go block by block on a CPU.
    blocks = dict(num_blocks=2, num_shared_blocks=1, num_blocks_per_tok=1)
    if kind == "dense":
        blocks = {}
    widths = dict(head_dim=16, d_thin=32)
    model = make_model(layer_kinds=[kind] * 3, dtype=torch.float16, **blocks, **widths).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(model.config.vocab_size, (2, 24), generator=generator),
            torch.randint(count, (2, 24), generator=generator).sort(dim=1).values,
        )
        for count in (3, 5, 4)
    ]

    def run():
        with torch.no_grad():
            return [
                model.model(ids, document_ids=documents, use_cache=False).last_hidden_state
                for ids, documents in batches
            ]

    eager = run()
    counter = torch._dynamo.testing.CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for found, right in zip(run(), eager, strict=True):
        torch.testing.assert_close(found, right)
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "dense"])
def test_compiled_layers_equal_eager_ones(make_model, kind):
    settings = dict(layer_kinds=[kind] * 4, num_hidden_layers=4, hidden_size=128, d_thin=64)
    model = make_model(**settings).to("cuda").train()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(model.config.vocab_size, (32, 512), generator=generator).cuda(),
            torch.randint(count, (32, 512), generator=generator).sort(dim=1).values.cuda(),
        )
        for count in (1, 3, 5, 4)
    ]

    def run(ids, documents, *, low):
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            out = model.model(ids, document_ids=documents, use_cache=False).last_hidden_state
        gradients = torch.autograd.grad(out.square().mean(), list(model.model.layers.parameters()))
        return [out, *gradients]

    exact = [run(*batch, low=False) for batch in batches]
    eager = [run(*batch, low=True) for batch in batches]
    torch._dynamo.utils.counters.clear()
    compile_layers(model)
    compiled = [run(*batch, low=True) for batch in batches]
    for right, slow, fast in zip(exact, eager, compiled, strict=True):
        errors = [
            sum(float((a - b).norm() ** 2) for a, b in zip(x, right, strict=True)) ** 0.5
            for x in (slow, fast)
        ]
        print(f"{kind}: compiled error {errors[1]:.4f}, eager {errors[0]:.4f}")
        assert errors[1] < 2 * errors[0]
    # Rows of one document each, which are a batch; ragged ones; and those after which the number of
    # documents is symbolic.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
