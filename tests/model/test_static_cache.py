"""A static cache says what one forward pass says, and `generate` the same tokens with it."""

import itertools

import pytest
import torch

from molcli.kernels import backend
from molcli.kernels import decode_rows as block_rows
from molcli.model.decoding import generation
from molcli.model.decoding.generation import static_cache
from molcli.model.decoding.static_cache import MoLStaticCache

# A shared slice of 32 neurons, and four routed ones of 24.
SLICES = dict(
    num_blocks=5,
    num_shared_blocks=1,
    num_blocks_per_tok=1,
    d_thin_shared=64,
    d_ff_thin_shared=32,
    num_heads_shared=4,
    num_kv_heads_shared=2,
)
CASES = {
    "softmax": dict(
        layer_structures=["mixture", "dense", "mixture"],
        layer_mixers=["attention", "attention", "attention"],
    ),
    "deltanet": dict(
        layer_structures=["mixture", "dense", "mixture"],
        layer_mixers=["gated_deltanet", "gated_deltanet", "gated_deltanet"],
    ),
    "no shared block": dict(num_shared_blocks=0),
    "no routed block": dict(num_blocks=2, num_blocks_per_tok=0),
    "one chosen": dict(num_shared_blocks=1, num_blocks_per_tok=1),
    "all blocks on all tokens": dict(restrict_attention=False),
    "biases": dict(
        attention_bias=True, attention_out_bias=True, mlp_gated=False, hidden_act="gelu"
    ),
    "query and key norms": dict(qk_norm=True),
    "norms of all heads together, and biases": dict(
        qk_norm=True, qk_norm_full_width=True, attention_bias=True
    ),
    "norms behind mixer and FFN": dict(output_norms=True, output_norms_thin=True),
    "no norms before": dict(output_norms=True, pre_norms=False, initializer_range=0.05),
    "windows, two rotary bases, scaled embeddings": dict(
        layer_structures=["mixture", "dense", "dense"],
        layer_mixers=["attention", "attention", "attention"],
        sliding_windows=[6, None, 4],
        rope_theta_local=100.0,
        embedding_scale=8.0,
    ),
    "slices, and a skipped layer": dict(
        layer_structures=["sliced", "skipped", "sliced"],
        layer_mixers=["attention", "attention", "gated_deltanet"],
        **SLICES,
    ),
    "slices without norms before, and with norms behind": dict(
        layer_structures=["sliced", "dense", "sliced"],
        layer_mixers=["attention"] * 3,
        **SLICES,
        output_norms=True,
        pre_norms=False,
        initializer_range=0.05,
    ),
    "two slices a token": dict(
        layer_structures=["sliced", "dense", "sliced"],
        layer_mixers=["attention"] * 3,
        **SLICES | dict(num_blocks_per_tok=2),
    ),
    "shared slice alone": dict(
        layer_structures=["sliced", "dense", "sliced"],
        layer_mixers=["attention"] * 3,
        **SLICES | dict(num_blocks=1, num_blocks_per_tok=0),
    ),
    "wide shared blocks": dict(
        d_thin_shared=48,
        d_ff_thin_shared=40,
        num_heads_shared=4,
        num_kv_heads_shared=2,
    ),
}


def batch(device="cpu", rows=3, length=20):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:2, :7] = 0
    mask[2:3, :3] = 0
    return ids.to(device), mask.to(device)


def new_cache(model, batch_size=3, length=24):
    return MoLStaticCache(model.config, batch_size, length, model.dtype, model.device)


