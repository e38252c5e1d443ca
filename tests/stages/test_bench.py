"""`molcli bench` times the right work. The times themselves depend on the machine."""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from molcli.cli import main as command
from molcli.config.recipe import load_recipe
from molcli.errors import MolError
from molcli.model import MoLForCausalLM
from molcli.model.routing.router import Router
from molcli.stages.bench import SECTIONS, Row, bench, measure, open_benchmark_pair
from molcli.stages.bench.models import equivalent_llama
from molcli.stages.bench.routing import forced_routing, load_extremes
from molcli.stages.init import untrained_config

TINY = [
    "model.vocab_size=120",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.head_dim=16",
    "model.num_blocks=6",
    "model.top_k=2",
    "model.d_thin=32",
    "model.d_ff_thin=24",
]
LITTLE = measure.Sizes(
    prefill=(16,), decode=((1, 8), (2, 4)), new_tokens=2, train=((1, 8),), rows=32, repeats=1
)


@pytest.fixture
def config():
    return untrained_config(load_recipe(None, TINY).model)


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances with each call of a module and each reading, not with real time."""
    ticks, call = itertools.count(1), nn.Module.__call__

    def counted(module, *args, **options):
        next(ticks)
        return call(module, *args, **options)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(measure, "CPU_SIZES", LITTLE)


def test_every_section_has_its_rows_for_both_kinds_of_routing(config, clock):
    pair = open_benchmark_pair(config, None, None, torch.device("cpu"))
    report = bench(pair, SECTIONS)
    works = [row.work for row in report.rows]
    assert len(works) == len(set(works)) == 2 * (1 + 2 + 1 + 1 + 1)
    assert all(row.mol > 0 for row in report.rows)
    without = {row.peer_name for row in report.rows if row.peer is None}
    assert without == {"fla-core"}, "which a CPU has no use for"
    assert set(report.loads) == {"even", "skewed"}
    assert report.machine["torch"] == torch.__version__
    json.dumps(report.to_json())


def test_ratio_is_the_speed_over_the_peers():
    assert Row("a", "tokens/s", 30.0, 10.0).ratio == 3
    assert Row("a", "ms a token", 2.0, 6.0).ratio == 3
    assert Row("a", "TFLOP/s", None, 6.0).ratio is None


def test_the_peer_of_a_two_matrix_ffn_has_a_gated_ffn_of_equal_size(config):
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 2048, 8192, 32
    peer = equivalent_llama(config)
    assert (peer.intermediate_size, peer.num_attention_heads) == (5504, 32)
    config.mlp_gated, config.intermediate_size = True, 1000
    assert equivalent_llama(config).intermediate_size == 1000


def test_forced_routing_is_as_named_and_restored(config):
    torch.manual_seed(0)
    model = MoLForCausalLM(config).eval()
    ids = torch.randint(120, (1, 256))
    before = model(ids).logits
    with forced_routing(model, "even", ids):
        even = load_extremes(model, ids)
    with forced_routing(model, "skewed", ids):
        skewed = load_extremes(model, ids)
    assert 1.5 > even[0] >= 1 >= even[1] > 0.5
    assert skewed[0] > even[0] and even[1] > skewed[1]
    assert torch.equal(model(ids).logits, before)
    assert all(not m.correction_bias.any() for m in model.modules() if isinstance(m, Router))


def test_a_checkpoint_beside_its_parent(config, tiny_parent, tmp_path, monkeypatch, capsys):
    MoLForCausalLM(config).save_pretrained(tmp_path / "mol")
    parent = tiny_parent("qwen3")
    target = tmp_path / "bench.json"
    arguments = [str(tmp_path / "mol"), "--parent", str(parent), "--only", "prefill"]
    monkeypatch.setattr(sys, "argv", ["molcli", "bench", *arguments, "--json", str(target)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    report = json.loads(target.read_text())
    assert report["dense"].startswith("qwen3") and set(report["loads"]) == {"as trained"}
    assert [row["work"] for row in report["rows"]] == ["prefill, 16 tokens, as trained"]
    assert "prefill, 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "nothing to time"),
        ({"recipe": "paper-1.3b-1+3of15", "checkpoint": "x"}, "comes with a checkpoint"),
        ({"recipe": "demo", "only": "prefill,speed"}, "--only names speed"),
        ({"recipe": "demo", "only": ","}, "--only names nothing"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, message):
    from molcli.cli.bench import run_bench

    settings = dict(checkpoint=None, parent=None, only=None, recipe=None, overrides=None)
    with pytest.raises(MolError, match=message):
        run_bench(**(settings | arguments), seed=0, compiled=True)
