"""The Mixture of Layers language model, as transformers knows models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from molcli.families.rotary import rotary_embedding
from molcli.model.blocks import BlockStack, FeedForward
from molcli.model.compiled import compile_layers
from molcli.model.configuration_mol import MoLConfig
from molcli.model.context import DecodeContext, ForwardContext, rows_of_all
from molcli.model.decoding.cache import MoLCache
from molcli.model.decoding.generation import MoLGenerationMixin
from molcli.model.decoding.graphs import ForwardGraphs
from molcli.model.decoding.static_cache import MoLStaticCache, StaticStore
from molcli.model.forward_inputs import (
    CACHE_FIELD,
    IGNORED,
    LOSS,
    PACKED,
    check_mask,
    given_cache,
    packed_documents,
    refuse_attentions,
    refuse_unknown,
)
from molcli.model.layers import ThinBlocks, new_layer
from molcli.model.mixers import Mixer, parameter_names
from molcli.model.norms import FinalNorm
from molcli.model.routing.balance import cv_squared
from molcli.model.routing.router import Router, Routing
from molcli.model.schedule import ConcurrentSchedule, Schedule
from molcli.model.tokens import token_stream


@dataclass
class MoLModelOutput(MoeModelOutputWithPast):
    """The outputs of `MoLModel`, transformers' own and the routing.

    Args:
        last_hidden_state: (B, T, d_model), zeros at padding.
        hidden_states: the input of each layer and, last, the final norm's output, each (B, T,
            d_model), where asked for.
        router_logits: of each layer that routes, (B * T, R) float32, zeros at padding, where asked
            for.
        routing: of each layer that routes, its decisions about the tokens that are not padding.
    """

    routing: tuple[Routing, ...] | None = None


@dataclass
class MoLCausalLMOutput(MoeCausalLMOutputWithPast):
    """The outputs of `MoLForCausalLM`, transformers' own and the routing.

    Args:
        loss: next-token loss, where labels are given, with the balance loss where router logits
            are asked for.
        aux_loss: the balance loss, where router logits are asked for.
        logits: (B, T or logits_to_keep, V).
        hidden_states, router_logits, routing: as in `MoLModelOutput`.
    """

    routing: tuple[Routing, ...] | None = None


class Embedding(nn.Embedding):
    """Token embeddings times a factor, which is rounded to their dtype (as Gemma does)."""

    def __init__(self, size: int, width: int, scale: float) -> None:
        super().__init__(size, width)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        x = super().forward(input_ids)
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype).item()


class MoLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: MoLConfig
    config_class = MoLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseLayer", "MoLLayer", "SlicedLayer", "SkippedLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    # A recurrent state cannot go back in time: decoding that undoes tokens is refused.
    _is_stateful = True
    _keep_in_fp32_modules_strict = [*parameter_names("float32_parameters"), "router"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal matrices, set norms to 1; each mixer draws its own parameters."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=0.02)
            init.zeros_(module.correction_bias)
        elif isinstance(module, Mixer):
            module.initialize(std)
        elif isinstance(module, (BlockStack, FinalNorm)):
            for parameter in module.parameters(recurse=False):
                init.ones_(parameter)
        elif isinstance(module, (ThinBlocks, FeedForward)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)


class MoLModel(MoLPreTrainedModel):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: MoLConfig) -> None:
        super().__init__(config)
        size = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(*size, scale=config.embedding_scale)
        self.layers = nn.ModuleList(new_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = FinalNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.gradient_checkpointing = False
        self.schedule = Schedule()  # `ForwardGraphs` sets another one
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoLCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: MoLCache | None = None,
        document_ids: Tensor | None = None,
        num_documents: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoLModelOutput:
        """Compute the final hidden states of a batch.

        Args:
            input_ids: (B, T) int64; or inputs_embeds: (B, T, d_model).
            attention_mask: (B, past + T), 0 at padding.
            position_ids: (B or 1, T); documents packed into a row start again at 0.
            past_key_values, cache: a cache that an earlier call returned, under either name.
            use_cache: whether to return a cache; None is the configuration's choice, and none in
                training or for packed documents.
            document_ids: (B, T) int, packed documents as runs of one number. Attention,
                convolutions and states stay inside a document.
            num_documents: how many runs there are, if the caller knows; counting waits for the
                device.
            output_hidden_states, output_router_logits: whether the output has them; None is the
                configuration's choice.
            kwargs: `cu_seq_lens_q`, `cu_seq_lens_k` or `seq_idx`, boundaries of packed documents.

        Raises:
            TypeError: for an unknown keyword, or a cache of another kind.
            ValueError: for attention weights, for a mask of pairs of tokens, and for a cache
                together with packed documents.
        """
        refuse_unknown(kwargs, IGNORED | PACKED)
        config = self.config
        wanted = config.output_attentions if output_attentions is None else output_attentions
        refuse_attentions(wanted)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = embeds.shape[0], embeds.shape[1]
        held = given_cache(past_key_values, cache)
        past_length = 0 if held is None else held.seen
        check_mask(attention_mask, shape[0], past_length + shape[1])
        if document_ids is None:
            document_ids = packed_documents(shape, kwargs)
        with_logits, with_hidden = output_router_logits, output_hidden_states
        with_logits = config.output_router_logits if with_logits is None else with_logits
        with_hidden = config.output_hidden_states if with_hidden is None else with_hidden
        if isinstance(held, MoLStaticCache):
            held.length.check_room(*shape)
            plain = document_ids is None and not with_hidden and not torch.is_grad_enabled()
            if shape[1] == 1 and plain:
                return self._one_step(embeds, held, attention_mask, position_ids, with_logits)
        stream = token_stream(
            shape,
            embeds.device,
            past_length=past_length,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            num_documents=num_documents,
        )
        if stream.packed and (held is not None or use_cache):
            raise ValueError(
                "packed documents cannot fill a cache; call without one and with use_cache=False, "
                "or give each document a row of its own"
            )
        if use_cache is None:
            use_cache = config.use_cache and not self.training and not stream.packed
        if self.gradient_checkpointing and self.training and (use_cache or held is not None):
            raise ValueError(
                "gradient checkpoints compute a layer twice, and a cache would hold its tokens "
                "twice; call with use_cache=False and without a cache"
            )
        if use_cache and held is None:
            held = MoLCache(config)
        x = stream.flatten(embeds)
        cos, sin = self.rotary_emb(x, stream.position[None])
        rows = rows_of_all(stream, config.num_shared_blocks)
        context = ForwardContext(stream, (cos[0], sin[0]), *rows, self.schedule)
        routings, hidden = [], []
        for i, layer in enumerate(self.layers):
            states = None if held is None else held.layers[i]
            if with_hidden:
                hidden.append(stream.unflatten(x))
            # A compiled layer would run its parts on one stream.
            call = layer.forward if self.schedule.concurrent else layer
            x, routing = call(x, context, states)
            if routing is not None:
                routings.append(routing)
        if held is not None:
            held.advance(stream)
        last = stream.unflatten(self.norm(x))
        found: dict[str, Any] = {CACHE_FIELD: held}
        if with_hidden:
            found["hidden_states"] = (*hidden, last)
        if with_logits:
            logits = (stream.unflatten(r.logits).flatten(0, 1) for r in routings)
            found["router_logits"] = tuple(logits)
        return MoLModelOutput(last_hidden_state=last, routing=tuple(routings), **found)

    def _one_step(
        self,
        embeds: Tensor,
        cache: MoLStaticCache,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        with_logits: bool,
    ) -> MoLModelOutput:
        """embeds: (B, 1, d_model); the rest as `forward` has it."""
        store, batch = cache.store, embeds.shape[0]
        position = store.length.counts
        if position_ids is not None:
            position = position_ids.expand(batch, 1)[:, 0]
        active = torch.ones_like(store.length.counts, dtype=torch.int32)
        if attention_mask is not None:
            active = attention_mask[:, -1].int()
        with torch.cuda.device_of(embeds):  # Triton launches on the current device
            hidden, routing = self.step(embeds[:, 0], position, active, store)
        cache.length.seen += 1
        found: dict[str, Any] = {CACHE_FIELD: cache}
        if with_logits:
            found["router_logits"] = tuple(r.logits for r in routing)
        return MoLModelOutput(last_hidden_state=hidden[:, None], routing=routing, **found)

    def step(
        self, x: Tensor, position: Tensor, active: Tensor, store: StaticStore
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Compute one new token a sequence, without host synchronisation.

        Args:
            x: (B, d_model), embeddings of the new tokens.
            position: (B,), their positions.
            active: (B,) int32, 0 where the token is padding.
            store: of the static cache, updated in place.

        Returns:
            The normalised residual, (B, d_model), and the routing of each layer that routes.
        """
        cos, sin = self.rotary_emb(x, position[:, None])
        context = DecodeContext(
            rotary=(cos[:, 0].contiguous(), sin[:, 0].contiguous()),
            active=active,
            length=store.length,
            always=store.always,
            schedule=ConcurrentSchedule(x.device),
        )
        routings = []
        for layer, states in zip(self.layers, store.layers, strict=True):
            x, routing = layer.step(x, context, states)  # type: ignore[operator]
            if routing is not None:
                routings.append(routing)
        store.length.advance_on_device(active)
        return self.norm(x), tuple(routings)


