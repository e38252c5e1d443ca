"""Micro-batches from a CUDA graph: which are replayed, and that they give what the model gives."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from molcli.config.sections import TrainConfig
from molcli.data.packing import Batch, TokenRows, pack
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.compiled import compile_layers
from molcli.stages.train import gradient_graph
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import micro_batches
from molcli.stages.train.gradient_graph import GradientGraph, should_capture
from molcli.stages.train.objective import LossWeights, PredictionObjective, Student


def batch(rows: int, documents: int, *, padded: bool = False) -> Batch:
    ids = torch.zeros(rows, 8, dtype=torch.int64)
    return Batch(ids, ids, ids, ids, documents, torch.ones_like(ids) if padded else None)


def how_each_ran(
    monkeypatch: pytest.MonkeyPatch, *batches: Batch, waits: bool = False
) -> list[tuple[str, int]]:
    """How each micro-batch ran, and its room for documents. waits: the model synchronises."""
    model = torch.nn.Linear(1, 1)
    graph = GradientGraph(model)

    def add_gradient(given: Batch, count: Tensor) -> Any:
        return "run", given.num_documents

    def record(_: object, given: Batch, count: Tensor) -> Any:
        class Replay(SimpleNamespace):
            def __call__(self, given: Batch, count: Tensor) -> tuple[str, int]:
                return "replayed", given.num_documents

        return Replay(batch=given)

    monkeypatch.setattr(graph, "_capture", record)
    monkeypatch.setattr(gradient_graph, "_detect_synchronisation", lambda run: (run(), waits))
    return [graph(add_gradient, given, torch.ones(())) for given in batches]  # type: ignore[misc]


def test_the_third_micro_batch_of_a_shape_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = how_each_ran(
        monkeypatch, batch(4, 40), batch(4, 30), batch(4, 50), batch(3, 30), batch(4, 9)
    )
    assert found == [("run", 64), ("run", 64), ("replayed", 64), ("run", 64), ("replayed", 64)]


def test_more_documents_than_there_is_room_for_are_captured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = how_each_ran(monkeypatch, *[batch(4, n) for n in (4, 4, 4, 30, 30, 30, 64, 65, 65, 65)])
    assert found[:3] == [("run", 4), ("run", 4), ("replayed", 4)]  # rows of one document each
    assert found[3:7] == [("run", 64), ("run", 64), ("replayed", 64), ("replayed", 64)]
    assert found[7:] == [("run", 128), ("run", 128), ("replayed", 128)]


def test_the_remainder_of_a_batch_does_not_count_for_its_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = how_each_ran(monkeypatch, *[batch(4, 40), batch(2, 20)] * 3)
    assert [kind for kind, _ in found] == ["run", "run", "run", "run", "replayed", "run"]


def test_padded_rows_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = batch(4, 40, padded=True)
    found = how_each_ran(monkeypatch, batch(4, 40), batch(4, 40), padded, batch(4, 40))
    assert [kind for kind, _ in found] == ["run", "run", "run", "replayed"]


def test_a_model_that_synchronises_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = how_each_ran(monkeypatch, *[batch(4, 40)] * 4, waits=True)
    assert [kind for kind, _ in found] == ["run"] * 4


@pytest.mark.parametrize(
    ("kind", "processes", "settings", "expected"),
    [
        ("cuda", 1, {}, True),
        ("cpu", 1, {}, False),
        ("cuda", 2, {}, False),
        ("cuda", 1, {"logits": "folder"}, False),
        ("cuda", 1, {"gradient_checkpointing": True}, False),
        ("cuda", 1, {"start_top_k": 4}, False),
    ],
)
def test_what_changes_or_synchronises_is_not_captured(
    kind: str, processes: int, settings: dict[str, Any], expected: bool
) -> None:
    model = MoLConfig(
        num_hidden_layers=2,
        layer_structures=["mixture", "dense"],
        layer_mixers=["attention", "attention"],
    )
    device = torch.device(kind)
    assert should_capture(TrainConfig(**settings), model, device, processes) is expected


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {
            "layer_structures": ["mixture", "mixture"],
            "layer_mixers": ["attention", "gated_deltanet"],
        },
        {"layer_structures": ["mixture", "dense"], "layer_mixers": ["attention", "gated_deltanet"]},
    ],
)
def test_models_that_are_not_captured(settings: dict[str, Any]) -> None:
    shape = {
        "num_hidden_layers": 2,
        "layer_structures": ["mixture", "dense"],
        "layer_mixers": ["attention", "attention"],
    }
    model = MoLConfig(**(shape | settings))
    assert not should_capture(TrainConfig(), model, torch.device("cuda"), 1)


def packed_rows(vocabulary: int) -> TokenRows:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 90, (400,), generator=generator).tolist()
    documents = [
        torch.randint(vocabulary, (length,), dtype=torch.int32, generator=generator)
        for length in lengths
    ]
    return pack(documents, 64, seed=0)


def small_model(kind: str, **blocks: int) -> MoLForCausalLM:
    config = MoLConfig(
        vocab_size=97,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        layer_kinds=[kind] * 3,
        d_thin=64,
        d_ff_thin=128,
        initializer_range=0.1,
        **blocks,
    )
    return MoLForCausalLM(config).cuda()


@pytest.fixture
def on_gpu() -> Iterator[Accelerator]:
    """All Accelerators have one state in common, which other tests have set to a CPU."""
    states = [AcceleratorState._shared_state, PartialState._shared_state]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    yield Accelerator()
    for state, filled in zip(states, before, strict=True):
        state.clear()
        state.update(filled)


@pytest.mark.gpu
def test_a_graph_adds_the_gradients_that_the_model_adds(on_gpu: Accelerator) -> None:
    """Over steps that change the weights, of two micro-batches each."""
    torch.manual_seed(0)
    accelerator = on_gpu
    model = small_model("softmax", num_blocks=7, num_shared_blocks=1, num_blocks_per_tok=2).train()
    parent = small_model("dense").to(torch.bfloat16).eval().requires_grad_(False)
    rows = packed_rows(model.config.vocab_size)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run(*, low: bool, graph: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Means and gradients of each of 5 steps, and how often each block was chosen."""
        model.load_state_dict(start)
        loads = RouterLoads(model)
        student = Student(model, torch.bfloat16 if low else torch.float32, loads)
        weights = LossWeights(ce=0.3, kl=0.7, compiled=low)
        replay = GradientGraph(model) if graph else None
        objective = PredictionObjective(student, parent, weights, balance_weight=0.01, graph=replay)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        means, gradients = [], []
        for step in range(5):
            index = torch.arange(16 * step, 16 * (step + 1)) % len(rows)
            means.append(
                objective.backward(micro_batches(rows, index, 8, accelerator), accelerator)
            )
            flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients.append(torch.cat(flat).clone())
            optimizer.step()
            loads.add_step_to_window()
            loads.reset_step()
            optimizer.zero_grad()
        assert replay is None or replay.captured is not None
        return means, gradients, loads.pop_window(accelerator)

    exact = run(low=False, graph=False)
    compile_layers(model)
    compile_layers(parent)
    eager, replayed = run(low=True, graph=False), run(low=True, graph=True)
    assert int(replayed[2].sum()) == int(exact[2].sum())
    for part in (0, 1):
        for right, slow, fast in zip(exact[part], eager[part], replayed[part], strict=True):
            errors = [float((x - right).norm() / right.norm()) for x in (slow, fast)]
            print(f"error from a graph {errors[1]:.4f}, without {errors[0]:.4f}")
            assert errors[1] < 2 * errors[0] + 1e-3
