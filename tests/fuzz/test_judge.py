"""The campaign sees what it is there to see: planted faults."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.forked import Forked, Outcome
from tests.fuzz.judge import judge, not_finite, read_tree
from tests.fuzz.mutations.mutation import Effect

BEFORE = {"work": "folder", "work/input.yaml": "i", "cache": "folder"}
WRITTEN = BEFORE | {"work/out": "folder", "work/out/model": "m"}
REFERENCE = {"work/out": "folder", "work/out/model": "m"}


def end(code: int, over: str | None = None, stderr: str = "") -> Outcome:
    return Outcome(code, None, "", stderr, 1.0, 1.0, 2**20, over)


def kinds(
    outcome: Outcome,
    after: dict[str, str],
    effect: Effect = Effect.ANY,
    seen: tuple[tuple[str, str], ...] = (),
) -> list[str]:
    return [
        fault.split()[0].strip(",")
        for fault in judge(outcome, BEFORE, after, seen, effect, REFERENCE, [])
    ]


@pytest.mark.parametrize("effect", Effect)
def test_a_right_result_is_no_fault(effect: Effect) -> None:
    assert kinds(end(0), WRITTEN | {"cache/x": "c"}, effect) == []


def test_a_refusal_is_a_fault_only_of_a_harmless_change() -> None:
    assert kinds(end(2), BEFORE) == kinds(end(2), BEFORE, Effect.SAME) == []
    assert kinds(end(2), BEFORE, Effect.HARMLESS) == ["wrong"]


@pytest.mark.parametrize(
    "outcome, fault",
    [
        (end(1, stderr="bug: KeyError"), "bug"),
        (end(1, stderr="error: Is a directory"), "bug"),
        (end(139), "bug"),
        (end(1, stderr="error: out of memory"), "memory"),
        (end(137, "seconds"), "hang"),
        (end(137, "memory"), "memory"),
    ],
)
def test_other_endings_are_faults(outcome: Outcome, fault: str) -> None:
    assert kinds(outcome, BEFORE) == [fault]


@pytest.mark.parametrize(
    "path, content", [("work/other", "x"), ("work/input.yaml", "changed"), ("tmp/x", "x")]
)
def test_what_changes_outside_the_output_is_a_fault(path: str, content: str) -> None:
    assert kinds(end(0), WRITTEN | {path: content}) == ["outside"]


def test_what_stays_after_a_refusal_is_a_fault() -> None:
    assert kinds(end(2), WRITTEN) == ["left"]
    # A run of training that was under way keeps its log and checkpoints.
    assert kinds(end(2), WRITTEN | {"work/out/log.jsonl": "1"}) == []


def test_another_result_is_a_fault_where_the_change_has_no_meaning() -> None:
    other = WRITTEN | {"work/out/model": "n"}
    assert kinds(end(0), other) == []
    assert kinds(end(0), other, Effect.SAME) == kinds(end(0), BEFORE, Effect.SAME) == ["wrong"]
    assert kinds(end(0), other, Effect.HARMLESS) == ["wrong"]


def test_numbers_that_are_not_finite_are_seen(tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    out.mkdir(parents=True)
    save_file({"a": torch.ones(3), "b": torch.arange(3)}, out / "good.safetensors")
    save_file({"a": torch.tensor([1.0, torch.inf])}, out / "inf.safetensors")
    save_file({"a": torch.tensor([torch.nan]).bfloat16()}, out / "nan.safetensors")
    (out / "good.json").write_text('{"loss": 1.5}')
    (out / "nan.json").write_text(json.dumps({"loss": float("nan")}))
    (out / "good.jsonl").write_text('{"loss": 1}\n{"loss": null}\n')
    (out / "inf.jsonl").write_text('{"loss": 1}\n{"loss": -Infinity}\n')
    (out / "half.json").write_text('{"loss": ')
    names = ["inf.safetensors", "nan.safetensors", "nan.json", "inf.jsonl", "half.json"]
    bad = {f"work/out/{name}" for name in names}
    after = read_tree(tmp_path)
    assert set(not_finite(tmp_path, {}, after)) == bad
    assert not_finite(tmp_path, after, after) == []  # they were there before


def act(payload: dict[str, str]) -> None:
    """What a faulty command does. Called in a fork, which it ends."""
    from tests.fuzz.watch import install

    install({"root": payload["root"], "note": payload["note"]})
    pickle.loads(b"cos\nsystem\n.")
    Path(payload["root"], "inside").write_text("x")
    Path(payload["root"], "link", "through").write_text("x")
    Path(payload["root"], "..", "beside").mkdir()
    raise SystemExit(0)


def test_the_watch_sees_unpickling_and_writing_elsewhere(forked: Forked, tmp_path: Path) -> None:
    root, note = tmp_path / "root", tmp_path / "note"
    (tmp_path / "elsewhere").mkdir()
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    payload = {"root": str(root), "note": str(note)}
    done = forked.run([], root, setup="tests.fuzz.test_judge:act", payload=payload)
    assert done.code == 0, done.stderr
    seen = [tuple(json.loads(line)) for line in note.read_text().splitlines()]
    assert ("unpickled", "os.system") in seen
    outside = {what for kind, what in seen if kind == "outside"}
    assert outside == {str(tmp_path / "elsewhere" / "through"), str(tmp_path / "beside")}
