"""A context beyond the positions in which parent and model agree is refused by every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import molcli
from molcli.config.sections import TrainConfig
from molcli.families.parent import open_parent
from molcli.model.parent import load_dense
from molcli.stages.cache_logits import cache_logits

SHAPE: dict[str, Any] = {"upcycle.num_blocks": 3, "upcycle.top_k": 1, "upcycle.d_thin": 32}
TEXT: dict[str, Any] = {"calibrate.tokens": 512, "calibrate.heldout_tokens": 128}
LIMIT = 32
# Parents for which 64 tokens are too long, and the reason.
SHORT: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"max_position_embeddings": LIMIT}, "has 32 positions"),
    ("mistral", {"sliding_window": LIMIT}, "attends to the last 32 tokens only"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 120, (20, 100), generator=generator).tolist()
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return path


@pytest.fixture(params=SHORT, ids=lambda case: case[0])
def short(request: pytest.FixtureRequest, tiny_parent: Callable[..., Path]) -> tuple[Path, str]:
    family, config, reason = request.param
    return tiny_parent(family, **config), reason


@pytest.fixture
def converted(short: tuple[Path, str], text: Path, tmp_path: Path) -> Path:
    settings = SHAPE | TEXT | {"calibrate.context_length": LIMIT}
    out = tmp_path / "converted"
    molcli.upcycle(short[0], out, data=text, settings=settings, progress=False)
    return out


def refused(section: str, work: Callable[[dict[str, Any]], object], reason: str) -> None:
    """Checks that a context of LIMIT + 1 tokens is refused before anything is written."""
    setting = f"{section}.context_length"
    with pytest.raises(molcli.MolError, match=f"`{setting}` is 33, but .*{reason}") as error:
        work({setting: LIMIT + 1})
    assert error.value.allowed == "1 to 32 tokens"
    assert error.value.hint == f"--set {setting}=32"


def test_commands_that_read_the_parent(short: tuple[Path, str], text: Path, tmp_path: Path) -> None:
    parent, reason = short
    before, out = set(tmp_path.iterdir()), tmp_path / "out"
    shared: dict[str, Any] = {"progress": False}

    def calibrate(settings: dict[str, Any]) -> object:
        return molcli.calibrate(parent, out, data=text, settings=TEXT | settings, **shared)

    def sampled(settings: dict[str, Any]) -> object:
        return molcli.calibrate(parent, out, settings=TEXT | settings, **shared)

    def upcycle(settings: dict[str, Any]) -> object:
        return molcli.upcycle(parent, out, data=text, settings=SHAPE | TEXT | settings, **shared)

    def cache(settings: dict[str, Any]) -> object:
        config = TrainConfig(context_length=settings["train.context_length"], tokens=256)
        return cache_logits(open_parent(parent), str(text), config, out, top_k=4)

    def sample(settings: dict[str, Any]) -> object:
        return molcli.sample(parent, out, settings=settings, **shared)

    with pytest.raises(molcli.MolError, match=r"`sample.length` is 257, but the parent has \d+ "):
        sample({"sample.length": 257})
    for work in (calibrate, sampled, upcycle):
        refused("calibrate", work, reason)
    refused("train", cache, reason)
    refused("train", lambda s: molcli.plan(parent, settings=s, **shared), "has 32 positions")
    assert set(tmp_path.iterdir()) == before


def test_commands_that_read_the_model(
    converted: Path, short: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    reason, out = "the model has 32 positions", tmp_path / "out"
    shared: dict[str, Any] = {"progress": False}

    def train(settings: dict[str, Any]) -> object:
        settings = settings | {"train.tokens": 256, "train.stages": None}
        return molcli.train(converted, out, data=text, settings=settings, **shared)

    def convert(settings: dict[str, Any]) -> object:
        return molcli.convert(
            converted, out, gated_deltanet="all", data=text, settings=settings, **shared
        )

    refused("train", train, reason)
    refused("calibrate", convert, reason)
    refused(
        "evaluate",
        lambda s: molcli.evaluate(converted, data=text, settings=s, **shared),
        reason,
    )
    refused("inspect", lambda s: molcli.inspect(converted, text, settings=s, **shared), reason)
    assert not out.exists()


def test_a_continuation_counts_with_its_prompt(
    converted: Path, short: tuple[Path, str], text: Path
) -> None:
    settings = {"evaluate.context_length": LIMIT, "evaluate.prompt_length": 20}
    with pytest.raises(molcli.MolError, match="are 52 together, but the model has 32 positions"):
        molcli.evaluate(converted, data=text, parent=short[0], settings=settings, progress=False)


def test_a_parent_with_fewer_positions_than_the_model(
    tiny_parent: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    settings = SHAPE | TEXT | {"calibrate.context_length": 64}
    long, short = tiny_parent("llama"), tiny_parent("llama", max_position_embeddings=LIMIT)
    calibration, out = tmp_path / "calibration", tmp_path / "model"
    molcli.calibrate(long, calibration, data=text, settings=settings, progress=False)
    molcli.upcycle(long, out, calibration=calibration, settings=settings, progress=False)
    values: dict[str, Any] = {"tokens": 256, "context_length": 64, "stages": None}
    with pytest.raises(molcli.MolError, match=r"`train.context_length` is 64, but the parent has"):
        molcli.train(out, tmp_path / "t", data=text, parent=short, progress=False, **values)
    with pytest.raises(
        molcli.MolError, match=r"`evaluate.context_length` is 64, but the model has"
    ):
        molcli.evaluate(out, data=text, parent=short, context_length=64, progress=False)
    # Its weights are those of the long one: the text of the calibration has too long rows.
    with pytest.raises(molcli.MolError, match="has rows of 64 tokens, but the parent has 32"):
        molcli.upcycle(
            short, tmp_path / "u", calibration=calibration, settings=settings, progress=False
        )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"max_position_embeddings": LIMIT}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
        ("mistral", {"sliding_window": LIMIT}),
        (
            "mistral",
            {
                "sliding_window": LIMIT,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            },
        ),
        ("gemma3_text", {"sliding_window": 8}),
    ],
)
def test_up_to_the_limit_the_true_function_is_computed(
    tiny_parent: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    folder = tiny_parent(family, **config)
    parent = open_parent(folder)
    length = parent.mol_config_kwargs()["max_position_embeddings"]
    ids = torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(0))
    ours = load_dense(parent, torch.float32, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)
