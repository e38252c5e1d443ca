"""A checkpoint's configuration with values that no model has is refused at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import molcli
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import open_config

WHOLE = ("num_hidden_layers", "hidden_size", "num_blocks", "num_heads_thin", "d_thin")
WRONG: list[tuple[str, object]] = [
    *((key, value) for key in WHOLE for value in (2**31, -1, True, "2", 2.5, [2], 10**400)),
    ("thin_num_attention_heads", 2**31),  # its name in earlier checkpoints
    ("vocab_size", None),
    ("tie_word_embeddings", "no"),
    ("qk_norm_full_width", True),
    ("layer_structures", "dense"),
    ("layer_structures", ["dense"]),
    ("layer_mixers", ["attention", None]),
    ("sliding_windows", [4]),
    ("sliding_windows", []),
    ("sliding_windows", [0, 4]),
    ("sliding_windows", ["4", None]),
    ("rope_parameters", []),
    ("rope_parameters", {"rope_type": "magic", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("rope_theta_local", -1.0),
    ("embedding_scale", "big"),
    ("hidden_act", "magic"),
    ("eos_token_id", [0, 4096]),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = MoLConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        intermediate_size=48,
        layer_structures=["dense", "mixture"],
        num_blocks=3,
        num_blocks_per_tok=1,
        d_thin=16,
        d_ff_thin=24,
    )
    MoLForCausalLM(config).save_pretrained(tmp_path / "mol")
    return tmp_path / "mol"


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_values_that_no_model_has_are_refused(checkpoint: Path, key: str, value: object) -> None:
    assert open_config(checkpoint).num_blocks == 3
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(molcli.MolError, match=r"config\.json"):
        open_config(checkpoint)


def test_layers_that_the_weights_lack(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    longer = {
        "num_hidden_layers": 4000,
        "layer_structures": ["dense"] * 4000,
        "layer_mixers": ["attention"] * 4000,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | longer))
    with pytest.raises(molcli.MolError, match=r"weights of 2 layers, .* num_hidden_layers: 4000"):
        molcli.open_model(checkpoint)


def test_weights_that_are_whole_numbers(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path) | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(molcli.MolError, match=r"model\.norm\.weight in .* stored as torch\.int32"):
        molcli.open_model(checkpoint)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"return_dict": False, "output_hidden_states": True},
    ],
)
def test_a_configuration_does_not_choose_the_code_that_runs(
    checkpoint: Path, values: dict[str, object]
) -> None:
    ids = torch.tensor([[3, 4, 5]])
    expected = molcli.open_model(checkpoint)(ids).logits
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    model = molcli.open_model(checkpoint)
    assert model(ids).logits.equal(expected)
    assert "someone/kernel" not in str(vars(model.config))
