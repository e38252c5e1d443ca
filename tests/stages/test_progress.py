"""What every stage reports: counts that do not fall, never exceed the total, and end at it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from molcli.config.recipe import load_recipe
from molcli.config.sections import (
    CalibrateConfig,
    ConvertConfig,
    EvaluateConfig,
    InspectConfig,
    Recipe,
    SampleConfig,
    StageConfig,
    TrainConfig,
    UpcycleConfig,
)
from molcli.data.documents import read_documents
from molcli.data.token_folder import write_token_folder
from molcli.data.tokenizer import find_tokenizer, tokenize
from molcli.families.parent import open_parent
from molcli.fitting.calibration import split_text, text_hash
from molcli.progress import Progress
from molcli.stages.bench import bench, measure, open_benchmark_pair
from molcli.stages.cache_logits import cache_logits
from molcli.stages.calibrate import calibrate
from molcli.stages.convert import ConversionText, convert, open_source_checkpoint
from molcli.stages.evaluate import measure as evaluate
from molcli.stages.evaluate import open_models
from molcli.stages.init import untrained_config
from molcli.stages.inspect import inspect_routing
from molcli.stages.sample import sample
from molcli.stages.train import train
from molcli.stages.upcycle import upcycle

SHAPE = UpcycleConfig(num_blocks=3, top_k=1, d_thin=32)
TEXT = CalibrateConfig(tokens=512, heldout_tokens=128, context_length=32)


@dataclass
class Recorder:
    """A callback that keeps what it is told, by phase; "" is the work itself."""

    calls: dict[str, list[tuple[int, int | None]]] = field(default_factory=dict)

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        self._add("", done, total)

    def phase(self, name: str) -> Progress:
        return lambda done, total, note="": self._add(name, done, total)

    def _add(self, name: str, done: int, total: int | None) -> None:
        told = self.calls.setdefault(name, [])
        if told and done < told[-1][0]:  # only a phase that has ended comes again
            assert name and told[-1][0] == told[-1][1]
        assert done >= 0
        assert total is None or done <= total, (name, done, total)
        told.append((done, total))

    def check(self, *phases: str) -> None:
        assert list(self.calls) == list(phases)
        for name, told in self.calls.items():
            assert told[-1][0] == told[-1][1] > 0, name

    def last(self, name: str = "") -> int:
        return self.calls[name][-1][0]


@pytest.fixture
def told() -> Recorder:
    return Recorder()


@pytest.fixture
def text(tmp_path: Path) -> str:
    """60 documents of 20 words and an EOS each."""
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [*range(3, 23), 2]}) for _ in range(60)))
    return str(path)


@pytest.mark.parametrize("tokens, length", [(10, 100), (300, 40), (1, 2), (64, 3)])
def test_sample(
    tiny_parent: Callable[..., Path], tmp_path: Path, told: Recorder, tokens: int, length: int
) -> None:
    config = SampleConfig(tokens=tokens, length=length, batch_size=3)
    sample(open_parent(tiny_parent("llama")), config, tmp_path / "out.jsonl", told)
    told.check("")
    assert told.last() == tokens
    # The end is shown when the last token is made, not while it is.
    assert [done for done, _ in told.calls[""]].count(tokens) == 1


def test_tokenize(
    tiny_parent: Callable[..., Path], tmp_path: Path, text: str, told: Recorder
) -> None:
    tokenizer = find_tokenizer(str(tiny_parent("llama")))
    for number, limit in enumerate([None, 100, 10**6]):
        recorder = Recorder()
        documents = tokenize(
            read_documents(text), tokenizer, vocab_size=128, limit=limit, progress=recorder
        )
        count = write_token_folder(documents, tmp_path / str(number), tokenizer, source=text)
        recorder.check("")
        assert recorder.last() == count


def test_cache_logits(
    tiny_parent: Callable[..., Path], tmp_path: Path, text: str, told: Recorder
) -> None:
    config = TrainConfig(tokens=512, context_length=16, batch_size=4)
    parent, out = open_parent(tiny_parent("llama")), tmp_path / "cache"
    sources = {text: 1.0, str(Path(text).rename(tmp_path / "b.jsonl")): 1.0}
    Path(text).write_text((tmp_path / "b.jsonl").read_text())
    cache_logits(parent, sources, config, out, top_k=4, progress=told)
    told.check("reading", "")
    assert told.last() == 512


def test_train_with_two_stages_and_sources_that_are_too_short(
    tiny_mol: Callable[..., Path], tmp_path: Path, text: str, told: Recorder
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"input_ids": [*range(3, 63)]}))
    stages = [StageConfig("pretrain", tokens=320), StageConfig("pretrain", tokens=320)]
    config = TrainConfig(
        data={str(short): 1.0, text: 1.0}, context_length=16, batch_size=4, stages=stages
    )
    train(tiny_mol(), tmp_path / "out", None, replace(Recipe(), train=config), progress=told)
    told.check("reading", "", "writing")
    assert told.last() == 640


@pytest.mark.parametrize("auto", [False, True])
def test_calibrate_and_upcycle(
    tiny_parent: Callable[..., Path], tmp_path: Path, text: str, told: Recorder, auto: bool
) -> None:
    parent, folder = open_parent(tiny_parent("llama")), tmp_path / "calibration"
    data = replace(TEXT, data=text)
    calibrate(parent, data, folder, told)
    told.check("")
    assert told.last() == 2
    told = Recorder()
    shape = replace(SHAPE, layers="auto", gated_deltanet="auto", receipt="full") if auto else SHAPE
    recipe = replace(Recipe(), upcycle=shape, calibrate=data)
    upcycle(parent, folder, recipe, tmp_path / "out", told)
    if auto:
        told.check("measuring", "comparing", "", "continuing")
    else:
        told.check("", "comparing")
    assert told.last() == 2


def test_convert(tiny_mol: Callable[..., Path], tmp_path: Path, text: str, told: Recorder) -> None:
    fit, heldout = split_text(replace(TEXT, data=text), None, 128)
    packed = ConversionText(fit, heldout, text_hash(fit, heldout))
    source = open_source_checkpoint(tiny_mol(layer_mixers=["attention"] * 3))
    recipe = replace(Recipe(), convert=ConvertConfig(gated_deltanet="auto"))
    convert(source, packed, recipe, tmp_path / "out", told)
    told.check("measuring", "comparing", "")
    assert told.last() == 3


def test_evaluate_and_inspect(
    tiny_parent: Callable[..., Path], tmp_path: Path, text: str, told: Recorder
) -> None:
    parent, folder = open_parent(tiny_parent("llama")), tmp_path / "calibration"
    recipe = replace(Recipe(), upcycle=SHAPE, calibrate=replace(TEXT, data=text))
    calibrate(parent, recipe.calibrate, folder)
    upcycle(parent, folder, recipe, tmp_path / "mol")
    config = EvaluateConfig(
        tokens=300,
        context_length=32,
        num_prompts=4,
        prompt_length=4,
        continuation_length=3,
        recall_sequences=2,
        recall_pairs=1,
        recall_distances=[0, 8, 10_000],
    )
    evaluate(open_models(tmp_path / "mol", parent), text, config, told)
    told.check("", "continuing", "recall")
    assert (told.last(), told.last("continuing")) == (300, 4)
    told = Recorder()
    inspect_routing(
        tmp_path / "mol", text, InspectConfig(tokens=300, context_length=32), progress=told
    )
    told.check("")
    assert told.last() == 300


def test_bench(told: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    little = measure.Sizes(
        prefill=(16,), decode=((1, 8),), new_tokens=2, train=((1, 8),), rows=32, repeats=1
    )
    monkeypatch.setattr(measure, "CPU_SIZES", little)
    tiny = dict(hidden_size=64, num_hidden_layers=1, head_dim=16, d_thin=32, vocab_size=120)
    model = load_recipe(None, [(f"model.{key}", value) for key, value in tiny.items()]).model
    from molcli.model.checkpoint import default_device

    pair = open_benchmark_pair(untrained_config(model), None, None, default_device())
    bench(pair, ["prefill", "decode"], progress=told)
    told.check("")
    assert told.last() == 2
