"""What a Mixture of Layers model remembers between calls of `generate`."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from molcli.kernels.packed_rows import PackedRows
from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.tokens import TokenStream


class State:
    """Tensors whose first dimension is the sequence."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def reset(self) -> None:
        """As if nothing had been seen."""
        self.tensors = {}

    def select(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was."""
        self.tensors = {n: x[indices.to(x.device)] for n, x in self.tensors.items()}

    def repeat(self, repeats: int) -> None:
        """Every sequence comes `repeats` times, side by side."""
        self.tensors = {n: x.repeat_interleave(repeats, 0) for n, x in self.tensors.items()}


class AttentionState(State):
    """Keys and values by (sequence, time, slot): every token fills as many slots as blocks it
    visits, so the tensors stay dense although the blocks' own histories are ragged.

    keys, values: (B, T, slots, kv, d). blocks: (B, T, slots) integers, -1 where padding stands.
    """

    @property
    def empty(self) -> bool:
        """Whether no token has been seen."""
        return not self.tensors

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values and blocks of all tokens up to the last one that was appended."""
        return self.tensors["keys"], self.tensors["values"], self.tensors["blocks"]

    def append(self, k: Tensor, v: Tensor, rows: PackedRows, stream: TokenStream) -> None:
        """k, v: (M, kv, d), the rows of the new tokens."""
        new = {
            "keys": _by_slot(k, rows, stream, fill=0),
            "values": _by_slot(v, rows, stream, fill=0),
            "blocks": _by_slot(rows.blocks, rows, stream, fill=-1),
        }
        self.extend(new)

    def extend(self, new: dict[str, Tensor]) -> None:
        """new: (B, T', slots, ...) of each name, behind what is held."""
        old = self.tensors
        self.tensors = {n: torch.cat([old[n], x], 1) if old else x for n, x in new.items()}

    def attend(
        self, q: Tensor, rows: PackedRows, stream: TokenStream, window: int | None = None
    ) -> Tensor:
        """q: (M, h, d), rows of the newest tokens -> (M, h, d). A row sees its own block's keys
        of its own sequence, up to its own time, and of the latest `window` tokens where given.
        """
        keys, values, blocks = self.held()
        query = _by_slot(q, rows, stream, fill=0)  # (B, T', slots, h, d)
        query_block = _by_slot(rows.blocks, rows, stream, fill=-1)
        total, new = keys.shape[1], query.shape[1]
        time = torch.arange(total, device=q.device)
        distance = time[total - new :, None] - time[None, :]  # (T', T)
        earlier = distance >= 0
        if window is not None:
            earlier = earlier & (distance < window)
        same = query_block[:, :, :, None, None] == blocks[:, None, None]  # (B, T', s, T, s)
        visible = same & earlier[:, None, :, None]
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, keys, values))
        mask = visible.flatten(3, 4).flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = out.transpose(1, 2).unflatten(1, query.shape[1:3])
        return out[stream.sequence[rows.tokens], stream.time[rows.tokens], rows.slots]


class RecurrentState(State):
    """Convolution inputs and delta-rule states of every block of every sequence.

    conv: (B, blocks, C, W - 1), the last inputs that each block saw; recurrent:
    (B, blocks, H, d_k, d_v), float32. Padding and tokens routed elsewhere leave them alone.
    """

    def read(self, name: str, segments: Tensor, num_sequences: int) -> Tensor:
        """segments: (s,) int64, block * B + sequence -> (s, ...)."""
        return self.tensors[name][segments % num_sequences, segments // num_sequences]

    def write(self, name: str, segments: Tensor, num_sequences: int, value: Tensor) -> None:
        """value: (s, ...), for segments that are all different."""
        tensor = self.tensors[name]
        tensor[segments % num_sequences, segments // num_sequences] = value.to(tensor.dtype)


class MoLCacheLayer(CacheLayerMixin):
    """The states of one layer: of the dense or the shared blocks, and of the routed blocks."""

    def __init__(self, always: State, routed: State | None) -> None:
        """routed: None where the layer has no routed blocks."""
        super().__init__()
        self.always: Any = always
        self.routed: Any = routed

    def states(self) -> list[State]:
        return [self.always] if self.routed is None else [self.always, self.routed]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for state in self.states():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence indices[i] was, in every state."""
        for state in self.states():
            state.select(indices)

    def reset(self) -> None:
        for state in self.states():
            state.reset()

    def offload(self) -> NoReturn:
        raise NotImplementedError("a Mixture of Layers cache cannot be offloaded")

    def crop(self, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "a Mixture of Layers cache cannot be cropped: a recurrent state does not go back in "
            "time, so assisted and contrastive decoding are not supported"
        )

    # What the base class asks of caches that hold one pair of key and value tensors.
    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("a Mixture of Layers layer writes its own states")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class MoLCache(Cache):
    """One `MoLCacheLayer` per layer, and the number of tokens seen, pads counted."""

    def __init__(self, config: MoLConfig) -> None:
        super().__init__(layers=cache_layers(config, lambda spec, _: _new_state(spec)))
        self._seen = 0

    @property
    def seen(self) -> int:
        return self._seen

    def advance(self, stream: TokenStream) -> None:
        """Counts the tokens of a call."""
        self._seen += stream.length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self._seen = 0

    @property
    def is_compileable(self) -> bool:
        return False


def cache_layers(config: MoLConfig, make: Callable[[BlockSpec, int], State]) -> list[Any]:
    """make: of a spec and the number of its blocks that a token visits."""
    visited = config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks
    layers = []
    for i, kind in enumerate(config.layer_kinds):
        always = config.dense_spec(kind, i) if config.is_dense(i) else config.shared_spec(i)
        routed = None
        if not config.is_dense(i) and config.num_routed_blocks:
            routed = make(config.routed_spec(i), visited)
        layers.append(MoLCacheLayer(make(always, always.num_blocks), routed))
    return layers


def _new_state(spec: BlockSpec) -> AttentionState | RecurrentState:
    return RecurrentState() if spec.mixer == "gated_deltanet" else AttentionState()


def _by_slot(x: Tensor, rows: PackedRows, stream: TokenStream, fill: int) -> Tensor:
    """x: (M, ...) -> (batch, length, slots, ...)."""
    shape = (stream.batch_size, stream.length, rows.num_slots, *x.shape[1:])
    place = stream.sequence[rows.tokens], stream.time[rows.tokens], rows.slots
    return x.new_full(shape, fill).index_put(place, x)