class MoLForCausalLM(MoLGenerationMixin, MoLPreTrainedModel):
    """A Mixture of Layers language model with a next-token head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoLConfig) -> None:
        super().__init__(config)
        self.model = MoLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def compile(self, *, graphs: bool = True) -> None:
        """Make later calls faster on a GPU.

        Args:
            graphs: replay prefill (`use_cache=False`, no gradients) from CUDA graphs, by shape.
                Layers are compiled in any case, each kind once.
        """
        compile_layers(self)
        if graphs:
            self._compiled_call_impl = ForwardGraphs(self)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoLCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: MoLCache | None = None,
        document_ids: Tensor | None = None,
        num_documents: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoLCausalLMOutput:
        """Predict the next token at every position of a batch.

        Args:
            labels: (B, T) int64, -100 where ignored; the shift by one happens here.
            logits_to_keep: compute logits of the last so many positions only, or of these
                positions; 0 is all.
            kwargs: boundaries of packed documents, as in `MoLModel.forward`, and what the loss
                functions of transformers take: `num_items_in_batch`, `shift_labels`,
                `ignore_index`.

        The other arguments and errors are those of `MoLModel.forward`. With router logits asked
        for, the loss has the balance loss (CV^2, arXiv 2605.09516) added.
        """
        refuse_unknown(kwargs, IGNORED | PACKED | LOSS)
        for_loss = {name: x for name, x in kwargs.items() if name in LOSS}
        packing = {name: x for name, x in kwargs.items() if name in PACKED}
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            num_documents=num_documents,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_dict=True,
            **packing,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None or for_loss.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss
            )
        if output_router_logits and out.routing:
            terms = [cv_squared(r.weights, r.blocks, r.logits.shape[1]) for r in out.routing]
            aux_loss = torch.stack(terms).mean()
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoLCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            routing=out.routing,
            **{CACHE_FIELD: out.get(CACHE_FIELD)},
        )
