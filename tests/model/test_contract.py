"""What transformers' callers send and expect, beside a Llama of the same size."""

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from molcli.model.forward_inputs import CACHE_FIELD

KINDS = ["dense", "softmax", "gated_deltanet"]
LENGTHS = (7, 1, 12)


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, intermediate_size=96)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def shapes(x: Any) -> Any:
    """The structure of an output: shapes of tensors, lengths of tuples, the cache's length."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    if isinstance(x, tuple):
        return [shapes(y) for y in x]
    return x if x is None else x.get_seq_length()


LIKE_LLAMA: list[dict[str, Any]] = [
    {},
    {"use_cache": False},
    {"use_cache": True},
    {"attention_mask": torch.ones(2, 11, dtype=torch.int64)},
    {"attention_mask": torch.tensor([[0] * 4 + [1] * 7, [1] * 11])},
    {"position_ids": torch.arange(11)[None]},
    {"labels": tokens()},
    {"labels": tokens(), "num_items_in_batch": torch.tensor(20)},
    {"labels": tokens(), "shift_labels": F.pad(tokens()[:, 1:], (0, 1), value=-100)},
    {"labels": tokens(), "ignore_index": 5},
    {"logits_to_keep": 1},
    {"logits_to_keep": 3},
    {"logits_to_keep": torch.tensor([0, 4])},
    {"output_hidden_states": True},
    {"output_hidden_states": True, "attention_mask": torch.tensor([[0] * 4 + [1] * 7, [1] * 11])},
    {"output_attentions": False},
    {"return_dict": True},
    {"return_dict": False},
    {"return_dict": False, "output_hidden_states": True, "use_cache": False},
]


@pytest.mark.parametrize("keywords", LIKE_LLAMA, ids=lambda x: "+".join(x) or "none")
@torch.no_grad()
def test_each_keyword_gives_what_llama_gives(make_model, llama, keywords) -> None:
    model = make_model(layer_kinds=KINDS)
    found, expected = (m(tokens(), **keywords) for m in (model, llama))
    if keywords.get("return_dict") is False:
        assert isinstance(found, tuple)
        routing_is_ours = shapes(found[: len(expected)])
        assert routing_is_ours == shapes(expected) and len(found) == len(expected) + 1
        return
    for name in expected:
        assert shapes(found[name]) == shapes(expected[name]), name
    assert set(found) - set(expected) == {"routing"}


@torch.no_grad()
def test_hidden_states_are_each_layers_input_and_the_last_norms_output(make_model) -> None:
    model = make_model(layer_kinds=KINDS)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    out = model(tokens(), attention_mask=mask, output_hidden_states=True)
    for hidden, x in zip(out.hidden_states, seen, strict=False):
        torch.testing.assert_close(hidden[mask.bool()], x)
        assert not hidden[~mask.bool()].any()
    assert len(out.hidden_states) == len(seen) + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@torch.no_grad()
def test_router_logits_stand_at_every_position_for_others_losses(make_model) -> None:
    model = make_model(layer_kinds=KINDS)
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    out = model(tokens(), attention_mask=mask, output_router_logits=True)
    assert [x.shape for x in out.router_logits] == [(22, 5)] * 2  # two layers route
    real = mask.flatten().bool()
    for logits, routing in zip(out.router_logits, out.routing, strict=True):
        torch.testing.assert_close(logits[real], routing.logits)
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (5, 2)
    loss = load_balancing_loss_func(out.router_logits, config.num_experts, 2, mask)
    kept = tuple(logits[real] for logits in out.router_logits)
    torch.testing.assert_close(loss, load_balancing_loss_func(kept, config.num_experts, 2))
    assert out.aux_loss is not None and out.loss is None
    model.config.output_router_logits = True
    assert len(model(tokens()).router_logits) == 2


@torch.no_grad()
def test_the_cache_is_taken_under_both_names(make_model) -> None:
    model, ids = make_model(layer_kinds=KINDS), tokens()
    whole = model(ids).logits[:, 6:]
    for name in ("cache", "past_key_values"):
        held = model(ids[:, :6])[CACHE_FIELD]
        torch.testing.assert_close(model(ids[:, 6:], **{name: held}).logits, whole)
    with pytest.raises(ValueError, match="give the cache once"):
        model(ids, cache=held, past_key_values=held)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"output_attentions": True}, ValueError, "use output_hidden_states"),
    ({"head_mask": torch.ones(3, 4)}, TypeError, "'head_mask'.*instead"),
    ({"token_type_ids": torch.zeros(2, 11)}, TypeError, "return_token_type_ids=False"),
    ({"swizzle": 1}, TypeError, "'swizzle' of forward; leave it out"),
    ({"past_key_values": DynamicCache()}, TypeError, 'DynamicCache.*cache_implementation="static"'),
    ({"cache": DynamicCache()}, TypeError, 'DynamicCache.*cache_implementation="static"'),
    ({"attention_mask": torch.ones(2, 1, 11, 11)}, ValueError, "4 dimensions.*position_ids"),
    ({"attention_mask": {"full": None}}, ValueError, "is a dict; .*position_ids"),
    ({"attention_mask": torch.ones(2, 10)}, ValueError, r"\(2, 10\).*\(2, 11\)"),
    ({"attention_mask": torch.ones(3, 11)}, ValueError, r"\(3, 11\).*\(2, 11\)"),
    ({"attention_mask": torch.arange(22).view(2, 11)}, ValueError, "0 or 1.*position_ids"),
    ({"cu_seq_lens_q": torch.tensor([0, 5, 21])}, ValueError, "from 0 to .* 22"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 22])}, ValueError, "from 0 to .* 22"),
    (
        {"cu_seq_lens_q": torch.tensor([0, 22]), "cu_seq_lens_k": torch.tensor([0, 9, 22])},
        ValueError,
        "differ",
    ),
    ({"seq_idx": torch.zeros(1, 22)}, ValueError, r"\(1, 22\).*\(2, 11\)"),
    ({"position_ids": torch.arange(11)[None] % 6, "use_cache": True}, ValueError, "packed"),
]


@pytest.mark.parametrize("keywords, error, message", REFUSED)
def test_what_forward_cannot_do_is_refused(make_model, keywords, error, message) -> None:
    model = make_model()
    for call in (model, model.model):
        with pytest.raises(error, match=message):
            call(tokens(), **keywords)


def test_attentions_asked_for_by_the_configuration_are_refused(make_model) -> None:
    model = make_model(attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="use output_hidden_states"):
        model(tokens())


GENERATE_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_lookup_num_tokens": 3}, "take tokens back"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "take tokens back"),
    ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "take tokens back"),
    ({"cache_implementation": "offloaded"}, 'use "static"'),
    ({"cache_implementation": "quantized"}, 'use "static"'),
    ({"cache_implementation": "paged"}, 'use "static"'),
    ({"generation_config": GenerationConfig(cache_implementation="quantized")}, 'use "static"'),
    ({"output_attentions": True, "return_dict_in_generate": True}, "use output_hidden_states"),
    ({"swizzle": 1}, "swizzle"),
]


@pytest.mark.parametrize("keywords, message", GENERATE_REFUSED)
def test_what_generate_cannot_do_is_refused(make_model, keywords, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make_model().generate(tokens(), max_new_tokens=3, **keywords)


def test_an_assistant_a_foreign_cache_and_batches_without_padding_are_refused(make_model) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="take tokens back"):
        model.generate(tokens(1), max_new_tokens=3, assistant_model=make_model(seed=1))
    with pytest.raises(TypeError, match='cache_implementation="static"'):
        model.generate(tokens(), max_new_tokens=3, past_key_values=DynamicCache())
    with pytest.raises(NotImplementedError, match="left-padded batch"):
        model.generate_batch([[3, 4]])
    with pytest.raises(NotImplementedError, match="left-padded batch"):
        model.init_continuous_batching()


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"output_hidden_states": True, "output_scores": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
    ],
    ids=lambda x: "+".join(x) or "greedy",
)
def test_generation_with_left_padding_is_that_of_a_sequence_alone(make_model, keywords) -> None:
    model = make_model(layer_kinds=KINDS, dtype=torch.float64)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = dict(max_new_tokens=6, do_sample=False, **keywords)
    found = model.generate(ids, attention_mask=mask, **settings)
    alone = [model.generate(ids[i : i + 1, 4 - 4 * i :], **settings) for i in range(2)]
    if keywords.get("return_dict_in_generate"):
        assert len(found.hidden_states) == 6 and len(found.hidden_states[0]) == 4
        found, alone = found.sequences, [x.sequences for x in alone]
    new = torch.cat([x[:, -6:] for x in alone])
    assert torch.equal(found[:, -6:], new)


def packed_inputs(how: str) -> dict[str, torch.Tensor]:
    documents = [{"input_ids": tokens(1, n)[0].tolist()} for n in LENGTHS]
    collator = DataCollatorWithFlattening(
        return_tensors="pt",
        return_flash_attn_kwargs=how == "cu_seq_lens",
        return_seq_idx=how == "seq_idx",
    )
    batch = dict(collator(documents))
    if how == "cu_seq_lens":
        assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"} <= set(batch)
    if how != "position_ids":
        batch.pop("position_ids", None)
    return batch


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("kind", ["dense", "dense_gated_deltanet", "softmax", "gated_deltanet"])
@torch.no_grad()
def test_documents_packed_by_transformers_stay_apart(make_model, kind, how) -> None:
    model = make_model(layer_kinds=[kind] * 3)
    out = model(**packed_inputs(how))
    assert CACHE_FIELD not in out  # a cache would take the documents for one
    alone = torch.cat([model(tokens(1, n)).logits for n in LENGTHS], dim=1)
    torch.testing.assert_close(out.logits, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.model(**packed_inputs(how) | {"labels": None}).last_hidden_state,
        torch.cat([model.model(tokens(1, n)).last_hidden_state for n in LENGTHS], dim=1),
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_packing_is_as_llamas(make_model, llama) -> None:
    """What our test takes for granted of transformers."""
    packed = llama(**packed_inputs("position_ids"), use_cache=False).logits
    alone = torch.cat([llama(tokens(1, n)).logits for n in LENGTHS], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packing_and_padding_together(make_model) -> None:
    model = make_model(layer_kinds=KINDS)
    ids, positions = tokens(2, 11), torch.tensor([[0] * 3 + [*range(5), *range(3)], [*range(11)]])
    mask = torch.tensor([[0] * 3 + [1] * 8, [1] * 11])
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, a, b in ((0, 3, 8), (0, 8, 11), (1, 0, 11)):
        alone = model(ids[row : row + 1, a:b]).logits[0]
        torch.testing.assert_close(found[row, a:b], alone, rtol=1e-5, atol=1e-5)


def test_a_trainer_takes_steps_on_packed_rows_and_logs_the_balance_loss(
    make_model, tmp_path
) -> None:
    model = make_model(layer_kinds=KINDS).train()
    rows = [{"input_ids": tokens(1, n)[0].tolist()} for n in (5, 9, 6, 8)]
    before = {name: x.clone() for name, x in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorWithFlattening(return_tensors="pt")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
    )
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    moved = [name for name, x in model.named_parameters() if not torch.equal(x, before[name])]
    assert any("thin_in" in name for name in moved) and any("router" in name for name in moved)


def test_a_gradient_checkpointed_model_makes_no_cache(make_model) -> None:
    model = make_model().train()
    model.gradient_checkpointing_enable()
    assert CACHE_FIELD not in model(tokens())
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(), use_cache=True)


def test_the_configuration_on_disk_has_no_second_name_for_a_number(make_model, tmp_path) -> None:
    make_model().config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_blocks_per_tok"] == 2
    assert not {"num_experts", "num_experts_per_tok"} & set(saved)
