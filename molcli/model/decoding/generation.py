"""Give `generate` a static cache, and replay its steps from a CUDA graph."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from molcli.files.generation_config import CACHES, TAKES_TOKENS_BACK
from molcli.model.decoding.static_cache import MoLStaticCache, StaticStore
from molcli.model.forward_inputs import CACHE_FIELD

# Lengths are rounded up to a multiple of this, so that similar prompts share tensors and graph.
_LENGTHS = 64


@dataclass
class _Kept:
    """The tensors that a model decoded with last.

    weights: addresses of its parameters at that time. user: the cache that uses the tensors, as
    long as it exists.
    """

    store: StaticStore
    weights: tuple[int, ...]
    user: "weakref.ref[MoLStaticCache]"


_KEPT: "weakref.WeakKeyDictionary[Any, _Kept]" = weakref.WeakKeyDictionary()


class StepGraph:
    """A decoding step of a model on the tensors of a store, captured once and replayed."""

    def __init__(self, model: Any, store: StaticStore) -> None:
        counts = store.length.counts
        self.ids, self.position = counts.new_zeros(len(counts), 1), torch.zeros_like(counts)
        self.active = torch.ones_like(counts, dtype=torch.int32)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(counts), torch.cuda.graph(self.graph):
            x = model.model.embed_tokens(self.ids)[:, 0]
            hidden, _ = model.model.step(x, self.position, self.active, store)
            self.logits: Tensor = model.lm_head(hidden)[:, None]
        self.all_active = True

    def __call__(
        self, ids: Tensor, position_ids: Tensor | None, mask: Tensor | None, counts: Tensor
    ) -> Tensor:
        """Replay the step. Returns logits, (B, 1, V), that the next call overwrites."""
        self.ids.copy_(ids)
        self.position.copy_(counts if position_ids is None else position_ids[:, -1])
        if mask is not None or not self.all_active:
            self.active.copy_(torch.ones_like(self.active) if mask is None else mask[:, -1])
            self.all_active = mask is None
        self.graph.replay()
        return self.logits


class MoLGenerationMixin(GenerationMixin):
    """`generate`, with `cache_implementation="static"`."""

    def generate(
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, and refuse what a recurrent state cannot do.

        Raises:
            ValueError: for assisted, contrastive and similar decoding, which takes tokens back, and
                for caches other than the growing and the static one.
        """
        asked = kwargs.get("assistant_model") is not None
        for config in (self.generation_config, generation_config):
            values = (kwargs.get(n, getattr(config, n, None)) for n in TAKES_TOKENS_BACK)
            asked |= any(value is not None for value in values)
        if asked:
            raise ValueError(
                "assisted and contrastive decoding take tokens back, which a recurrent state "
                "cannot; leave assistant_model, prompt_lookup_num_tokens, penalty_alpha and the "
                "like out: sampling and beam search work"
            )
        config = self.generation_config if generation_config is None else generation_config
        chosen = kwargs.get("cache_implementation", config.cache_implementation)
        if chosen not in CACHES:
            raise ValueError(
                f"cache_implementation={chosen!r} has no place for the states of thin blocks; use "
                '"static", or leave it out for a cache that grows'
            )
        parent: Any = super()
        return parent.generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse continuous batching, whose paged cache has no place for the states of blocks."""
        raise NotImplementedError(
            "continuous batching is not supported; call generate with a left-padded batch"
        )

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse continuous batching, as `generate_batch` does."""
        self.generate_batch()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make a static cache; leave other caches to transformers. Newer releases of it have
        `max_cache_len`, which is respected here in all of them."""
        static = generation_config.cache_implementation == "static"
        fresh = model_kwargs.get(CACHE_FIELD) is None
        if not (static and fresh) or generation_config.use_cache is False:
            parent: Any = super()
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        model_kwargs[CACHE_FIELD] = static_cache(self, batch_size * copies, length)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `generate` makes no cache of its own, which would have no place for the
        states of blocks. The model's first call makes one."""
        return False

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Return the mask unchanged: the model reads one of two dimensions."""
        return attention_mask

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """Return the function that runs a decoding step if the cache is compileable.

        It replays a CUDA graph of our own: torch.compile's guards on a thousand parameters take
        longer than the step.
        """
        model: Any = self

        def call(
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            cache = kwargs.get(CACHE_FIELD)
            one = input_ids is not None and input_ids.shape[1] == 1
            if not (one and isinstance(cache, MoLStaticCache) and cache.store.warm):
                if one and isinstance(cache, MoLStaticCache):
                    cache.store.warm = True  # this call compiles kernels, which capture cannot
                return model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **kwargs,
                )
            assert input_ids is not None
            cache.length.check_room(*input_ids.shape)
            store = cache.store
            if store.graph is None:
                store.graph = StepGraph(model, store)
            logits = store.graph(input_ids, position_ids, attention_mask, store.length.counts)
            cache.length.seen += 1
            found: dict[str, Any] = {CACHE_FIELD: cache}
            return CausalLMOutputWithPast(logits=logits, **found)

        return call


def static_cache(model: Any, batch_size: int, length: int) -> MoLStaticCache:
    """Make an empty static cache, in the tensors of the model's last one if they fit and are free.

    Raises:
        ValueError: if the model is spread over several devices.
    """
    if len({p.device for p in model.parameters()}) > 1:
        raise ValueError("a static cache needs the whole model on one device")
    weights = tuple(p.data_ptr() for p in model.parameters())
    kept = _KEPT.get(model)
    if kept is not None:
        held = kept.store.length
        same = kept.weights == weights and len(held.counts) == batch_size
        if same and kept.user() is None and held.length >= length:
            cache = MoLStaticCache.of(kept.store)
            kept.user = weakref.ref(cache)
            return cache
        del _KEPT[model]
        if same:  # never shrink: a graph would be captured again for every length
            length = max(length, held.length)
    length = -(-length // _LENGTHS) * _LENGTHS
    embedding = model.get_input_embeddings().weight
    store = StaticStore(model.config, batch_size, length, embedding.dtype, embedding.device)
    cache = MoLStaticCache.of(store)
    _KEPT[model] = _Kept(store, weights, weakref.ref(cache))
    return cache
