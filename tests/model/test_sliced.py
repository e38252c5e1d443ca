"""Sliced layers: the residual after a mixer at full width, and slices of neurons."""

import pytest
import torch
import torch.nn.functional as F

from molcli.estimate.flops import count_flops
from molcli.estimate.parameters import count_parameters
from molcli.model import MoLConfig, MoLForCausalLM

SLICES = dict(
    layer_structures=["sliced", "skipped", "sliced"],
    layer_mixers=["attention"] * 3,
    num_blocks=5,
    num_shared_blocks=1,
    num_blocks_per_tok=1,
    d_thin_shared=64,
    d_ff_thin_shared=32,
    num_heads_shared=4,
    num_kv_heads_shared=2,
)
IDS = torch.arange(3, 83).view(2, 40)


def loss(hidden):
    """One that the final norm does not keep constant."""
    return (hidden * torch.linspace(-1, 1, 64, dtype=hidden.dtype)).sum()


def hidden_states(model):
    return model(IDS, use_cache=False, output_hidden_states=True).hidden_states


@torch.no_grad()
def test_a_layer_adds_its_mixer_its_shared_slice_and_the_chosen_slice_as_it_is(make_model):
    model = make_model(**SLICES, dtype=torch.float64)
    layer, eps = model.model.layers[0], model.config.rms_norm_eps
    before, after = hidden_states(model)[:2]
    # The same layer, with the slices' neurons taken away, is what runs on every token.
    alone = make_model(**SLICES, dtype=torch.float64)
    for name in ("block.mlp.down_proj", "slices.down_proj"):
        alone.model.layers[0].get_parameter(name).zero_()
    middle = hidden_states(alone)[1]
    read = F.rms_norm(middle, (64,), layer.block.post_norm[0], eps)
    chosen = (F.rms_norm(middle, (64,), eps=1e-6) @ layer.router.weight.mT).argmax(-1)
    assert len(chosen.unique()) > 1

    def network(mlp, index):
        gate, up, down = mlp.gate_proj[index], mlp.up_proj[index], mlp.down_proj[index]
        return (F.silu(read @ gate.mT) * (read @ up.mT)) @ down.mT

    own = torch.stack([network(layer.slices, i) for i in range(4)], dim=2)
    own = own.gather(2, chosen[..., None, None].expand(-1, -1, 1, 64))[:, :, 0]
    torch.testing.assert_close(after, middle + network(layer.block.mlp, 0) + own)
    assert not torch.equal(before, middle)


@torch.no_grad()
def test_a_skipped_layer_passes_the_residual_on(make_model):
    states = hidden_states(make_model(**SLICES))
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])


def test_a_chosen_slice_gives_the_router_the_gradient_of_the_logarithm_of_its_weight(make_model):
    model = make_model(**SLICES, dtype=torch.float64)
    layer = model.model.layers[2]
    out = model.model(IDS, use_cache=False)
    hidden, routing = out.last_hidden_state, out.routing[1]
    weight = layer.router.weight
    (found,) = torch.autograd.grad(loss(hidden), weight, retain_graph=True)
    log_weights = routing.logits.log_softmax(-1).gather(1, routing.blocks)[:, 0]
    # One token at a time: the derivative by its own factor, from the sum over all in its slice.
    total = torch.zeros_like(found)
    for token in range(80):
        (by_log,) = torch.autograd.grad(log_weights[token], weight, retain_graph=True)
        total += by_log * derivative_by_gate(model, token)
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-8)


def derivative_by_gate(model, token, step=1e-6):
    """Central difference of the loss by the factor of what one token's slice writes in layer 2."""
    layer, losses = model.model.layers[2], []
    original = layer.run_slices
    for sign in (1, -1):
        factor = torch.ones(80, 1, dtype=torch.float64)
        factor[token] += sign * step
        layer.run_slices = lambda *inputs, factor=factor: original(*inputs) * factor
        with torch.no_grad():
            out = model.model(IDS, use_cache=False)
        losses.append(loss(out.last_hidden_state).item())
    layer.run_slices = original
    return (losses[0] - losses[1]) / (2 * step)


def test_a_router_that_is_kept_takes_no_gradient_and_changes_no_other(make_model):
    model = make_model(**SLICES)
    for layer in model.model.layers:
        if getattr(layer, "router", None) is not None:
            layer.router.requires_grad_(False)
    model.model(IDS, use_cache=False).last_hidden_state.square().sum().backward()
    assert model.model.layers[0].router.weight.grad is None
    assert model.model.layers[0].slices.down_proj.grad.abs().sum() > 0


def test_a_sliced_model_reloads(make_model, tmp_path):
    model = make_model(**SLICES)
    model.save_pretrained(tmp_path)
    loaded = MoLForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("routed", [4, 0])
def test_parameters_and_operations_are_counted(make_model, routed):
    counts = dict(num_blocks=1 + routed, num_blocks_per_tok=min(1, routed))
    model = make_model(**SLICES | counts)
    found = count_parameters(model.config)
    assert found.total == sum(p.numel() for p in model.parameters())
    unused = 2 * max(0, routed - 1) * 3 * 64 * 24  # two layers
    assert found.active == found.total - unused
    flops = count_flops(model.config, 8)
    assert flops.total - flops.active == 2 * unused


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_structures=["sliced", "mixture", "dense"]), "no mixtures"),
        (dict(num_shared_blocks=2), "one shared block"),
        (dict(layer_structures=["sliced", "half", "dense"]), "known are dense, mixture, sliced"),
    ],
)
def test_what_a_sliced_model_cannot_have_is_refused(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        MoLConfig(**make_model(**SLICES).config.to_dict() | changes)
