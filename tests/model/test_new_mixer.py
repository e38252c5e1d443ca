"""A mixer of a few lines, added to the table and nowhere else: trains, decodes, saves and loads."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from molcli.estimate.flops import count_flops
from molcli.estimate.memory import training_memory
from molcli.estimate.parameters import count_parameters
from molcli.model.decoding.cache import MoLCache
from molcli.model.mixers import MIXERS, Mixer, State
from molcli.model.mixers.base import StaticState
from molcli.model.norms import rms_norm
from molcli.stages.train.optimizer import has_decay

LAYERS = dict(
    layer_structures=["mixture", "dense", "mixture"],
    layer_mixers=["identity", "identity", "attention"],
)


class Identity(Mixer):
    """Returns its normalised input, scaled by a weight: tokens do not see each other."""

    name = "identity"
    no_decay_parameters = ("scale",)

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.scale = nn.Parameter(torch.empty(spec.num_blocks, spec.width))

    def forward(self, x, context):
        return x * context.rows.gather_per_block(self.scale)

    def step(self, x, norm, context):
        blocks = context.rows.blocks
        return rms_norm(x, norm[blocks], self.eps) * self.scale[blocks]

    @staticmethod
    def new_state(spec):
        return State()

    @staticmethod
    def new_static_state(spec, slots, length, dtype, device):
        return StaticState()

    @staticmethod
    def count_parameters(spec, config):
        return spec.width

    @staticmethod
    def count_flops(spec, tokens):
        return 2.0 * spec.width, 0.0

    @staticmethod
    def activation_bytes(spec, product_bytes, compiled):
        return product_bytes * spec.width


@pytest.fixture
def model(make_model, monkeypatch):
    monkeypatch.setitem(MIXERS, Identity.name, Identity)
    return make_model(dtype=torch.float64, **LAYERS)


def test_it_trains(model):
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    groups = [
        {"params": [p for n, p in model.named_parameters() if has_decay(n) is decayed]}
        for decayed in (True, False)
    ]
    assert not has_decay("model.layers.0.routed.block.mixer.scale")
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert model.model.layers[0].routed.block.mixer.scale.grad.abs().sum() > 0


@torch.no_grad()
def test_it_decodes_with_both_caches_as_in_one_pass(model):
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    cache, steps = MoLCache(model.config), []
    for a, b in itertools.pairwise([0, 5, *range(6, 13)]):
        steps.append(model(ids[:, a:b], cache=cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    settings = dict(max_new_tokens=5, do_sample=False)
    for extra in ({"num_beams": 2}, {}):
        growing = model.generate(ids, **settings, **extra)
        static = model.generate(ids, cache_implementation="static", **settings, **extra)
        assert torch.equal(static, growing)


@torch.no_grad()
def test_it_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.layer_mixers == LAYERS["layer_mixers"]
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_its_costs_are_counted(model):
    parameters = sum(p.numel() for p in model.parameters())
    assert count_parameters(model.config).total == parameters
    assert count_flops(model.config, 64).active > 0
    memory = training_memory(
        model.config,
        trainable=parameters,
        tokens=64,
        product_bytes=2,
        parent=None,
        logits_at_once=1 << 20,
    )
    assert memory.activations > 0
