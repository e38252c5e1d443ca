"""The parent with fewer neurons and heads, as a peer of conversions."""

import pytest
import torch
from pruned import activations, group_outputs, kept_width, narrow_config, write_narrow
from safetensors.torch import load_file
from tiny import recipe

from molcli.data.packing import pack
from molcli.estimate.parameters import count_parameters
from molcli.families.parent import open_parent
from molcli.fitting.converted_config import mol_config
from molcli.model import MoLConfig
from molcli.model.checkpoint import open_checkpoint
from molcli.model.parent import load_dense

CPU = torch.device("cpu")


@pytest.fixture
def rows():
    return pack([torch.randint(3, 100, (20,), dtype=torch.int32) for _ in range(8)], 32, seed=None)


def scores(parent, rows):
    teacher = load_dense(parent, torch.float32, CPU)
    return teacher, activations(teacher, rows), group_outputs(teacher, rows)


def test_with_its_full_size_it_equals_the_parent(any_parent, tmp_path, rows):
    parent = open_parent(any_parent)
    teacher, neurons, groups = scores(parent, rows)
    count = teacher.config.num_key_value_heads
    write_narrow(parent, tmp_path / "out", (neurons, 96), (groups, count))
    narrow = open_checkpoint(tmp_path / "out", CPU)
    assert torch.equal(narrow(rows.input_ids[:2]).logits, teacher(rows.input_ids[:2]).logits)
    assert set(narrow.config.layer_structures) == {"dense"}


def test_the_largest_neurons_stay(parent, tmp_path, rows):
    opened = open_parent(parent)
    teacher, neurons, _ = scores(opened, rows)
    hidden = []
    mlp = teacher.model.layers[2].block.mlp
    mlp.register_forward_pre_hook(lambda module, x: hidden.append(module.hidden(*x)))
    teacher.model(**next(iter(rows.batches(8, CPU))).inputs(), use_cache=False)
    kept = hidden[0].norm(dim=0).topk(40).indices.sort().values
    write_narrow(opened, tmp_path / "out", (neurons, 40))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.layers.2.block.mlp.up_proj"], mlp.up_proj[:, kept])
    assert torch.equal(tensors["model.layers.2.block.mlp.down_proj"], mlp.down_proj[..., kept])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_dropped_groups_are_those_with_the_smallest_output(tiny_parent, tmp_path, rows, family):
    """Without their rows of the output projection, the parent computes the same."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    parent = open_parent(tiny_parent(family, **settings))
    teacher, neurons, groups = scores(parent, rows)
    write_narrow(parent, tmp_path / "out", (neurons, 96), (groups, 2))
    with torch.no_grad():
        for layer, norms in zip(teacher.model.layers, groups, strict=True):
            for group in norms.topk(2, largest=False).indices.tolist():
                layer.block.mixer.o_proj[:, :, 16 * group : 16 * (group + 1)] = 0
    narrow = open_checkpoint(tmp_path / "out", CPU)
    assert (narrow.config.num_attention_heads, narrow.config.num_key_value_heads) == (4, 2)
    torch.testing.assert_close(
        narrow(rows.input_ids[:2]).logits, teacher(rows.input_ids[:2]).logits
    )


def test_it_has_as_many_active_parameters(runner):
    settings = recipe("upcycle.layers=[0, 3]")
    shape = mol_config(runner.parent, settings.upcycle)
    found, about = runner.convert(settings, "width_pruned")
    most = count_parameters(shape).active
    one = 4 * 3 * 64  # a neuron in each layer
    assert most - one < about["active"] <= most
    written = MoLConfig.from_pretrained(found)
    assert (written.num_key_value_heads, written.intermediate_size) == kept_width(shape)
    assert set(written.layer_structures) == {"dense"}


@pytest.mark.parametrize(
    ("groups", "neurons", "kept"), [(2, 12, (2, 12)), (2, 11, (1, 43)), (1, 3, (1, 3))]
)
def test_heads_go_where_an_eighth_of_the_neurons_has_no_room(runner, groups, neurons, kept):
    shape = MoLConfig(**runner.parent.mol_config_kwargs())  # 96 neurons, 2 groups
    budget = count_parameters(narrow_config(shape, groups, neurons))
    assert kept_width(shape, budget) == kept


def test_no_room_is_an_error(runner):
    shape = MoLConfig(**runner.parent.mol_config_kwargs())
    with pytest.raises(ValueError, match="no room for neurons"):
        kept_width(shape, count_parameters(narrow_config(shape, 1, 0)))
