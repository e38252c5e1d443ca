"""Compiled layers compute what eager ones do, from one graph for all layers."""

import pytest
import torch

from molcli.model.compiled import compile_layers


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
