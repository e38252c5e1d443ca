"""Scores of lm-eval on a local task match the two models."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.stages.evaluate.heldout import Models, open_models
from molcli.stages.evaluate.tasks import open_tasks

QUESTIONS = [
    ("the quick brown", [" fox", " bear"], 0),
    ("over the lazy", [" fox", " dog"], 1),
    ("a layer of thin", [" blocks", " dog", " router"], 0),
    ("sees what the", [" slow", " router"], 1),
]
TASK = """
task: molcli_tiny
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""

GENERATION = """
task: molcli_tiny_generation
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 4
metric_list:
  - metric: exact_match
filter_list:
  - name: strict
    filter:
      - function: take_first
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer})
        for question, choices, answer in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    return folder


@torch.no_grad()
def accuracy(models: Models, name: str) -> float:
    """Share of questions whose answer is the likeliest continuation."""
    model, tokenizer = models.named()[name], models.tokenizer
    assert tokenizer is not None
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
            odds = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(odds.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


def test_a_local_task_runs_offline_on_both_models(
    task_folder: Path,
    tiny_mol: Callable[..., Path],
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    parent = tiny_parent("llama")
    checkpoint = tiny_mol()
    open_parent(parent).copy_tokenizer(checkpoint)
    models = open_models(checkpoint, open_parent(parent))
    scores = open_tasks(["molcli_tiny"], task_folder).run(models, batch_size=2)
    assert set(scores) == {"molcli_tiny"}
    assert set(scores["molcli_tiny"]) == {"acc", "acc_stderr"}
    assert scores["molcli_tiny"]["acc"] == {
        name: pytest.approx(accuracy(models, name)) for name in ("model", "parent")
    }
    with pytest.raises(MolError, match="no tokenizer"):
        open_tasks(["molcli_tiny"], task_folder).run(Models(models.model, None, None), 2)


def test_a_task_that_generates(
    task_folder: Path,
    tiny_mol: Callable[..., Path],
    tiny_parent: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers are what the model says itself, so that it is right and its parent is not."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    parent = tiny_parent("llama")
    checkpoint = tiny_mol(initializer_range=0.2)
    open_parent(parent).copy_tokenizer(checkpoint)
    models = open_models(checkpoint, open_parent(parent))
    tokenizer = models.tokenizer
    assert tokenizer is not None
    lines = []
    for question, _, _ in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")
        said = models.model.generate(**ids, max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        lines.append(json.dumps({"question": question, "answer": answer}))
    (task_folder / "said.jsonl").write_text("\n".join(lines) + "\n")
    (task_folder / "said.yaml").write_text(GENERATION.format(data=task_folder / "said.jsonl"))
    scores = open_tasks(["molcli_tiny_generation"], task_folder).run(models, batch_size=4)
    found = scores["molcli_tiny_generation"]["exact_match (strict)"]
    assert found["model"] == 1
    assert found["parent"] < 1


def test_an_unknown_task_is_refused(task_folder: Path) -> None:
    with pytest.raises(MolError, match="lm-eval knows no task 'no_such_task'"):
        open_tasks(["molcli_tiny", "no_such_task"], task_folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MolError, match="lm-eval, which is not installed") as error:
        open_tasks(["arc_easy"], None)
    assert "molcli[eval]" in error.value.hint


def test_no_task_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MolError, match="names no task"):
        open_tasks([], None)
    with pytest.raises(MolError, match="is not a folder"):
        open_tasks(["arc_easy"], tmp_path / "nowhere")
