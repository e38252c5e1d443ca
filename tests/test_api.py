"""The Python interface: light to import, documented, and the same work as the command line."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import molcli
from molcli.api.arguments import as_data
from molcli.cli import main as command
from molcli.config.recipe import load_recipe
from molcli.config.sections import Recipe

FUNCTIONS = [name for name in molcli.__all__ if not name[0].isupper()]
SHAPE: dict[str, Any] = {"num_blocks": 3, "top_k": 1, "d_thin": 32}
SETTINGS: dict[str, Any] = {
    **{f"upcycle.{key}": value for key, value in SHAPE.items()},
    "calibrate.tokens": 512,
    "calibrate.heldout_tokens": 128,
    "calibrate.context_length": 32,
    "train.tokens": 256,
    "train.context_length": 32,
    "train.batch_size": 4,
    "train.log_every": 1,
    "evaluate.context_length": 32,
    "evaluate.num_prompts": 2,
    "evaluate.prompt_length": 4,
    "evaluate.continuation_length": 3,
    "evaluate.recall_sequences": 2,
    "evaluate.recall_pairs": 1,
    "evaluate.recall_distances": [0, 8],
    "inspect.context_length": 32,
}


def molcli_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["molcli", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0


def as_sets(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def files(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in leave_out
    }


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 120, (40, 30), generator=generator).tolist()
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return path


def test_importing_molcli_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, molcli\n"
        "molcli.upcycle, molcli.train, molcli.MolError\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_names() -> None:
    wanted = {"upcycle", "train", "convert", "evaluate", "inspect", "plan", "open_model"}
    assert wanted <= set(FUNCTIONS)
    assert set(molcli.__all__) <= set(dir(molcli))
    with pytest.raises(AttributeError, match="no attribute 'upcycel'"):
        molcli.upcycel  # noqa: B018
    with pytest.raises(ImportError):
        from molcli import nothing  # noqa: F401


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_documents_its_arguments(name: str) -> None:
    function = getattr(molcli, name)
    signature, text = inspect.signature(function), inspect.getdoc(function)
    assert text is not None
    for heading in ("Args:", "Returns:", "Raises:", "Example:"):
        assert heading in text
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        stars = "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""
        assert f"    {stars}{parameter.name}: " in text
    assert signature.return_annotation is not inspect.Signature.empty


def test_the_command_line_and_the_functions_write_the_same_files(
    tmp_path: Path,
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    parent = tiny_parent("llama")
    a, b = tmp_path / "command", tmp_path / "function"
    sets = as_sets(SETTINGS)
    quiet: dict[str, Any] = {"progress": False}

    molcli_command(monkeypatch, "upcycle", parent, a / "up", "--data", text, *sets)
    molcli_command(monkeypatch, "convert", a / "up", a / "gdn", "--data", text)
    train = ["--parent", parent, "--data", text]
    molcli_command(monkeypatch, "train", a / "up", a / "trained", *train)
    data = ["--data", text]
    figures = ["--parent", parent, *data, "--json", a / "evaluate.json"]
    molcli_command(monkeypatch, "eval", a / "trained", *figures)
    molcli_command(monkeypatch, "inspect", a / "trained", *data, "--json", a / "inspect.json")
    capfd.readouterr()

    done = molcli.upcycle(parent, b / "up", data=text, settings=SETTINGS, **quiet)
    assert done.folder == b / "up"
    assert done.report == json.loads((b / "up/receipt.json").read_text())
    changed = molcli.convert(b / "up", b / "gdn", data=str(text), **quiet)
    assert [row["layer"] for row in changed.report["layers"]] == [0, 1]
    trained = molcli.train(b / "up", b / "trained", data=[text], parent=parent, **quiet)
    assert (trained.steps, trained.tokens) == (2, 256)
    evaluation = molcli.evaluate(b / "trained", data=text, parent=parent, **quiet)
    routing = molcli.inspect(b / "trained", text, **quiet)
    assert capfd.readouterr() == ("", "")

    # Reports name folders and count seconds.
    reports = ["receipt.json", "receipt.html", "convert.json", "log.jsonl", "train.html"]
    for name in ("up", "gdn", "trained"):
        assert files(a / name, reports) == files(b / name, reports)
        assert files(a / name).keys() == files(b / name).keys()
    assert json.loads((a / "evaluate.json").read_text()) == json.loads(
        json.dumps(evaluation.to_json())
    )
    found = json.loads((a / "inspect.json").read_text())
    assert found["layers"] == json.loads(json.dumps(routing.to_json()))["layers"]


def test_settings_are_a_mapping_texts_or_keywords(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Path
) -> None:
    parent = tiny_parent("llama")
    rest = {key: value for key, value in SETTINGS.items() if key not in SHAPE}
    texts = [f"{key}={value}" for key, value in SETTINGS.items()]
    molcli.upcycle(parent, tmp_path / "a", data=text, settings=SETTINGS, progress=False)
    molcli.upcycle(parent, tmp_path / "b", data=text, settings=texts, progress=False)
    molcli.upcycle(parent, tmp_path / "c", data=text, settings=rest, **SHAPE, progress=False)
    recipe = load_recipe(None, texts)
    molcli.upcycle(parent, tmp_path / "d", data=text, recipe=recipe, progress=False)
    kept = [(tmp_path / name / "recipe.yaml").read_bytes() for name in "abcd"]
    assert kept == [kept[0]] * 4
    saved = load_recipe(tmp_path / "a/recipe.yaml")
    assert (saved.upcycle, saved.calibrate.data) == (recipe.upcycle, str(text))


def test_text_may_be_sampled_from_the_parent_and_a_calibration_used_again(
    tmp_path: Path, tiny_parent: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    parent = tiny_parent("llama")
    capfd.readouterr()
    settings = SETTINGS | {"sample.length": 32}
    file = molcli.sample(parent, tmp_path / "text.jsonl", tokens=640, length=32, progress=False)
    folder = molcli.calibrate(
        parent, tmp_path / "calibration", data=file, settings=settings, progress=False
    )
    one = molcli.upcycle(
        parent, tmp_path / "a", calibration=folder, settings=settings, progress=False
    )
    assert one.report["heldout"]["tokens"] > 0
    assert capfd.readouterr() == ("", "")
    molcli.upcycle(parent, tmp_path / "b", settings=settings)
    drawn = capfd.readouterr().err
    assert all(title in drawn for title in ("sampling", "calibrating", "upcycling"))
    found = molcli.plan(
        parent, active=0.7, tokens=10_000, calibration=folder, settings=settings, progress=False
    )
    assert found.tokens == 10_000
    assert any(c.kl is not None and c.kl > 0 for c in found.candidates)


def test_an_opened_model_computes_and_is_known_to_transformers(
    tmp_path: Path, tiny_parent: Callable[..., Path], text: Path
) -> None:
    out = tmp_path / "out"
    molcli.upcycle(tiny_parent("llama"), out, data=text, settings=SETTINGS, progress=False)
    model = molcli.open_model(str(out), device="cpu")
    assert not model.training
    ids = torch.arange(3, 20)[None]
    other = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda out: molcli.upcycle("parent", out, preset="best"), "`upcycle.preset` is 'best'"),
        (lambda out: molcli.upcycle("parent", out, d_thinn=1), "`upcycle` has no key `d_thinn`"),
        (lambda out: molcli.upcycle("parent", out, settings={"d_thin": 1}), "names no section"),
        (lambda out: molcli.upcycle("parent", out, settings=["d_thin=1"]), "sets nothing"),
        (lambda out: molcli.upcycle("parent", out, data=["a", "a"]), "the sources are"),
        (lambda out: molcli.convert("ckpt", out, gated_deltanet="some"), "choice of layers"),
        (lambda out: molcli.convert("ckpt", out, gated_deltanet=[1, 1]), "is [1, 1]"),
        (lambda out: molcli.train("ckpt", out), "nothing to train on"),
        (lambda out: molcli.plan("parent", active=2), "active is 2"),
        (lambda out: molcli.plan("parent", tokens=0), "tokens is 0"),
        (lambda out: molcli.open_model(out), "holds no checkpoint"),
    ],
)
def test_errors_are_mol_errors(tmp_path: Path, call: Callable[[Path], object], found: str) -> None:
    with pytest.raises(molcli.MolError) as caught:
        call(tmp_path / "out")
    assert found in caught.value.found
    assert caught.value.allowed
    assert not (tmp_path / "out").exists()


def test_sources_of_text() -> None:
    assert as_data(None) is None
    assert as_data(Path("a.txt")) == as_data(["a.txt"]) == "a.txt"
    assert as_data(["a.txt", Path("b.txt")]) == {"a.txt": 1.0, "b.txt": 1.0}
    assert as_data({"a.txt": 1}) == {"a.txt": 1.0}


def test_settings_of_the_caller_are_not_changed() -> None:
    stages = [{"kind": "distill"}]
    recipe = load_recipe(None, [("train.stages", stages), ("train.stages.0.tokens", 7)])
    assert recipe.train.stages is not None
    assert stages == [{"kind": "distill"}]
    assert load_recipe(recipe) is recipe
    changed = load_recipe(recipe, [("upcycle.d_thin", 64)])
    assert changed.train == recipe.train
    assert changed.upcycle.d_thin == 64
    assert load_recipe(Recipe(), ["upcycle.d_thin=64"]).upcycle == changed.upcycle