@torch.no_grad()
def piecewise(model, ids, mask, cuts, cache):
    pieces = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in itertools.pairwise(cuts)
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_and_pieces_equal_one_forward_pass_padding_included(make_model, case):
    model = make_model(**CASES[case])
    ids, mask = batch()
    full = model(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(model)
    for cuts in ([0, *range(5, 21)], [0, 4, 5, 12, 20], range(21)):
        found = piecewise(model, ids, mask, cuts, cache)
        assert cache.get_seq_length() == 20
        real = mask.bool()
        torch.testing.assert_close(found[real], full[real], rtol=1e-4, atol=1e-4)
        cache.reset()


@pytest.mark.parametrize("kind", ["softmax", "gated_deltanet"])
@torch.no_grad()
def test_interpreted_kernels_take_the_same_steps(make_model, kind, monkeypatch):
    """The 6 rows of routed blocks are sorted by block, the shared blocks' 4 are not."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    model = make_model(
        layer_kinds=[kind], num_hidden_layers=1, num_blocks_per_tok=3, hidden_size=32, d_thin=16
    )
    ids, _ = batch(rows=2, length=8)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    full = model(ids, attention_mask=mask, use_cache=False).logits
    monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype in backend.DTYPES)
    monkeypatch.setattr(block_rows, "MIN_SORTED_ROWS", 5)
    found = piecewise(model, ids, mask, [0, 6, 7, 8], new_cache(model, 2))
    torch.testing.assert_close(found[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["softmax", "deltanet"])
def test_generate_finds_the_same_tokens(make_model, case, beams):
    model = make_model(**CASES[case])
    ids, mask = batch()
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=beams)
    wanted = model.generate(ids, **options)
    for _ in range(2):  # the second time in the tensors of the first
        found = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(found, wanted)


def test_generate_takes_its_later_steps_from_the_graph(make_model, monkeypatch):
    """With a stand-in that does on a CPU what a graph does; the first step compiles kernels."""

    class Standin:
        calls = 0

        def __init__(self, model, store):
            self.model, self.store = model, store

        def __call__(self, ids, position_ids, mask, counts):
            Standin.calls += 1
            x = self.model.model.embed_tokens(ids)[:, 0]
            active = torch.ones_like(counts) if mask is None else mask[:, -1]
            position = counts if position_ids is None else position_ids[:, -1]
            hidden, _ = self.model.model.step(x, position, active.int(), self.store)
            return self.model.lm_head(hidden)[:, None]

    monkeypatch.setattr(generation, "StepGraph", Standin)
    monkeypatch.setattr(MoLStaticCache, "is_compileable", True)
    model = make_model(num_blocks_per_tok=2)
    monkeypatch.setattr(
        model, "_valid_auto_compile_criteria", lambda kwargs, config: not config.disable_compile
    )
    ids, mask = batch()
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    wanted = model.generate(ids, **options)
    for steps in (10, 21, 21):  # of 12 tokens one comes from the prompt, and one step is the first
        disabled = Standin.calls == 21
        found = model.generate(
            ids, cache_implementation="static", disable_compile=disabled, **options
        )
        assert torch.equal(found, wanted)
        assert Standin.calls == steps


def test_the_tensors_of_a_cache_serve_the_next_one_once_they_are_free(make_model):
    model = make_model()
    first = static_cache(model, 2, 100)
    store = first.store
    assert store.length.length == 128 and first.max_batch_size == 2
    second = static_cache(model, 2, 100)
    assert second.store is not store, "the first cache is still in use"
    store = second.store
    store.length.filled += 5
    del first, second
    third = static_cache(model, 2, 90)
    assert third.store is store and store.length.filled.item() == 0
    del third
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert static_cache(model, 2, 90).store is not store, "a graph knows where weights lay"


@torch.no_grad()
def test_a_full_cache_takes_no_more(make_model):
    model = make_model()
    ids, _ = batch()
    cache = new_cache(model, length=20)
    model(ids[:, :19], past_key_values=cache)
    model(ids[:, 19:], past_key_values=cache)
    with pytest.raises(ValueError, match="room for 20 tokens, and 21"):
        model(ids[:, 19:], past_key_values=cache)


def test_a_cache_that_is_larger_than_its_batch_is_refused(make_model):
    model = make_model()
    ids, _ = batch(rows=2)
    with pytest.raises(ValueError, match="3 sequences, and 2 have come"):
        model(ids, past_key_values=new_cache(model))


WIDE = dict(head_dim=64, num_attention_heads=2, num_key_value_heads=2, d_thin=64, d_ff_thin=96)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, rows", [*((case, 3) for case in CASES), ("softmax", 24), ("deltanet", 24)]
)
def test_graphs_find_the_tokens_that_eager_steps_find(make_model, case, rows):
    """In float32, where near-ties are rare: the graph's steps, its own kernels without a graph, and
    the growing cache. Later calls reuse the graph, also with another prompt length."""
    model = make_model(device="cuda", **(WIDE | CASES[case]))
    static = dict(cache_implementation="static")
    for length in (20, 33, 20):
        ids, mask = batch("cuda", rows=rows, length=length)
        options = dict(attention_mask=mask, max_new_tokens=24, do_sample=False)
        graph = model.generate(ids, **static, **options)
        eager = model.generate(ids, **static, disable_compile=True, **options)
        growing = model.generate(ids, **options)
        assert torch.equal(graph, eager)
        same = (graph == growing).all(1).float().mean()
        print(f"{case}, {rows} sequences: {same:.0%} as with a growing cache")
        assert same >= 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["softmax", "deltanet"])
@torch.no_grad()
def test_steps_on_a_gpu_are_as_exact_as_prefill(make_model, case):
    """Near-ties of the router may flip between shapes of a product: such tokens are outliers, so
    the medians over tokens are compared."""
    half = make_model(device="cuda", dtype=torch.bfloat16, **(WIDE | CASES[case]))
    exact = make_model(dtype=torch.float64, **(WIDE | CASES[case]))
    exact.load_state_dict(half.state_dict())
    ids, mask = batch("cuda", length=60)
    truth = exact(ids.cpu(), attention_mask=mask.cpu(), use_cache=False).logits
    steps = piecewise(half, ids, mask, [0, *range(50, 61)], new_cache(half, length=64))
    prefill = half(ids, attention_mask=mask, use_cache=False).logits
    decoded = mask.cpu().bool()
    decoded[:, :50] = False
    errors = [((x.double().cpu() - truth)[decoded]).norm(dim=1) for x in (steps, prefill)]
    stepwise_error, prefill_error = (e.median().item() for e in errors)
    print(f"{case}: decoding error {stepwise_error:.4f}, prefill error {prefill_error:.4f}")
    assert stepwise_error <= 2 * prefill_error
