"""Greedy continuations of held-out text, the parent's beside the student's."""

from collections.abc import Iterator
from pathlib import Path

from molcli.io.packing import TokenRows
from molcli.io.parent import Parent
from molcli.model.checkpoint import default_device, open_checkpoint
from molcli.model.from_parent import load_dense
from molcli.model.greedy import continue_greedily

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 32


def continuations(checkpoint: Path, parent: Parent, rows: TokenRows) -> list[dict[str, str]] | None:
    """The first PROMPTS long documents of `rows`, their first PROMPT_TOKENS tokens continued.

    One entry per prompt: `prompt`, `parent`, `model`, all text. None without a tokenizer. Each
    model is in memory as a whole, one after the other.
    """
    tokenizer = parent.tokenizer()
    if tokenizer is None:
        return None
    documents = [ids[:PROMPT_TOKENS] for ids in _documents(rows)]
    longest = max(map(len, documents))
    prompts = [ids for ids in documents if len(ids) == longest][:PROMPTS]
    device = default_device()
    student = open_checkpoint(checkpoint, device)
    dtype = student.dtype
    ours = [continue_greedily(student, tokenizer, ids, NEW_TOKENS) for ids in prompts]
    del student
    dense = load_dense(parent, dtype, device)
    theirs = [continue_greedily(dense, tokenizer, ids, NEW_TOKENS) for ids in prompts]
    starts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts]
    return [
        {
            "prompt": start,
            "parent": of_parent.removeprefix(start),
            "model": of_student.removeprefix(start),
        }
        for start, of_parent, of_student in zip(starts, theirs, ours, strict=True)
    ]


def _documents(rows: TokenRows) -> Iterator[list[int]]:
    for ids, documents, length in zip(
        rows.input_ids, rows.document_ids, rows.lengths.tolist(), strict=True
    ):
        for number in documents[:length].unique().tolist():
            yield ids[:length][documents[:length] == number].tolist()
