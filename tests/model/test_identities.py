"""What must be equal, whatever the weights."""

import itertools

import pytest
import torch

from molcli.kernels.packed_rows import routed_rows
from molcli.model.context import ForwardContext, rotary_of, rows_of_all
from molcli.model.layers import MoLLayer
from molcli.model.mixers import BlockContext
from molcli.model.tokens import token_stream

KINDS = ["softmax", "gated_deltanet"]
DENSE = {"softmax": "dense", "gated_deltanet": "dense_gated_deltanet"}


def batch(model, rows=3, length=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, length), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1:2, :7] = 0
    mask[2:3, :3] = 0
    return ids, mask


@torch.no_grad()
def stepwise(model, ids, mask, cuts):
    """Logits from calls on consecutive pieces, with a cache."""
    cache, pieces = None, []
    for a, b in itertools.pairwise(cuts):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[0, *range(5, 21)], [0, 4, 5, 12, 20]], ids=["steps", "pieces"])
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_forward_pass_padding_included(make_model, kind, cuts):
    model = make_model(layer_kinds=[kind, DENSE[kind], kind])
    ids, mask = batch(model)
    full = model(ids, attention_mask=mask, use_cache=False).logits
    found = stepwise(model, ids, mask, cuts)
    real = mask.bool()
    torch.testing.assert_close(found[real], full[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_with_wide_shared_blocks_equals_one_forward_pass(make_model, kind):
    heads = dict(num_heads_shared=4, num_kv_heads_shared=2)
    shape = dict(d_thin_shared=64, d_ff_thin_shared=16, **heads)
    model = make_model(layer_kinds=[kind, "dense", kind], **shape)
    shared, routed = model.model.layers[0].shared, model.model.layers[0].routed
    assert (shared.thin_in.shape[1], routed.thin_in.shape[1]) == (64, 32)
    ids, mask = batch(model)
    full = model(ids, attention_mask=mask, use_cache=False).logits
    found = stepwise(model, ids, mask, [0, 4, 5, 12, *range(13, 21)])
    real = mask.bool()
    torch.testing.assert_close(found[real], full[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing(make_model):
    model = make_model()
    ids, mask = batch(model)
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    for i in range(3):
        first = int((mask[i] == 0).sum())
        alone = model(ids[i : i + 1, first:], use_cache=False).logits[0]
        torch.testing.assert_close(padded[i, first:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(make_model):
    model = make_model(dtype=torch.float64)
    ids, _ = batch(model, rows=2)
    documents = torch.tensor([[0] * 8 + [1] * 12, [4] * 20])
    positions = torch.tensor([[*range(8), *range(12)], [*range(20)]])
    packed = model(ids, document_ids=documents, position_ids=positions, use_cache=False).logits
    for row, a, b in ((0, 0, 8), (0, 8, 20), (1, 0, 20)):
        alone = model(ids[row : row + 1, a:b], use_cache=False).logits[0]
        torch.testing.assert_close(packed[row, a:b], alone)


@torch.no_grad()
def test_nothing_looks_ahead(make_model):
    model = make_model(dtype=torch.float64)
    ids, _ = batch(model)
    before = model(ids, use_cache=False).logits
    ids[:, 15:] = 3
    torch.testing.assert_close(model(ids, use_cache=False).logits[:, :15], before[:, :15])


def layer_inputs(model, embedded, mask=None):
    """Arguments of a layer: the flat residual, and its context."""
    stream = token_stream(
        embedded.shape[:2],
        embedded.device,
        past_length=0,
        attention_mask=mask,
        position_ids=None,
        document_ids=None,
    )
    x = stream.flatten(embedded)
    rotary = rotary_of(model.model.rotary_emb, stream.position)
    rows = rows_of_all(stream, model.config.num_shared_blocks)
    return x, ForwardContext(stream, rotary, *rows)


def dense_restricted(layer: MoLLayer, x, context):
    """The layer with every block on every token and a mask on its keys, one block at a time."""
    out, stream, rotary = layer.add_shared(x, context, None), context.stream, context.rotary
    routing = layer.router(x)
    for block in range(routing.logits.shape[1]):
        chose = (routing.blocks == block).any(1)
        kept = chose.nonzero()[:, 0]
        if not len(kept):
            continue
        # Restricted attention and state: the block's own tokens, as if there were no others.
        own = routed_rows(
            torch.full((len(kept), 1), block),
            stream.document[kept],
            stream.num_documents,
            routing.logits.shape[1],
            stream.length,
        )
        turns = rotary[0][kept], rotary[1][kept]
        part = own.combine(layer.routed(x[kept], None, BlockContext(own, turns, stream)))
        weight = (routing.weights * (routing.blocks == block)).sum(1)[kept] / layer.top_k
        out = out.index_add(0, kept, part * weight[:, None])
    return out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sparse_dispatch_equals_dense_restricted(make_model, kind):
    model = make_model(layer_kinds=[kind] * 3)
    ids, _ = batch(model)
    x, context = layer_inputs(model, model.model.embed_tokens(ids))
    layer = model.model.layers[1]
    found, routing = layer(x, context)
    assert routing.blocks.unique().numel() > 2, "the router must use several blocks"
    expected = dense_restricted(layer, x, context)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_restricted_softmax_equals_a_mask_on_all_keys(make_model):
    """The same once more with an explicit attention mask, independent of any row layout."""
    model = make_model(
        dtype=torch.float64,
        layer_structures=["mixture"] * 3,
        layer_mixers=["attention"] * 3,
        num_shared_blocks=0,
    )
    ids, _ = batch(model, rows=1)
    x, context = layer_inputs(model, model.model.embed_tokens(ids))
    rotary = context.rotary
    layer, n = model.model.layers[0], len(x)
    routing = layer.router(x)
    out = x
    stack, block = layer.routed, layer.routed.block

    def norm(z, weight):
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + block.eps) * weight

    def turn(z):
        a, b = z.chunk(2, -1)
        return z * rotary[0][:, None] + torch.cat([-b, a], -1) * rotary[1][:, None]

    for i in range(stack.thin_in.shape[0]):
        thin = x @ stack.thin_in[i].T
        read = norm(thin, block.input_norm[i])
        projections = (getattr(block.mixer, f"{name}_proj")[i] for name in "qkv")
        q, k, v = ((read @ weight.T).view(n, 2, 16) for weight in projections)
        q, k = turn(q), turn(k)
        chose = (routing.blocks == i).any(1)
        seen = (chose[None] | torch.eye(n, dtype=torch.bool)).tril()
        scores = torch.einsum("ihd,jhd->hij", q, k) / 4
        out_heads = torch.einsum(
            "hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v
        )
        y = thin + out_heads.reshape(n, 32) @ block.mixer.o_proj[i].T
        z = norm(y, block.post_norm[i])
        mlp = torch.nn.functional.silu(z @ block.mlp.gate_proj[i].T) * (z @ block.mlp.up_proj[i].T)
        delta = (y + mlp @ block.mlp.down_proj[i].T - thin) @ stack.thin_out[i].T
        weight = (routing.weights * (routing.blocks == i)).sum(1) / 2
        out = out + delta * (weight * chose)[:, None]
    torch.testing.assert_close(layer(x, context)[0], out)


@torch.no_grad()
def test_dense_top_k_with_all_blocks_chosen_equals_sparse(make_model):
    """With K = N - S restriction is no restriction."""
    sparse = make_model(num_blocks_per_tok=5)
    dense = make_model(num_blocks_per_tok=5, restrict_attention=False)
    dense.load_state_dict(sparse.state_dict())
    ids, mask = batch(sparse)
    a, b = (m(ids, attention_mask=mask, use_cache=False).logits for m in (sparse, dense))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_top_k_attends_to_every_token(make_model):
    sparse, dense = make_model(), make_model(restrict_attention=False)
    ids, _ = batch(sparse)
    a, b = (m(ids, use_cache=False).logits for m in (sparse, dense))
    assert not torch.allclose(a, b, atol=1e-3)
    model = dense
    full = model(ids, use_cache=False).logits
    torch.testing.assert_close(
        stepwise(model, ids, torch.ones_like(ids), [0, 6, 7, 20]), full, rtol=1e-4, atol=1e-4
    )


def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    model = make_model(dtype=torch.float64).train()
    ids, mask = batch(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        out.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


WIDE = dict(
    head_dim=64, num_attention_heads=1, num_key_value_heads=1, d_thin=64, initializer_range=0.1
)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_on_a_gpu_is_as_exact_as_eager_bf16(make_model, kind):
    """Sparse dispatch through the fast paths, against the reference in float64."""
    kinds = dict(layer_kinds=[kind] * 3, **WIDE)
    fast = make_model(device="cuda", dtype=torch.bfloat16, **kinds)
    eager = make_model(dtype=torch.bfloat16, **kinds)
    exact = make_model(dtype=torch.float64, **kinds)
    for model in (eager, exact):
        model.load_state_dict(fast.state_dict())
    ids, mask = batch(fast, rows=4, length=300)
    embedded = fast.model.embed_tokens(ids)
    outputs, decisions = [], []
    for model in (fast, eager, exact):
        x, context = layer_inputs(
            model, embedded.to(model.device, model.dtype), mask.to(model.device)
        )
        out, routing = model.model.layers[1](x, context)
        outputs.append(out.double().cpu())
        decisions.append(routing.blocks.cpu())
    same = (decisions[0] == decisions[2]).all(1) & (decisions[1] == decisions[2]).all(1)
    assert same.double().mean() > 0.99, "the float32 router must decide alike everywhere"
    error, allowed = ((out - outputs[2])[same].norm() for out in outputs[:2])
    size = outputs[2][same].norm()
    print(f"{kind} layer: error {error / size:.5f} (eager bf16 {allowed / size:.5f})")
    assert error <= 2 * allowed


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_on_a_gpu_is_as_exact_as_prefill(make_model, kind):
    """Near-ties of the router may flip between shapes of a product: such tokens are outliers, so
    the medians over tokens are compared."""
    kinds = dict(layer_kinds=[kind] * 3, **WIDE)
    half = make_model(device="cuda", dtype=torch.bfloat16, **kinds)
    exact = make_model(dtype=torch.float64, **kinds)
    exact.load_state_dict(half.state_dict())
    ids, mask = batch(half, length=60)
    truth = exact(ids.cpu(), attention_mask=mask.cpu(), use_cache=False).logits
    steps = stepwise(half, ids, mask, [0, 50, *range(51, 61)])
    prefill = half(ids, attention_mask=mask, use_cache=False).logits
    decoded = mask.cpu().bool()
    decoded[:, :50] = False
    errors = [((x.double().cpu() - truth)[decoded]).norm(dim=1) for x in (steps, prefill)]
    stepwise_error, prefill_error = (e.median().item() for e in errors)
    print(f"{kind}: decoding error {stepwise_error:.4f}, prefill error {prefill_error:.4f}")
    assert stepwise_error <= 2 * prefill_error
