"""The cache of a Mixture of Layers model, which grows with every call of `generate`."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from molcli.model.configuration_mol import BlockSpec, MoLConfig
from molcli.model.mixers import MIXERS, State
from molcli.model.tokens import TokenStream


class MoLCacheLayer(CacheLayerMixin):
    """The states of one layer: of the blocks that run on every token, and of the routed ones.

    Args:
        always: of the blocks that run on every token, or None in a skipped layer.
        routed: of the routed blocks, or None where they have none.
    """

    def __init__(self, always: State | None, routed: State | None) -> None:
        super().__init__()
        self.always: Any = always
        self.routed: Any = routed

    def states(self) -> list[State]:
        """Return the states, two at most."""
        return [state for state in (self.always, self.routed) if state is not None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for state in self.states():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Reorder sequences: sequence i becomes a copy of sequence indices[i], in every state."""
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

    # The base class requires these of caches that hold one pair of key and value tensors.
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
    """One `MoLCacheLayer` per layer, and the number of tokens seen, padding counted."""

    def __init__(self, config: MoLConfig) -> None:
        layers = cache_layers(config, lambda spec, _: MIXERS[spec.mixer].new_state(spec))
        super().__init__(layers=layers)
        self._seen = 0

    @property
    def seen(self) -> int:
        """Tokens of each sequence so far, padding counted."""
        return self._seen

    def advance(self, stream: TokenStream) -> None:
        """Count the tokens of a call."""
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
    """Make the states of all layers.

    Args:
        make: (spec of a stack of blocks, number of them that a token visits) -> their state.

    Returns:
        One `MoLCacheLayer` per layer.
    """
    visited = config.num_blocks_per_tok if config.restrict_attention else config.num_routed_blocks
    layers = []
    for i in range(config.num_hidden_layers):
        always, routed = config.always_spec(i), None
        if config.layer_structures[i] == "mixture" and config.num_routed_blocks:
            routed = make(config.routed_spec(config.layer_mixers[i], i), visited)
        of_all = None if always is None else make(always, always.num_blocks)
        layers.append(MoLCacheLayer(of_all, routed))
    return layers
