"""Attention of a Mixture of Layers checkpoint becomes Gated DeltaNet."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from molcli.config.sections import CalibrateConfig, ConvertConfig, Recipe
from molcli.errors import MolError
from molcli.fitting.calibration import split_text, text_hash
from molcli.fitting.residuals import open_residuals, split_rows
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.checkpoint import default_device
from molcli.stages.convert import ConversionText, convert, open_source_checkpoint, select_layers
from molcli.stages.convert.layer import align_mixer, convert_layer
from molcli.stages.convert.selection import layer_costs, with_gated_deltanet

SOFTMAX = {
    "layer_structures": ["dense", "mixture", "mixture"],
    "layer_mixers": ["attention", "attention", "attention"],
}
MIXERS = ("model.layers.1.routed.block.mixer.", "model.layers.2.routed.block.mixer.")


@dataclass(frozen=True)
class Done:
    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "convert.json").read_text())
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def weights(self) -> bytes:
        return (self.folder / "model.safetensors").read_bytes()

    def model(self) -> MoLForCausalLM:
        model: MoLForCausalLM = AutoModelForCausalLM.from_pretrained(self.folder)
        return model.eval()


@pytest.fixture
def text(corpus: Callable[..., str]) -> ConversionText:
    settings = CalibrateConfig(corpus(), tokens=768, heldout_tokens=128, context_length=32)
    fit, heldout = split_text(settings, None, 128)
    return ConversionText(fit, heldout, text_hash(fit, heldout))


@pytest.fixture
def mol(tiny_mol: Callable[..., Path]) -> Callable[..., Path]:
    """A random `tiny_mol` with large weights, so that attention matters."""
    return lambda **settings: tiny_mol(**(SOFTMAX | {"initializer_range": 0.3} | settings))


@pytest.fixture
def run(tmp_path: Path, text: ConversionText) -> Callable[..., Done]:
    count = iter(range(100))

    def run(checkpoint: Path, **options: Any) -> Done:
        out = tmp_path / f"out-{next(count)}"
        recipe = Recipe(convert=ConvertConfig(**options))
        convert(open_source_checkpoint(checkpoint), text, recipe, out)
        return Done(out)

    return run


def test_without_a_layer_to_convert_the_model_is_unchanged(
    mol: Callable[..., Path], tmp_path: Path, run: Callable[..., Done]
) -> None:
    folder = mol(dtype=torch.bfloat16)
    convert(
        open_source_checkpoint(folder),
        None,
        Recipe(convert=ConvertConfig("none")),
        tmp_path / "out",
    )
    without, measured = Done(tmp_path / "out"), run(folder, gated_deltanet="none")
    before = load_file(folder / "model.safetensors")
    for done in (without, measured):
        after = done.tensors
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[n], x) and before[n].dtype == x.dtype for n, x in after.items()
        )
        assert (
            done.model().config.layer_labels
            == MoLConfig(num_hidden_layers=3, **SOFTMAX).layer_labels
        )
    assert without.report["heldout"] is None
    assert measured.report["heldout"]["kl"] == pytest.approx(0, abs=1e-6)


def test_only_the_routed_mixers_change(mol: Callable[..., Path], run: Callable[..., Done]) -> None:
    folder = mol(dtype=torch.bfloat16)
    done = run(folder)
    assert done.model().config.layer_mixers == ["attention", "gated_deltanet", "gated_deltanet"]
    before, after = load_file(folder / "model.safetensors"), done.tensors
    rest = [{n for n in tensors if not n.startswith(MIXERS)} for tensors in (before, after)]
    assert rest[0] == rest[1]
    assert all(torch.equal(before[name], after[name]) for name in rest[0])
    dtypes = {name.split(".")[-1]: x.dtype for name, x in after.items() if name.startswith(MIXERS)}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {"A_log", "dt_bias"}
    assert done.weights == run(folder).weights


@pytest.mark.parametrize(
    "settings, choice",
    [
        ({}, "all"),
        ({}, [0, 2]),  # a dense one too
        ({"num_key_value_heads": 2, "num_kv_heads_thin": 1}, [0, 1]),
        ({"qk_norm": True, "attention_bias": False}, [0, 1]),
        ({"tie_word_embeddings": False, "attention_out_bias": True}, "every:2"),
        ({"restrict_attention": False}, "all"),
        ({"num_shared_blocks": 0}, "all"),
    ],
)
@torch.no_grad()
def test_the_checkpoint_has_the_losses_of_the_report(
    settings: dict[str, Any],
    choice: Any,
    mol: Callable[..., Path],
    run: Callable[..., Done],
    text: ConversionText,
) -> None:
    folder = mol(**settings)
    done = run(folder, gated_deltanet=choice)
    ours, original = done.model(), Done(folder).model()
    batch = text.heldout.batch(slice(None))
    log_q, log_p = (
        m(**batch.inputs(), use_cache=False).logits.double().log_softmax(-1)
        for m in (ours, original)
    )
    seen = batch.labels[:, 1:] != -100
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1][seen].mean().item()
    heldout = done.report["heldout"]
    assert heldout["kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-6
    assert heldout["tokens"] == int(seen.sum())
    kinds = {row["layer"]: row["kind"] for row in done.report["layers"]}
    assert kinds == {i: k for i, k in enumerate(ours.config.layer_labels) if "delta" in k}
    # A cache gives the same logits, step by step, as one pass.
    ids = batch.input_ids[:2, :12]
    full, cache, steps = ours(ids, use_cache=False).logits, None, []
    for t in range(12):
        out = ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-3, atol=1e-4)


def test_the_fit_is_better_than_no_attention(
    mol: Callable[..., Path], text: ConversionText
) -> None:
    """And q, k and v are those of the softmax heads, key-value heads repeated."""
    source = open_source_checkpoint(mol(num_kv_heads_thin=1, attention_bias=False))
    residuals = open_residuals(text.fit, source.config, source.embedding(), default_device())
    layer = source.layer(1, default_device())
    config = with_gated_deltanet(source.config, {1})
    converted = convert_layer(config, 1, layer, residuals.parent, residuals.chunks, 1e-2)
    old, new = layer.routed.block.mixer, converted.routed.block.mixer
    for name in ("q", "k", "v"):
        a, b = getattr(old, f"{name}_proj"), getattr(new, f"{name}_proj")
        a = a if name == "q" else a.repeat(1, 2, 1)
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999
    run, x = residuals.chunks.run, residuals.parent
    wanted, fitted = run(layer, x), run(converted, x)
    new.o_proj.zero_()
    assert (fitted - wanted).norm() < 0.9 * (run(converted, x) - wanted).norm()


def test_alignment_reduces_the_error_and_changes_only_the_mixer(
    mol: Callable[..., Path], text: ConversionText
) -> None:
    source = open_source_checkpoint(mol())
    residuals = open_residuals(text.fit, source.config, source.embedding(), default_device())
    config = with_gated_deltanet(source.config, {0, 1})
    for index in (0, 1):
        layer = source.layer(index, default_device())
        converted = convert_layer(config, index, layer, residuals.parent, residuals.chunks, 1e-2)
        wanted = residuals.chunks.run(layer, residuals.parent)
        before = {n: x.clone() for n, x in converted.state_dict().items()}
        start = (residuals.chunks.run(converted, residuals.parent) - wanted).norm()
        options = ConvertConfig(steps=20, learning_rate=3e-3)
        align_mixer(config, converted, layer, residuals.parent, text.fit, options, seed=0)
        assert (residuals.chunks.run(converted, residuals.parent) - wanted).norm() < 0.9 * start
        moved = {n for n, x in converted.state_dict().items() if not torch.equal(x, before[n])}
        assert {n.split(".")[-1] for n in moved} == {
            *("q_conv", "k_conv", "v_conv", "a_proj", "b_proj", "g_proj", "o_proj", "o_norm"),
            *("A_log", "dt_bias"),
        }
        assert all(".mixer." in name for name in moved)
        residuals.advance(layer, layer)


@torch.no_grad()
def test_auto_measures_each_layer_alone(
    mol: Callable[..., Path], run: Callable[..., Done], text: ConversionText
) -> None:
    """Compared with a checkpoint with one layer converted, fitted on the same part of the text."""
    source = open_source_checkpoint(mol())
    costs = layer_costs(source, [1, 2], text.fit, 1e-2, lambda *_: None)
    done = run(source.folder, gated_deltanet="auto")
    cheaper = min(costs, key=lambda i: costs[i])
    assert [row["layer"] for row in done.report["layers"]] == [cheaper]
    assert done.report["layers"][0]["kl_alone"] == pytest.approx(costs[cheaper])
    fit, kept = split_rows(text.fit)
    recipe = Recipe(convert=ConvertConfig([cheaper]))
    out = done.folder.with_name("alone")
    convert(source, replace(text, fit=fit, heldout=kept), recipe, out)
    assert Done(out).report["heldout"]["kl"] == pytest.approx(costs[cheaper], rel=1e-4)


def test_rows_to_fit_and_to_measure_on_are_disjoint(text: ConversionText) -> None:
    fit, kept = split_rows(text.fit)
    assert len(fit) + len(kept) == len(text.fit) and len(kept) >= 1
    assert torch.equal(torch.cat([fit.input_ids, kept.input_ids]), text.fit.input_ids)
    alone = text.fit.select(slice(0, 1))
    assert split_rows(alone) == (alone, alone)


@pytest.mark.parametrize(
    "settings, choice, message",
    [
        ({}, [3], "layer 3"),
        (
            {
                "layer_structures": ["dense", "mixture", "mixture"],
                "layer_mixers": ["attention", "attention", "gated_deltanet"],
            },
            [2],
            "already",
        ),
        ({"num_blocks": 1, "num_blocks_per_tok": 0}, [1], "shared blocks alone"),
        (
            {"layer_structures": ["dense"] * 3, "layer_mixers": ["attention"] * 3},
            "all",
            "no layer has routed blocks",
        ),
        (
            {"layer_structures": ["dense"] * 3, "layer_mixers": ["attention"] * 3},
            "auto",
            "no layer has routed blocks",
        ),
    ],
)
def test_choices_that_do_not_fit_are_refused(
    settings: dict[str, Any], choice: Any, message: str, mol: Callable[..., Path]
) -> None:
    source = open_source_checkpoint(mol(**settings))
    with pytest.raises(MolError) as error:
        select_layers(source.config, choice)
    assert message in error.value.found


def test_a_broken_checkpoint_is_refused(mol: Callable[..., Path], tmp_path: Path) -> None:
    folder = mol()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_ff_thin": 25}))
    with pytest.raises(MolError) as error:
        open_source_checkpoint(folder)
    assert "ill-shaped" in error.value.found
    with pytest.raises(MolError):
        open_source_checkpoint(tmp_path)
