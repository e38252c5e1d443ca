"""What a run logs: lines, notes, the page, trackers."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType

from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe, TrainConfig
from molcli.config.stages import Stage
from molcli.errors import MolError
from molcli.estimate.flops import training_flops
from molcli.families.parent import Parent
from molcli.model.checkpoint import open_checkpoint
from molcli.report.training import training_page
from molcli.stages.train import train
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.log import RecoveryCurve, mfu_scale

Make = Callable[..., Path]
Corpus = Callable[..., str]
# A stand-in for trackio, with what accelerate's tracker calls. It writes the calls to a file.
TRACKIO = """
import json, pathlib
FILE = pathlib.Path({file!r})

def _record(*what):
    with FILE.open("a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def log(self, values, step):
        _record("log", step, values)
    def finish(self):
        _record("finish")

def init(**options):
    if options["config"]["seed"] == 13:
        raise RuntimeError("no room")
    _record("init", options["project"], options["name"], options["resume"])
    return Run()
"""


def recipe(**settings: Any) -> Recipe:
    """Six steps, each with its line."""
    tiny: dict[str, Any] = {
        "tokens": 6 * 2 * 16,
        "context_length": 16,
        "batch_size": 2,
        "micro_batch_size": 1,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
    }
    return replace(Recipe(), train=TrainConfig(**(tiny | settings)))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


def stop_at(tokens: int) -> Callable[..., None]:
    def progress(done: int, total: int | None, note: str = "") -> None:
        if note and done == tokens:
            raise Stopped

    return progress


def test_the_page_and_the_note_say_what_the_log_says(
    tiny_mol: Make, corpus: Corpus, dense_parent: Parent, tmp_path: Path
) -> None:
    out, notes = tmp_path / "out", []
    settings = recipe(log_every=4)  # and a line for the last two
    data = corpus()
    train(tiny_mol(), out, data, settings, dense_parent, progress=lambda *a: notes.append(a[2:]))
    log = lines(out)
    assert [line["step"] for line in log] == [4, 6]
    config = replace(settings.train, data=data)
    assert (out / "train.html").read_text(encoding="utf-8") == training_page(log, config)
    last = log[-1]
    note = notes[-1][0]
    assert note.startswith(f"0 distill, loss {last['loss']:.3f}, kl {last['kl']:.3f}, ")
    assert note.endswith(f" tokens/s, balance {last['balance']:.3f}")
    assert last["mfu"] is None  # the peak of a CPU is not known


def test_routing_is_that_of_all_steps_of_a_window(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    """With frozen weights, a window of six steps is the mean of six windows of one."""
    checkpoint, data = tiny_mol(), corpus()
    still = dict(learning_rate=1e-12, new_learning_rate=1e-12, balance="none")
    for every in (1, 6):
        train(checkpoint, tmp_path / f"{every}", data, recipe(log_every=every, **still))
    single, (whole,) = lines(tmp_path / "1"), lines(tmp_path / "6")
    assert list(whole["routing"]) == ["1", "2"]  # layer 0 is dense
    for layer, (least, most) in whole["routing"].items():
        assert min(line["routing"][layer][0] for line in single) <= least <= 1
        assert 1 <= most <= max(line["routing"][layer][1] for line in single)


def test_windows_count_steps_that_were_not_skipped(tiny_mol: Make) -> None:
    loads = RouterLoads(open_checkpoint(tiny_mol(), torch.device("cpu")))
    one = Accelerator(cpu=True)
    loads.add(torch.tensor([[[0, 1], [0, 2]], [[3, 1], [3, 0]]]))
    loads.add_step_to_window()
    loads.reset_step()
    loads.add(torch.tensor([[[0, 1]], [[3, 1]]]))
    loads.reset_step()  # a skipped step
    assert loads.pop_window(one).tolist() == [[2, 1, 1, 0], [1, 1, 0, 2]]
    assert not loads.pop_window(one).any()


def test_an_interrupted_run_has_its_page_and_goes_on(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path
) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    with pytest.raises(Stopped):
        train(checkpoint, out, data, recipe(), progress=stop_at(5 * 32))
    assert ">5 steps, 160 tokens in" in (out / "train.html").read_text()
    with (out / "log.jsonl").open("a") as file:  # a kill in the middle of a line
        file.write('{"step": 9, "routing": {"1": [1.0, 1.0]}')
    train(checkpoint, out, data, recipe(), resume=True)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]
    assert ">6 steps, 192 tokens in" in (out / "train.html").read_text()


def test_the_forecast_counts_from_where_the_kl_begins() -> None:
    curve = RecoveryCurve()
    for tokens in (500, 1000):
        curve.add({"kl": None, "tokens": tokens})
    for i in range(1, 31):
        curve.add({"kl": 3 * i**-0.5, "tokens": 1000 + 1000 * i})
    # 1 - 30**-0.5 is 82%; 90% are reached at 100 * 1000 of its tokens.
    assert curve.forecast() == "90% recovered in 70k tokens"
    assert RecoveryCurve().forecast() == ""


def test_utilisation_is_of_the_bf16_peak_of_all_devices(
    tiny_mol: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(tiny_mol(), torch.device("cpu"))
    stage = Stage("pretrain", recipe(precision="bf16").train)
    assert mfu_scale(stage, model, None, ranks=2) is None
    monkeypatch.setattr(
        "molcli.stages.train.log.device_name", lambda device: "NVIDIA H100 80GB HBM3"
    )
    flops = training_flops(model.config, 16, parent=None)
    assert mfu_scale(stage, model, None, ranks=2) == flops / (2 * 989.4e12)
    half = Stage("align", stage.settings)
    both = training_flops(model.config, 16, parent=model.config, layerwise=True)
    assert mfu_scale(half, model, model, ranks=1) == both / 989.4e12
    frozen = Stage("pretrain", recipe(precision="bf16", trainable="mol").train)
    less = training_flops(model.config, 16, parent=None, trainable="mol")
    assert mfu_scale(frozen, model, None, ranks=1) == less / 989.4e12 < flops / 989.4e12
    fp32 = Stage("pretrain", recipe(precision="fp32").train)
    assert mfu_scale(fp32, model, None, ranks=1) is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(MolError, match=f"pip install {name}"):
        train(tiny_mol(), tmp_path / "out", corpus(), recipe(trackers=[name]))
    assert not (tmp_path / "out").exists()


def test_unknown_trackers_are_refused() -> None:
    with pytest.raises(MolError, match="a list of tensorboard, wandb, trackio"):
        load_recipe(None, ["train.trackers=[tensorbored]"])
    with pytest.raises(MolError, match="each tracker once"):
        load_recipe(None, ["train.trackers=[wandb, wandb]"])
    chosen = load_recipe(None, ["train.trackers=[wandb, trackio]"])
    assert chosen.train.trackers == ["wandb", "trackio"]


def test_trackers_get_every_line_and_are_closed(
    tiny_mol: Make, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls.jsonl"
    package = tmp_path / "site" / "trackio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TRACKIO.format(file=str(calls)))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(__import__("sys").modules, "trackio", raising=False)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])

    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    settings = recipe(trackers=["trackio"])
    with pytest.raises(Stopped):
        train(checkpoint, out, data, settings, progress=stop_at(3 * 32))
    train(checkpoint, out, data, settings, resume=True)

    events = [json.loads(line) for line in calls.read_text().splitlines()]
    kinds = [event[0] for event in events]
    assert kinds == ["init", *["log"] * 3, "finish", "init", *["log"] * 4, "finish"]
    starts = [event for event in events if event[0] == "init"]
    assert starts[0] == starts[1]  # one run for both
    assert starts[0][1] == "molcli" and starts[0][3] == "allow"
    assert re.fullmatch(r"out-[0-9a-f]{8}", starts[0][2])
    assert [event[1] for event in events if event[0] == "log"] == [1, 2, 3, 3, 4, 5, 6]
    for event, line in zip(events[6:10], lines(out)[2:], strict=True):
        values = event[2]
        assert values == {key: line[key] for key in values}
        assert {"loss", "ce", "balance", "gradient_norm"} < set(values)
        assert "kl" not in values

    with pytest.raises(MolError, match="could not be started: no room"):
        train(checkpoint, tmp_path / "b", data, recipe(trackers=["trackio"], seed=13))


def test_tensorboard_shows_each_step_once(tiny_mol: Make, corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"
    settings = recipe(trackers=["tensorboard"])
    with pytest.raises(Stopped):
        train(checkpoint, out, data, settings, progress=stop_at(5 * 32))
    train(checkpoint, out, data, settings, resume=True)
    events = EventAccumulator(str(out / "molcli")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(n, pytest.approx(line["loss"])) for n, line in enumerate(lines(out), 1)]
