"""Every spelling of rotary scaling gives the parent's own function, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from molcli.errors import MolError
from molcli.families.parent import open_parent, outline
from molcli.model.parent import load_dense

SHORT = [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0]
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": SHORT, "long_factor": LONG},
}
TRAINED = {"original_max_position_embeddings": 64}
# Where the length of the original training is said: in rope_scaling, beside it, in both with two
# values, or nowhere.
PLACES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "inside": (TRAINED, {}),
    "beside": ({}, TRAINED),
    "both": ({"original_max_position_embeddings": 32}, TRAINED),
    "nowhere": ({}, {}),
}
CASES = [
    ("llama", kind, place, key)
    for kind in SCALINGS
    for place in PLACES
    for key in ("rope_type", "type")
]
CASES += [
    (family, kind, "beside", "rope_type")
    for family in ("mistral", "qwen2", "qwen3", "olmo2", "gemma3_text")
    for kind in SCALINGS
]
CASES += [("phi3", "longrope", "beside", key) for key in ("rope_type", "type")]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in config.items() if x is not None}))


def described(folder: Path, scaling: dict[str, Any], **beside: Any) -> Path:
    """Writes the scaling as configurations before transformers 5 had it."""
    edit_config(folder, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling, **beside)
    return folder


@torch.no_grad()
def difference(folder: Path) -> float:
    """Of the logits from transformers', relative, in as long a text as is allowed."""
    parent = open_parent(folder)
    length = parent.mol_config_kwargs()["max_position_embeddings"]
    ids = torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(0))
    ours = load_dense(parent, torch.float32, torch.device("cpu"))(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("family", "kind", "place", "key"), CASES)
def test_each_spelling_is_the_parents_function(
    tiny_parent: Callable[..., Path], family: str, kind: str, place: str, key: str
) -> None:
    heads = {"head_dim": 16} if family in ("qwen3", "gemma3_text") else {}
    inside, beside = PLACES[place]
    folder = described(
        tiny_parent(family, tokenizer=False, **heads),
        {key: kind} | SCALINGS[kind] | inside,
        **beside,
    )
    assert difference(folder) < 1e-5
    assert (
        outline(folder)["rope_parameters"]
        == open_parent(folder).mol_config_kwargs()["rope_parameters"]
    )


def test_yarn_without_a_factor_in_a_capped_context(tiny_parent: Callable[..., Path]) -> None:
    folder = tiny_parent("mistral", tokenizer=False, sliding_window=32)
    described(folder, {"rope_type": "yarn", "factor": None} | TRAINED)
    kwargs = open_parent(folder).mol_config_kwargs()
    assert kwargs["max_position_embeddings"] == 32
    assert kwargs["rope_parameters"]["factor"] == 4.0  # of 256 positions
    assert difference(folder) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "su"} | SCALINGS["longrope"],
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": "four"},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG},
        {"rope_type": ["linear"], "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
    ],
)
def test_scaling_that_transformers_cannot_make_is_refused(
    tiny_parent: Callable[..., Path], scaling: dict[str, Any]
) -> None:
    folder = described(tiny_parent("llama", tokenizer=False), scaling)
    for read in (open_parent, outline):
        with pytest.raises(MolError, match=r"no rotary embedding|not a valid llama|has rope_"):
            read(folder)


@pytest.mark.parametrize("base", [0, -1.0, "many", None, True])
def test_a_base_that_is_none_is_refused(tiny_parent: Callable[..., Path], base: object) -> None:
    folder = tiny_parent("llama", tokenizer=False)
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": base})
    with pytest.raises(MolError):
        open_parent(folder)
