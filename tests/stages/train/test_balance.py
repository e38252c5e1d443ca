"""Loss-free balancing, and more blocks at the start."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.checkpoint import open_checkpoint
from molcli.model.routing.balance import block_counts
from molcli.model.routing.router import Router, Routing
from molcli.stages.train import train
from molcli.stages.train.balance import RouterLoads, routers, scheduled_top_k, set_top_k

ONE = Accelerator(cpu=True)


@pytest.fixture
def model(tiny_mol: Callable[..., Path]) -> MoLForCausalLM:
    return open_checkpoint(tiny_mol(num_blocks=9), torch.device("cpu"))


def balance(loads: RouterLoads, router: Router, x: Tensor, steps: int, rate: float) -> Tensor:
    """Loads after `steps` updates on the same tokens, in two micro-batches each."""
    for _ in range(steps):
        for part in x.chunk(2):
            loads.add(router(part).blocks[None])
        loads.update_biases(rate, ONE)
    return block_counts(router(x).blocks, len(router.weight))


def test_a_skewed_router_is_balanced(model: MoLForCausalLM) -> None:
    router = routers(model)[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) + 0.5
    router.weight.data.copy_(torch.randn(8, 32, generator=generator) * 0.1)
    router.weight.data[2] += 0.1  # most tokens prefer it
    before = block_counts(router(x).blocks, 8)
    with torch.no_grad():
        assert before.max() > 3 * before.float().mean()
        RouterLoads(model).add(router(x).blocks[None])
    after = balance(RouterLoads(model), router, x, steps=300, rate=0.01)
    assert after.max() < 1.2 * after.float().mean()
    assert after.min() > 0.8 * after.float().mean()


def test_clones_stay_together(model: MoLForCausalLM) -> None:
    """Two families of four clones, as `upcycle` makes them: a token visits one of each, whatever
    the biases have become."""
    router = routers(model)[0]
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(4, 32, generator=generator)
    router.weight.data.copy_(torch.cat([centroids, centroids]) * 0.2)
    sizes = torch.tensor([240, 100, 40, 20])
    x = centroids.repeat_interleave(sizes, dim=0)
    x = x + 1.5 * torch.randn(x.shape, generator=generator)
    before = block_counts(router(x).blocks, 8)
    after = balance(RouterLoads(model), router, x, steps=200, rate=0.02)
    assert after.max() < 1.3 * after.float().mean() < before.max()
    assert torch.equal(router.correction_bias[:4], router.correction_bias[4:])
    assert router.correction_bias.unique().numel() == 4
    families = router(x).blocks.sort().values // 4
    assert torch.equal(families, torch.tensor([0, 1]).expand(400, 2))


def test_forward_passes_without_gradients_are_not_counted(model: MoLForCausalLM) -> None:
    loads, router = RouterLoads(model), routers(model)[0]
    with torch.no_grad():
        loads.add(router(torch.randn(5, 32)).blocks[None])
    loads.update_biases(1.0, ONE)
    assert not router.correction_bias.any()
    loads.add(router(torch.randn(5, 32)).blocks[None])
    loads.reset_step()
    loads.update_biases(1.0, ONE)
    assert not router.correction_bias.any()


@given(start=st.integers(1, 12), end=st.integers(1, 12), steps=st.integers(1, 50))
def test_the_number_of_blocks_falls_evenly(start: int, end: int, steps: int) -> None:
    start = max(start, end)
    values = [scheduled_top_k(step, steps, start, end) for step in range(steps + 5)]
    assert values == sorted(values, reverse=True)
    assert values[0] == start
    assert set(values[steps:]) == {end}
    runs = [len(list(run)) for _, run in itertools.groupby(values[:steps])]
    assert max(runs) - min(runs) <= 1 or start == end


def test_more_blocks_leave_a_decided_router_as_it_is(model: MoLForCausalLM) -> None:
    """With nearly all weight on the first two, what a layer adds keeps its size."""
    router = routers(model)[0]
    router.weight.data.zero_()
    router.weight.data[:2] = 5.0
    layer = model.model.layers[1]
    x = torch.ones(3, 32)
    with torch.no_grad():
        outputs = []
        for top_k in (2, 8):
            set_top_k(model, top_k)
            routing: Routing = router(x)
            assert routing.blocks.shape == (3, top_k)
            outputs.append(routing.weights[:, :2] / layer.top_k)
    torch.testing.assert_close(*outputs)


def test_a_run_starts_with_more_blocks_and_ends_with_the_models(
    tiny_mol: Callable[..., Path],
    corpus: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, seen = Router.forward, []

    def watched(self: Router, x: Tensor) -> Routing:
        routing = real(self, x)
        seen.append(routing.blocks.shape[1])
        return routing

    monkeypatch.setattr(Router, "forward", watched)
    settings = TrainConfig(
        tokens=8 * 2 * 16,
        context_length=16,
        batch_size=2,
        micro_batch_size=2,
        start_top_k=4,
        top_k_fraction=0.5,
        precision="fp32",
    )
    checkpoint = tiny_mol(
        num_hidden_layers=1, layer_structures=["mixture"], layer_mixers=["attention"]
    )
    train(checkpoint, tmp_path / "out", corpus(), replace(Recipe(), train=settings))
    assert seen == [4, 4, 3, 3, 2, 2, 2, 2]
    for wrong in (1, 5):
        recipe = replace(Recipe(), train=replace(settings, start_top_k=wrong))
        with pytest.raises(MolError, match=f"start_top_k. is {wrong}; .* 2 of 4"):
            train(checkpoint, tmp_path / "other", corpus(), recipe)
