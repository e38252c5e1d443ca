"""Held-out figures against direct computation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from molcli.config.sections import EvaluateConfig
from molcli.data.mixture import load_rows
from molcli.errors import MolError
from molcli.families.parent import open_parent
from molcli.model.checkpoint import open_checkpoint
from molcli.stages.evaluate import evaluate

TINY = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32)


def test_figures_are_those_of_the_two_models(
    tiny_mol: Callable[..., Path], tiny_parent: Callable[..., Path], corpus: Callable[..., str]
) -> None:
    checkpoint, folder = tiny_mol(), tiny_parent("qwen3", **TINY)
    data = corpus(documents=5, size=20)
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None, note: str = "") -> None:
        seen.append((done, total))

    config = EvaluateConfig(tokens=90, context_length=16, batch_size=2)
    ours = evaluate(checkpoint, open_parent(folder), data, config, progress=progress)

    # One document at a time, as the rows cut them, through the unpacked models.
    student = open_checkpoint(checkpoint, torch.device("cpu"))
    parent = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = (
        load_rows(data, None, vocab_size=128, length=16, limit=90, pad_last=True)
        .without_repeats()
        .batch(slice(None))
    )
    sums = torch.zeros(5, dtype=torch.float64)
    mask = (
        torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    )
    for ids, documents, real in zip(batch.input_ids, batch.document_ids, mask, strict=True):
        for document in documents.unique():
            piece = ids[(documents == document) & real.bool()][None]
            with torch.no_grad():
                log_q, log_p = (
                    model(piece).logits[0, :-1].double().log_softmax(-1)
                    for model in (student, parent)
                )
            label = piece[0, 1:, None]
            kl = (log_p.exp() * (log_p - log_q)).sum()
            same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            ce, parent_ce = -log_q.gather(1, label).sum(), -log_p.gather(1, label).sum()
            sums += torch.stack([ce, kl, same, parent_ce, torch.tensor(label.numel())])
    tokens = int(sums[4])
    expected = (sums[:4] / tokens).tolist()

    assert ours.tokens == tokens
    assert seen[-1] == (90, 90)
    found = [ours.ce, ours.kl, ours.agreement, ours.parent_ce]
    assert found == pytest.approx(expected, rel=1e-4)
    assert ours.params_total == student.num_parameters()
    assert ours.parent_params == parent.num_parameters()
    assert set(ours.to_json()) >= {"ce", "kl", "params_total", "params_active"}


def test_documents_in_one_row_do_not_leak(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str]
) -> None:
    """Two documents in a row of 32 are predicted as they are alone in rows of 16."""
    checkpoint, data = tiny_mol(), corpus(documents=6, size=16)
    alone, packed = (
        evaluate(checkpoint, None, data, EvaluateConfig(context_length=length, batch_size=2))
        for length in (16, 32)
    )
    assert alone.tokens == packed.tokens == 6 * 15
    assert packed.ce == pytest.approx(alone.ce, rel=1e-6)
    assert packed.kl is None


def test_another_vocabulary_is_refused(
    tiny_mol: Callable[..., Path], tiny_parent: Callable[..., Path], corpus: Callable[..., str]
) -> None:
    parent = open_parent(tiny_parent("llama", vocab_size=140))
    with pytest.raises(MolError, match="vocabulary of 140, the model one of 128"):
        evaluate(tiny_mol(), parent, corpus(), EvaluateConfig())


def test_data_without_a_predicted_token_is_refused(
    tiny_mol: Callable[..., Path], corpus: Callable[..., str]
) -> None:
    with pytest.raises(MolError, match="no token"):
        evaluate(tiny_mol(), None, corpus(documents=3, size=1), EvaluateConfig())
