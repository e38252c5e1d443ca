"""Documents sampled side by side on a static cache are those that one forward pass predicts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from molcli.errors import MolError
from molcli.model.decoding.sampling import sample_documents
from molcli.model.modeling_mol import MoLForCausalLM

ENDS = [2, 7, 11]
LENGTH = 60


def uniform(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, LENGTH), generator=generator, dtype=torch.float64)


def outside(logits: Tensor, numbers: Tensor, temperature: float, drawn: Tensor) -> float:
    """How far the numbers lie outside of the odds that were drawn: rounding, if all is well."""
    odds = (logits.double() / temperature).softmax(-1)
    above = odds.cumsum(-1).gather(1, drawn[:, None])[:, 0]
    below = above - odds.gather(1, drawn[:, None])[:, 0]
    wanted = 1 - numbers
    return torch.maximum(wanted - above, below - wanted).max().item()


@pytest.mark.parametrize(
    "starts",
    [[[1]] * 200, [[3 + i % 5, 2, *range(3, 3 + i % 7)] for i in range(150)]],
    ids=["one token", "of any length"],
)
@pytest.mark.parametrize("dense", [True, False])
def test_every_token_is_drawn_from_what_the_tokens_before_it_predict(
    make_model: Callable[..., MoLForCausalLM], starts: list[list[int]], dense: bool
) -> None:
    """Most documents end early, so that the batch shrinks. An end within a start ends nothing."""
    options = dict(layer_structures=["dense"] * 3) if dense else {}
    model = make_model(**options)
    seen: list[tuple[int, int]] = []
    documents = sample_documents(
        model,
        starts,
        LENGTH,
        0.8,
        ENDS,
        torch.Generator().manual_seed(5),
        lambda tokens, most: seen.append((tokens, most)),
    )
    assert len({len(ids) for ids in documents}) > 20
    assert sum(len(ids) < 40 for ids in documents) > 64
    numbers = uniform(len(starts), 5)
    for ids, start, own in zip(documents, starts, numbers, strict=True):
        new = range(len(start), len(ids))
        assert ids[: len(start)] == start and len(new) > 0
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        before, drawn = torch.tensor(new) - 1, torch.tensor(ids[len(start) :])
        assert outside(logits[before], own[before], 0.8, drawn) < 1e-5
        assert not set(ids[len(start) : -1]) & set(ENDS)
        assert len(ids) == LENGTH or ids[-1] in ENDS
    assert seen == sorted(seen) and all(tokens <= most for tokens, most in seen)
    assert seen[-1] == (sum(map(len, documents)),) * 2


def test_predictions_that_are_not_finite_are_refused(
    make_model: Callable[..., MoLForCausalLM],
) -> None:
    """The first token that has them is named, although the steps ran on."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    starts = [[1, 3, 4, 3], [1, 3, 5, 3]]
    generator = torch.Generator().manual_seed(5)
    with pytest.raises(MolError, match=r"not finite .NaN. at token 3 "):
        sample_documents(model, starts, LENGTH, 1.0, [], generator, lambda *_: None)


@pytest.mark.gpu
def test_steps_from_a_graph_sample_the_same(make_model: Callable[..., MoLForCausalLM]) -> None:
    device = torch.device("cuda")
    model = make_model(layer_structures=["dense"] * 3, device=device)
    found = [
        sample_documents(
            model,
            [[1]] * 300,
            LENGTH,
            1.0,
            ENDS,
            torch.Generator(device).manual_seed(5),
            lambda *_: None,
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    numbers = torch.Generator(device).manual_seed(5)
    own = torch.rand((300, LENGTH), generator=numbers, dtype=torch.float64, device=device)
    for ids, row in zip(found[0], own, strict=True):
        tokens = torch.tensor(ids, device=device)
        with torch.no_grad():
            logits = model(tokens[None, :-1], use_cache=False).logits[0]
        assert outside(logits, row[: len(ids) - 1], 1.0, tokens[1:]) < 1e-3
