"""Packed rows through a model: documents share a row, and nothing else."""

import torch

from molcli.data.packing import pack


def packed_batch():
    """Three rows of 12 in which documents begin, end and are cut."""
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 4, 9, 1, 11, 6)
    documents = [
        torch.randint(3, 97, (size,), generator=generator, dtype=torch.int32) for size in sizes
    ]
    return pack(documents, 12, seed=1).batch(slice(None))


@torch.no_grad()
def test_a_packed_document_is_as_it_would_be_alone(make_model):
    model = make_model(
        dtype=torch.float64,
        layer_structures=["mixture", "mixture", "dense"],
        layer_mixers=["attention", "gated_deltanet", "attention"],
    )
    batch = packed_batch()
    packed = model(**batch.inputs(), use_cache=False).logits
    seen = 0
    for row, ids in enumerate(batch.document_ids):
        for document in ids.unique():
            own = ids == document
            alone = model(batch.input_ids[row : row + 1, own], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, own], alone)
            seen += 1
    assert seen > len(batch.input_ids), "several documents in a row"


def test_no_gradient_crosses_a_document(make_model):
    """Attention, convolution and state, forward and backward, in training mode."""
    model = make_model(
        dtype=torch.float64,
        layer_structures=["mixture", "mixture", "dense"],
        layer_mixers=["attention", "gated_deltanet", "attention"],
    )
    batch = packed_batch()
    embedded = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    inputs = {name: x for name, x in batch.inputs().items() if name != "input_ids"}
    model.train()
    logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits
    for row, ids in enumerate(batch.document_ids):
        for document in ids.unique():
            own = ids == document
            (gradient,) = torch.autograd.grad(logits[row, own].sum(), embedded, retain_graph=True)
            reached = gradient.abs().sum(-1) > 0
            assert not reached[row, ~own].any() and not reached[torch.arange(3) != row].any()
            assert reached[row, own].all()
