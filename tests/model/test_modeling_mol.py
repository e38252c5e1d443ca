import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from molcli.model import MoLConfig, MoLForCausalLM

WIDE_SHARED = dict(
    d_thin_shared=48,
    d_ff_thin_shared=8,
    num_heads_shared=4,
    num_kv_heads_shared=2,
)


@pytest.mark.parametrize("shared", [{}, WIDE_SHARED])
def test_save_and_load_are_bit_equal_across_shards(make_model, tmp_path, shared):
    model = make_model(**shared)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoLForCausalLM)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.randint(0, 97, (2, 9))
    # A loaded tensor may lie at another alignment, with sums in another order.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_half_precision_keeps_router_and_decay_in_float32(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {n.split(".")[-1] for n, p in loaded.named_parameters() if p.dtype == torch.float32}
    routers = {
        n for n, p in loaded.named_parameters() if "router" in n and p.dtype != torch.float32
    }
    assert {"A_log", "dt_bias"} <= exact and not routers
    assert loaded.model.layers[0].routed.thin_in.dtype == torch.bfloat16
    assert loaded(torch.randint(0, 97, (1, 5))).logits.isfinite().all()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_cache_equals_without(make_model, how):
    model = make_model(dtype=torch.float64)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, **how)
    with_cache = model.generate(ids, use_cache=True, **settings)
    without = model.generate(ids, use_cache=False, **settings)
    assert with_cache.shape == (2 * how.get("num_return_sequences", 1), 17)
    assert torch.equal(with_cache, without)


def test_the_cache_moves_every_state_with_the_batch(make_model):
    model = make_model(dtype=torch.float64)
    ids = torch.randint(0, 97, (3, 9))
    cache = model(ids, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 0, 1])
    expected = model(ids[order], use_cache=True).past_key_values
    cache.batch_select_indices(order)
    nonempty = 0
    for a, b in zip(cache.layers, expected.layers, strict=True):
        for have, wanted in zip(a.states(), b.states(), strict=True):
            assert have.tensors.keys() == wanted.tensors.keys()
            for name in have.tensors:
                torch.testing.assert_close(have.tensors[name], wanted.tensors[name])
                nonempty += 1
    assert nonempty == 3 * 3 + 3 + 2  # attention of 3 layers, routed softmax, one recurrent state
    cache.batch_repeat_interleave(2)
    assert all(
        x.shape[0] == 8 for lay in cache.layers for s in lay.states() for x in s.tensors.values()
    )
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(3)


def test_a_training_step_reaches_every_parameter(make_model):
    model = make_model().train()
    ids = torch.randint(0, 97, (2, 30))
    out = model(ids, labels=ids, output_router_logits=True)
    assert [r.shape for r in out.router_logits] == [(60, 5), (60, 5)]
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []
    plain = model(ids, labels=ids).loss
    torch.testing.assert_close(out.loss, plain + 0.05 * out.aux_loss)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_kinds": ["softmax"]}, "names 1 layers"),
        ({"layer_kinds": ["softmax", "mamba", "dense"]}, "mamba"),
        ({"num_blocks_per_tok": 9}, "num_blocks_per_tok is 9"),
        ({"num_shared_blocks": 8}, "num_shared_blocks is 8"),
        ({"num_heads_thin": 3, "num_kv_heads_thin": 2}, "cannot share"),
        ({"num_heads_shared": 3}, "3 query heads cannot share 2"),
    ],
)
def test_contradicting_numbers_are_refused(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_a_checkpoint_from_before_shared_shapes_loads_as_it_was(make_model, tmp_path):
    """Its configuration has no numbers of the shared blocks: they are those of the routed ones."""
    model = make_model(d_thin=16, num_heads_thin=2, num_kv_heads_thin=1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in WIDE_SHARED}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.shared_spec() == replace(
        loaded.config.routed_spec("attention"), num_blocks=2
    )
    ids = torch.randint(0, 97, (2, 9))
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    # A loaded tensor may lie at another alignment, with sums in another order.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_with_the_earlier_names_loads_as_it_was(make_model, tmp_path):
    """Up to 0.1, one name said structure and mixer of a layer, and thin heads had longer names."""
    kinds = ["softmax", "dense", "gated_deltanet", "dense_gated_deltanet"]
    heads = dict(num_heads_thin=2, num_kv_heads_thin=1, num_heads_shared=4, num_kv_heads_shared=2)
    model = make_model(num_hidden_layers=4, layer_kinds=kinds, d_thin_shared=48, **heads)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    del settings["layer_structures"], settings["layer_mixers"]
    for new in heads:
        size, shape = ("key_value_heads" if "kv" in new else "attention_heads"), new.split("_")[-1]
        settings[f"{shape}_num_{size}"] = settings.pop(new)
    file.write_text(json.dumps(settings | {"layer_kinds": kinds}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_labels == model.config.layer_labels
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    ids = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_config_round_trip(tmp_path, make_model):
    config = make_model().config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoLConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
