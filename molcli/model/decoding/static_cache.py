"""A cache of fixed size, whose tensors stay in place, so that a CUDA graph can write to them."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from molcli.families.rotary import reads_positions_back
from molcli.kernels import backend
from molcli.kernels.decode_rows import all_decode_rows
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.decoding.cache import MoLCache, cache_layers
from molcli.model.mixers import MIXERS, CacheLength, State
from molcli.model.tokens import TokenStream


class StaticStore:
    """The tensors of a static cache, and the graph that writes to them. They outlive the cache, so
    that the next one of this size needs no new graph.

    Attributes:
        length: how full the cache is.
        layers: one `MoLCacheLayer` per layer.
        always: rows of every token in all of so many blocks, by their number.
        capturable: whether a decoding step needs no host synchronisation.
        warm: whether a step has run, so that kernels are compiled.
        graph: the recorded step, or None.
    """

    def __init__(
        self,
        config: MoLConfig,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = CacheLength(batch_size, length, device)

        def state(spec: BlockSpec, slots: int) -> State:
            mixer = MIXERS[spec.mixer]
            return mixer.new_static_state(spec, slots, self.length, dtype, device)

        self.layers = cache_layers(config, state)
        self.always = {
            count: all_decode_rows(batch_size, count, device)
            for count in {1, config.num_shared_blocks} - {0}
        }
        # Without Triton, the references synchronise with the host.
        served = backend.use_triton(self.length.counts.new_empty(0, dtype=dtype))
        self.capturable = served and not reads_positions_back(config)
        self.warm = False
        self.graph: Any = None

    def narrow(self, indices: Tensor) -> None:
        """Keep some sequences alone, in the same memory, and forget the graph.

        Args:
            indices: (n,) int64, those that become the n sequences of the store.
        """
        for layer in self.layers:
            for state in layer.states():
                state.narrow(indices)
        self.length.narrow(indices)
        count, device = len(indices), indices.device
        self.always = {blocks: all_decode_rows(count, blocks, device) for blocks in self.always}
        self.warm, self.graph = False, None


class MoLStaticCache(MoLCache):
    """A cache for `batch_size` sequences of up to `length` tokens, padding counted."""

    def __init__(
        self,
        config: MoLConfig,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._use(StaticStore(config, batch_size, length, dtype, device))

    @classmethod
    def of(cls, store: StaticStore) -> "MoLStaticCache":
        """Make an empty cache in tensors that no other cache uses any more."""
        cache = cls.__new__(cls)
        cache._use(store)
        cache.reset()
        return cache

    def _use(self, store: StaticStore) -> None:
        Cache.__init__(self, layers=store.layers)
        self.store, self.length = store, store.length

    @property
    def seen(self) -> int:
        """Tokens of each sequence so far, padding counted."""
        return self.length.seen

    def advance(self, stream: TokenStream) -> None:
        """Count the tokens of a call."""
        self.length.advance(stream)

    def reset(self) -> None:
        Cache.reset(self)
        self.length.reset()

    @property
    def max_batch_size(self) -> int:
        return len(self.length.counts)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may repeat its steps from a CUDA graph."""
        return self.store.capturable
