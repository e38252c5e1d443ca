"""Greedy continuations against decoding one step after another, without a cache."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from molcli.model import MoLForCausalLM
from molcli.progress import silent
from molcli.stages.evaluate.generation import compare, cut_prompts
from molcli.stages.evaluate.heldout import Models, open_models

PROMPTS = torch.randint(3, 128, (4, 5), generator=torch.Generator().manual_seed(1))


def pair(folder: Path, noise: float) -> Models:
    """A model, and the same with noise on its weights as its parent."""
    model, parent = (open_models(folder, None).model for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    return Models(model, parent, None)


@torch.no_grad()
def greedy(model: MoLForCausalLM, prompt: Tensor, length: int, end: int | None) -> list[int]:
    """Ends with `end`, if that comes up."""
    ids = prompt.tolist()
    while len(ids) < len(prompt) + length and ids[-1] != end:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("with_end", [False, True])
def test_what_two_models_have_in_common_is_counted_to_the_first_difference(
    tiny_mol: Callable[..., Path], with_end: bool
) -> None:
    models = pair(tiny_mol(initializer_range=0.2, eos_token_id=None), noise=0.03)
    end = greedy(models.model, PROMPTS[0], 4, None)[-1] if with_end else None
    models.model.config.eos_token_id = end
    common = []
    for prompt in PROMPTS:
        ours, theirs = (greedy(net, prompt, 9, end) for net in models.named().values())
        if ours == theirs:
            common.append(9)  # an end that both came to counts as agreement from there on
        else:
            common.append(next(i for i in range(9) if ours[i : i + 1] != theirs[i : i + 1]))
    found = compare(models, PROMPTS, 9, 4, silent)
    assert 0 < sum(common) < 9 * len(common)  # else the noise tests nothing
    assert found.matching_tokens == pytest.approx(sum(common) / len(common))
    assert found.full_match == pytest.approx(common.count(9) / len(common))
    assert (found.prompts, found.prompt_length, found.continuation_length) == (4, 5, 9)


def test_a_model_continues_as_it_does_itself(tiny_mol: Callable[..., Path]) -> None:
    found = compare(pair(tiny_mol(), noise=0.0), PROMPTS, 7, 6, silent)
    assert (found.matching_tokens, found.full_match) == (7, 1)


def test_penalties_and_sampling_of_the_parents_file_are_left_out(
    tiny_mol: Callable[..., Path],
) -> None:
    """They travel with the checkpoint, but the comparison is greedy, for both."""
    folder = tiny_mol(initializer_range=0.2)
    plain = compare(pair(folder, noise=0.03), PROMPTS, 9, 4, silent)
    asked = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.5, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    models = pair(folder, noise=0.03)
    assert compare(models, PROMPTS, 9, 4, silent) == plain
    assert models.model.generation_config.repetition_penalty == 1.5


@given(
    st.lists(st.integers(0, 20), max_size=6),
    st.integers(0, 12),
    st.integers(min_value=1, max_value=6),
)
def test_prompts_are_pieces_that_do_not_overlap(sizes: list[int], count: int, length: int) -> None:
    # Every token is its own place, so that a piece says where it comes from.
    documents = [torch.arange(100 * i, 100 * i + size) for i, size in enumerate(sizes)]
    found = cut_prompts(documents, count, length)
    assert found.shape == (min(count, sum(size // length for size in sizes)), length)
    starts = found[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    assert all(start % 100 % length == 0 for start in starts)
    assert torch.equal(found, found[:, :1] + torch.arange(length))
    assert [start % 100 for start in starts] == sorted(start % 100 for start in starts)
