"""log.jsonl and tracked.json of a run that is resumed, as a crash or an editor may leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from molcli.config.sections import Recipe, TrainConfig
from molcli.errors import MolError
from molcli.stages.train import train
from molcli.stages.train.log_file import drop_lines_after, read_log
from molcli.stages.train.trackers import open_trackers

SETTINGS = TrainConfig(
    tokens=4 * 2 * 16,
    context_length=16,
    batch_size=2,
    checkpoint_every=1,
    log_every=1,
    precision="fp32",
)


@pytest.fixture
def log(tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path) -> Path:
    train(tiny_mol(), tmp_path / "out", corpus(), Recipe(train=SETTINGS))
    return tmp_path / "out" / "log.jsonl"


BAD: list[Any] = [
    *("", "5", "[]", "{}", "{", "null", "\0\0\0", "[" * 10**5),
    *({"step": None}, {"step": "2"}, {"step": 1.5}, {"step": True}, {"step": 10**40}),
    *({"loss": "low"}, {"loss": [1]}, {"tokens": -1}, {"stage": 3}, {"not_finite": 1}),
    *({"routing": 5}, {"routing": {"1": [1]}}, {"routing": {"9": [1, 1]}}, {"passes": None}),
    {"seconds": None},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:20])
def test_a_line_that_is_not_ours_is_named(log: Path, bad: Any) -> None:
    lines = log.read_text().splitlines()
    lines[1] = bad if isinstance(bad, str) else json.dumps(json.loads(lines[1]) | bad)
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(MolError, match=f"line 2 of {log} is not a line") as refused:
        read_log(log)
    assert f"move {log} elsewhere" in refused.value.hint


def test_a_line_that_lacks_a_field_is_named(log: Path) -> None:
    whole = [json.loads(line) for line in log.read_text().splitlines()]
    for name in whole[0]:
        changed = [dict(line) for line in whole]
        del changed[2][name]
        log.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(MolError, match="line 3 of"):
            read_log(log)


def test_a_last_line_that_was_cut_is_left_out(log: Path) -> None:
    whole = log.read_bytes()
    *_, last = whole.splitlines()
    for length in (1, len(last) // 2, len(last) - 1):
        log.write_bytes(whole[: len(whole) - 1 - len(last) + length])
        assert [line["step"] for line in read_log(log)] == [1, 2, 3]
    drop_lines_after(log, 2)
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert sorted(path.name for path in log.parent.glob(".log*")) == []


def test_nan_of_an_earlier_version_is_null(log: Path) -> None:
    line = json.loads(log.read_text().splitlines()[0]) | {"loss": float("nan")}
    log.write_text(json.dumps(line) + "\n")
    assert read_log(log)[0]["loss"] is None


def test_a_run_with_a_strange_line_is_refused_and_continues_without_the_log(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint, data, out = tiny_mol(), corpus(), tmp_path / "out"

    def stop(done: int, total: int | None, note: str = "") -> None:
        if note and done == 2 * 2 * 16:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(checkpoint, out, data, Recipe(train=SETTINGS), progress=stop)
    (out / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(MolError, match="line 1 of"):
        train(checkpoint, out, data, Recipe(train=SETTINGS), resume=True)
    assert (out / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (out / "log.jsonl").rename(tmp_path / "elsewhere")
    train(checkpoint, out, data, Recipe(train=SETTINGS), resume=True)
    assert [line["step"] for line in read_log(out / "log.jsonl")][-1] == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"run": 5}', '{"run": "../../x"}', '{"run": ""}']
)
def test_a_malformed_name_of_a_tracked_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracked.json").write_text(text)
    main: Any = SimpleNamespace(is_main_process=True)
    config = TrainConfig(trackers=["tensorboard"])
    with pytest.raises(MolError, match=r"tracked\.json"), open_trackers(main, config, tmp_path, 0):
        pass
