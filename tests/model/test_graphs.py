"""Prefill from CUDA graphs: which calls take it, and that it says what the model says."""

import pytest
import torch

from molcli.model.decoding.graphs import ForwardGraphs


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def test_without_a_gpu_every_call_goes_to_the_model(make_model, ids):
    model = make_model()
    model._compiled_call_impl = ForwardGraphs(model)
    with torch.no_grad():
        outputs = [model(ids, use_cache=False) for _ in range(3)]
    assert all(len(out.routing) == len(outputs[0].routing) > 0 for out in outputs)
    assert model(ids, labels=ids).loss.requires_grad


def recorded(model, monkeypatch, *calls):
    """Which calls were answered by a recording; ids are taken to be on a GPU."""
    graphs = ForwardGraphs(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(graphs, "_record", lambda ids, **_: lambda ids: "replayed")
    monkeypatch.setattr(model, "_call_impl", lambda *args, **kwargs: "run", raising=False)
    return [graphs(*args, **kwargs) for args, kwargs in calls]


def test_the_second_call_of_a_shape_is_recorded(make_model, ids, monkeypatch):
    plain = dict(use_cache=False)
    with torch.no_grad():
        found = recorded(
            make_model(dtype=torch.bfloat16).eval(),
            monkeypatch,
            ((ids,), plain),
            ((ids,), plain),
            ((ids[:, 1:],), plain),
            ((), plain | dict(input_ids=ids, attention_mask=None)),
            ((ids,), plain | dict(logits_to_keep=1)),
        )
    assert found == ["run", "replayed", "run", "replayed", "run"]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),  # a cache is what the configuration asks for
        dict(use_cache=True),
        dict(use_cache=False, attention_mask=torch.ones(2, 40)),
        dict(use_cache=False, labels=torch.ones(2, 40)),
        dict(use_cache=False, output_router_logits=True),
        dict(use_cache=False, logits_to_keep=torch.tensor([1])),
    ],
)
def test_calls_that_ask_for_more_are_never_recorded(make_model, ids, monkeypatch, kwargs):
    with torch.no_grad():
        model = make_model(dtype=torch.bfloat16).eval()
        assert recorded(model, monkeypatch, *[((ids,), kwargs)] * 3) == ["run"] * 3


@pytest.mark.parametrize(
    "settings",
    [
        dict(),  # fp32, whose grouped products wait for the device
        dict(
            dtype=torch.bfloat16,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
        ),
    ],
)
def test_models_that_wait_for_the_device_are_never_recorded(make_model, ids, monkeypatch, settings):
    call = ((ids,), dict(use_cache=False))
    with torch.no_grad():
        assert recorded(make_model(**settings).eval(), monkeypatch, call, call) == ["run"] * 2


def test_calls_with_gradients_or_in_training_are_never_recorded(make_model, ids, monkeypatch):
    call = ((ids,), dict(use_cache=False))
    model = make_model(dtype=torch.bfloat16)
    assert recorded(model.eval(), monkeypatch, call, call) == ["run"] * 2
    with torch.no_grad():
        assert recorded(model.train(), monkeypatch, call, call) == ["run"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "gated_deltanet"])
@torch.no_grad()
def test_a_graph_says_what_the_model_says(make_model, ids, kind):
    """Also after the ids, the weights and the routers' biases have changed in place."""
    settings = dict(layer_kinds=[kind] * 3, head_dim=64, d_thin=64)
    model = make_model(device="cuda", dtype=torch.bfloat16, **settings).eval()
    plain = make_model(device="cuda", dtype=torch.bfloat16, **settings).eval()
    exact = make_model(device="cuda", **settings).eval()
    for one in (plain, exact):
        one.load_state_dict(model.state_dict())
    model.compile()
    for shift in range(4):
        now = (ids.cuda() + shift) % 97
        for one in (model, plain, exact):
            one.lm_head.weight.mul_(1 + shift)
            for layer in one.model.layers:
                layer.router.correction_bias[shift % 2] += 0.125
        found, eager, right = (
            one(now, use_cache=False).logits.float() for one in (model, plain, exact)
        )
        error, allowed = ((x - right).norm() / right.norm() for x in (found, eager))
        print(f"{kind}, call {shift}: {error:.4f} (eager bf16 {allowed:.4f})")
        assert error < 2 * allowed
    assert len(model._compiled_call_impl.recorded) == 1
