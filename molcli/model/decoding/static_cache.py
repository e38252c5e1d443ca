"""A cache of fixed size, whose tensors stay where they are: what a CUDA graph can write to."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from molcli.kernels import backend
from molcli.kernels.decode_rows import all_decode_rows
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.decoding.cache import (
    AttentionState,
    MoLCache,
    RecurrentState,
    State,
    cache_layers,
)
from molcli.model.mixers.gated_deltanet import CONV_WIDTH
from molcli.model.rotary import reads_positions_back
from molcli.model.tokens import TokenStream


class CacheLength:
    """How far a batch has come. seen: tokens, pads counted; filled: (1,) int32, the same on the
    device. counts: (B,) int64, tokens that are not padding: the next one's position.
    """

    def __init__(self, batch_size: int, length: int, device: torch.device) -> None:
        self.seen, self.length = 0, length
        self.filled = torch.zeros(1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def reset(self) -> None:
        self.seen = 0
        self.filled.zero_()
        self.counts.zero_()

    def room_for(self, batch_size: int, tokens: int) -> None:
        """Raises ValueError where the cache has no room for so many more tokens a sequence."""
        if batch_size != len(self.counts):
            raise ValueError(
                f"the static cache is for {len(self.counts)} sequences, and {batch_size} have come"
            )
        if self.seen + tokens > self.length:
            raise ValueError(
                f"the static cache has room for {self.length} tokens, "
                f"and {self.seen + tokens} have come"
            )

    def advance(self, stream: TokenStream) -> None:
        """Counts a call's tokens."""
        self.seen += stream.length
        self.filled += stream.length
        self.counts.index_add_(0, stream.sequence, torch.ones_like(stream.sequence))

    def advance_on_device(self, active: Tensor) -> None:
        """Counts one token a sequence, where active (B,) is 1; `seen` is the caller's to count."""
        self.filled += 1
        self.counts += active


class _InPlace(State):
    """What changes about a state whose tensors must stay in place."""

    def select(self, indices: Tensor) -> None:
        for tensor in self.tensors.values():
            tensor.copy_(tensor[indices.to(tensor.device)])

    def repeat(self, repeats: int) -> NoReturn:
        raise NotImplementedError("a static cache's batch cannot grow")


class StaticAttentionState(_InPlace, AttentionState):
    """keys, values: (B, L, slots, kv, d), blocks: (B, L, slots) int32; filled up to the clock."""

    def __init__(
        self,
        spec: BlockSpec,
        slots: int,
        clock: CacheLength,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.clock, shape = clock, (len(clock.counts), clock.length, slots)
        heads = (spec.num_kv_heads, spec.head_dim)
        self.tensors = {
            "keys": torch.zeros(*shape, *heads, dtype=dtype, device=device),
            "values": torch.zeros(*shape, *heads, dtype=dtype, device=device),
            "blocks": torch.full(shape, -1, dtype=torch.int32, device=device),
        }
        self.end = 0

    @property
    def empty(self) -> bool:
        return self.clock.seen == 0

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, blocks = (
            self.tensors[n][:, : self.end] for n in ("keys", "values", "blocks")
        )
        return keys, values, blocks

    def extend(self, new: dict[str, Tensor]) -> None:
        start = self.clock.seen
        self.end = start + new["keys"].shape[1]
        for name, tensor in new.items():
            self.tensors[name][:, start : self.end] = tensor

    def reset(self) -> None:
        """Entries past the clock's time are never read: nothing is to be cleared."""


class StaticRecurrentState(_InPlace, RecurrentState):
    """conv and recurrent of all blocks from the start; zeros stand for what was not seen."""

    def __init__(
        self, spec: BlockSpec, clock: CacheLength, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        heads, dim = spec.num_heads, spec.head_dim
        shape, exact = (
            (len(clock.counts), spec.num_blocks),
            torch.promote_types(dtype, torch.float32),
        )
        conv = (*shape, 3 * heads * dim, CONV_WIDTH - 1)
        self.tensors = {
            "conv": torch.zeros(conv, dtype=dtype, device=device),
            "recurrent": torch.zeros(*shape, heads, dim, dim, dtype=exact, device=device),
        }

    def reset(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()


class StaticStore:
    """The tensors of a static cache, and the graph that writes to them; they outlive the cache, so
    that the next one of this size needs no new graph.

    always: by number of blocks, the rows of every token in all of them. graph: set once recorded.
    """

    def __init__(
        self,
        config: MoLConfig,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.clock = clock = CacheLength(batch_size, length, device)

        def state(spec: BlockSpec, slots: int) -> State:
            if spec.mixer == "gated_deltanet":
                return StaticRecurrentState(spec, clock, dtype, device)
            return StaticAttentionState(spec, slots, clock, dtype, device)

        self.layers = cache_layers(config, state)
        self.always = {
            count: all_decode_rows(batch_size, count, device)
            for count in {1, config.num_shared_blocks} - {0}
        }
        # Without Triton, the references wait for the device.
        served = backend.use_triton(clock.counts.new_empty(0, dtype=dtype))
        self.capturable = served and not reads_positions_back(config)
        self.warm = False
        self.graph: Any = None


class MoLStaticCache(MoLCache):
    """A cache for `batch_size` sequences of up to `length` tokens, pads counted."""

    def __init__(
        self,
        config: MoLConfig,
        batch_size: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._take(StaticStore(config, batch_size, length, dtype, device))

    @classmethod
    def of(cls, store: StaticStore) -> "MoLStaticCache":
        """An empty cache in tensors that no other cache uses any more."""
        cache = cls.__new__(cls)
        cache._take(store)
        cache.reset()
        return cache

    def _take(self, store: StaticStore) -> None:
        Cache.__init__(self, layers=store.layers)
        self.store, self.clock = store, store.clock

    @property
    def seen(self) -> int:
        return self.clock.seen

    def advance(self, stream: TokenStream) -> None:
        self.clock.advance(stream)

    def reset(self) -> None:
        Cache.reset(self)
        self.clock.reset()

    @property
    def max_batch_size(self) -> int:
        return len(self.clock.counts)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may take its steps from a CUDA graph."""
        return self.store.capturable
