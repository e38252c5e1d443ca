"""Weights of parents: of mixed dtypes, not finite, too large for a cast, or zero."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molcli
from molcli.config.sections import TrainConfig
from molcli.families.parent import open_parent
from molcli.model.parent import load_dense
from molcli.stages.cache_logits import cache_logits

SHAPE: dict[str, Any] = {"upcycle.num_blocks": 3, "upcycle.top_k": 1, "upcycle.d_thin": 32}
SETTINGS: dict[str, Any] = SHAPE | {
    "calibrate.tokens": 512,
    "calibrate.heldout_tokens": 128,
    "calibrate.context_length": 32,
    "train.tokens": 128,
    "train.context_length": 32,
    "train.stages": None,
    "evaluate.context_length": 32,
    "sample.tokens": 64,
    "sample.length": 16,
}
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
CPU = torch.device("cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents end with token 2, that of padding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 120, (40, 30), generator=generator).tolist()
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [*row, 2]}) for row in rows))
    return path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("method", ["fitted", "random"])
def test_an_embedding_in_float16_beside_bfloat16(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path, method: str
) -> None:
    folder = tiny_parent("llama", tie_word_embeddings=False, dtype=torch.bfloat16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].half()
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6  # infinite in float16

    edit(folder, change)
    out = tmp_path / "out"
    settings = SETTINGS | {"upcycle.method": method, "upcycle.layers": [1]}
    molcli.upcycle(folder, out, data=text, settings=settings, progress=False)
    assert dtypes(out) == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([[1, 5, 9]])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("embedding", "norm", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),  # the other tensors are bfloat16
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_the_dtype_holds_all_weights(
    tiny_parent: Callable[..., Path],
    embedding: torch.dtype,
    norm: torch.dtype,
    expected: torch.dtype,
) -> None:
    folder = tiny_parent("qwen3", dtype=torch.bfloat16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(embedding)
        tensors[NORM] = tensors[NORM].to(norm)

    assert open_parent(edit(folder, change)).dtype == expected


def test_buffers_that_nothing_reads_have_no_say(tiny_parent: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = tiny_parent("llama", dtype=torch.bfloat16)
    edit(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert open_parent(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (EMBEDDING, (-1, 3)),  # the row of a token that no text has
        (NORM, (5,)),
        ("model.layers.1.self_attn.q_proj.bias", (0,)),
        ("model.layers.1.mlp.down_proj.weight", (63, 95)),
        ("model.layers.0.input_layernorm.weight", (63,)),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_parent: Callable[..., Path],
    name: str,
    place: tuple[int, ...],
    dtype: torch.dtype,
    value: float,
) -> None:
    folder = tiny_parent("qwen2", tokenizer=False, dtype=dtype)
    open_parent(folder).check_weights()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = value

    with pytest.raises(molcli.MolError, match=f"{name} in .* NaN or infinite"):
        open_parent(edit(folder, change)).check_weights()


def test_every_command_refuses_them_before_it_works(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder, model, out = tiny_parent("llama"), tmp_path / "model", tmp_path / "out"
    shared: dict[str, Any] = {"settings": SETTINGS, "progress": False}
    calibration = molcli.calibrate(folder, tmp_path / "c", data=text, **shared)
    molcli.upcycle(folder, model, calibration=calibration, **shared)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][63] = torch.nan

    edit(folder, change)  # past what the fingerprint reads: the calibration still belongs to it
    before = set(tmp_path.iterdir())
    train = TrainConfig(tokens=64, context_length=32)
    works: list[Callable[[], object]] = [
        lambda: molcli.calibrate(folder, out, data=text, **shared),
        lambda: molcli.upcycle(folder, out, data=text, **shared),
        lambda: molcli.upcycle(folder, out, **shared),
        lambda: molcli.sample(folder, out, **shared),
        lambda: molcli.train(model, out, data=text, parent=folder, **shared),
        lambda: molcli.evaluate(model, data=text, parent=folder, **shared),
        lambda: cache_logits(open_parent(folder), str(text), train, out, top_k=4),
    ]
    for work in works:
        with pytest.raises(molcli.MolError, match=r"1\.post_attention_layernorm\.weight in .* NaN"):
            work()
    assert set(tmp_path.iterdir()) == before


def test_a_model_that_is_not_finite_is_refused_by_name(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, shared = tmp_path / "model", {"settings": SETTINGS, "progress": False}
    molcli.upcycle(tiny_parent("llama"), model, data=text, **shared)
    name = "model.layers.1.router.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = torch.inf

    edit(model, change)
    for work in (
        lambda: molcli.open_model(model),
        lambda: molcli.evaluate(model, data=text, **shared),
        lambda: molcli.inspect(model, text, context_length=32, progress=False),
        lambda: molcli.train(model, tmp_path / "out", data=text, **shared),
        lambda: molcli.convert(model, tmp_path / "out", gated_deltanet="all", data=text, **shared),
    ):
        with pytest.raises(molcli.MolError, match=f"{name} in .* NaN or infinite"):
            work()
    assert not (tmp_path / "out").exists()


def test_a_cast_that_overflows_is_refused_by_name(tiny_parent: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = 1e5

    parent = open_parent(edit(tiny_parent("llama"), change))
    load_dense(parent, torch.bfloat16, CPU)
    with pytest.raises(molcli.MolError, match=r"mlp.up_proj has entries up to 1e\+05, too large"):
        load_dense(parent, torch.float16, CPU)


@pytest.mark.parametrize("stored", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_other_types_are_refused(tiny_parent: Callable[..., Path], stored: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = torch.ones(64).to(stored)

    with pytest.raises(molcli.MolError, match=r"model\.norm\.weight in .* is stored as"):
        open_parent(edit(tiny_parent("llama"), change))


@pytest.mark.parametrize("gated_deltanet", ["none", "all"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text"])
def test_a_row_of_zeros_converts(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path, family: str, gated_deltanet: str
) -> None:
    """transformers initialises the row of the padding token so, which is often that of the end."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING][2] = 0.0

    folder = edit(tiny_parent(family), change)
    settings = SETTINGS | {"upcycle.gated_deltanet": gated_deltanet, "upcycle.receipt": "full"}
    found = molcli.upcycle(folder, tmp_path / "out", data=text, settings=settings, progress=False)
    assert found.report["heldout"]["kl"] < 2.0
    logits = molcli.open_model(tmp_path / "out")(torch.tensor([[1, 5, 2, 9]])).logits
    assert logits.isfinite().all()
