"""What a sequence mixer implements, and what it is given.

A mixer lets the tokens of a block see each other. It keeps the weights of B blocks stacked, and
runs on the rows of all of them at once. Everything that depends on the kind of a mixer is a method
or an attribute of its class: no other code asks which mixer a block has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import initialization as init

from molcli.kernels.decode_rows import DecodeRows
from molcli.kernels.packed_rows import PackedRows
from molcli.maths.moments import Sample
from molcli.model.tokens import TokenStream

if TYPE_CHECKING:
    from molcli.model.configuration_mol import BlockSpec, MoLConfig


class State:
    """What a stack of blocks remembers between calls: tensors by sequence, their first dimension.

    Attributes:
        tensors: by name; empty before the first token.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all tokens."""
        self.tensors = {}

    def select(self, indices: Tensor) -> None:
        """Reorder sequences: sequence i becomes a copy of sequence indices[i]."""
        self.tensors = {n: x[indices.to(x.device)] for n, x in self.tensors.items()}

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence, copies side by side."""
        self.tensors = {n: x.repeat_interleave(repeats, 0) for n, x in self.tensors.items()}


class StaticState(State):
    """A state whose tensors have a fixed size and stay in place, so that a CUDA graph can write to
    them."""

    def reset(self) -> None:
        """Forget all tokens, in place."""
        for tensor in self.tensors.values():
            tensor.zero_()

    def select(self, indices: Tensor) -> None:
        """Reorder sequences in place."""
        for tensor in self.tensors.values():
            tensor.copy_(tensor[indices.to(tensor.device)])

    def narrow(self, indices: Tensor) -> None:
        """Keep sequences `indices` alone, as the first ones in the same memory."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor[: len(indices)].copy_(tensor[indices])

    def repeat(self, repeats: int) -> NoReturn:
        """Refuse: the batch of a static cache cannot grow."""
        raise NotImplementedError("a static cache's batch cannot grow")


class CacheLength:
    """Count the tokens in a static cache.

    Attributes:
        seen: tokens so far, padding counted; the host's copy.
        length: tokens that the cache has room for.
        filled: (1,) int32, `seen` on the device.
        counts: (B,) int64, tokens that are not padding: the position of the next one.
    """

    def __init__(self, batch_size: int, length: int, device: torch.device) -> None:
        self.seen, self.length = 0, length
        self.filled = torch.zeros(1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Count from 0 again."""
        self.seen = 0
        self.filled.zero_()
        self.counts.zero_()

    def narrow(self, indices: Tensor) -> None:
        """Keep sequences `indices` alone."""
        self.counts = self.counts[indices]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Refuse a call that the cache has no room for.

        Raises:
            ValueError: for another batch size, or too many tokens.
        """
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
        """Count the tokens of a call."""
        self.seen += stream.length
        self.filled += stream.length
        self.counts.index_add_(0, stream.sequence, torch.ones_like(stream.sequence))

    def advance_on_device(self, active: Tensor) -> None:
        """Count one token a sequence where active, (B,), is 1. The caller counts `seen`."""
        self.filled += 1
        self.counts += active


@dataclass(frozen=True)
class BlockContext:
    """What a stack of blocks reads in a forward pass, besides its input.

    Attributes:
        rows: M rows, the tokens of each block side by side.
        rotary: cos and sin of the n tokens, each (n, channels that rotate).
        stream: the n tokens: their sequences, times, documents and positions.
        state: what the blocks remember of earlier calls, or None without a cache.
    """

    rows: PackedRows
    rotary: tuple[Tensor, Tensor]
    stream: TokenStream
    state: State | None = None


@dataclass(frozen=True)
class StepContext:
    """What a stack of blocks reads in a decoding step of one token a sequence.

    Attributes:
        rows: R rows, each with a block of its own.
        rotary: cos and sin, each (B, channels that rotate).
        active: (B,) int32, 0 where the new token is padding and must not change a state.
        length: how full the static cache is.
        state: the blocks' static state.
    """

    rows: DecodeRows
    rotary: tuple[Tensor, Tensor]
    active: Tensor
    length: CacheLength
    state: State


class BlockContexts(Protocol):
    """Gives stacks of blocks their context, on the tokens of one chunk of a text."""

    @property
    def stream(self) -> TokenStream:
        """The chunk's tokens."""

    def blocks(self, rows: PackedRows) -> BlockContext:
        """Return what a stack of blocks reads when it runs on these rows."""


@dataclass(frozen=True)
class AttentionSample:
    """Inputs of a mixer and outputs of the softmax attention that it replaces, one chunk of text.

    Attributes:
        read: (M, width), what the blocks read, normalised.
        rows: the blocks and tokens of these rows.
        contexts: of the chunk's tokens.
        targets: (M, num_heads, head_dim), the softmax heads' outputs.
    """

    read: Tensor
    rows: PackedRows
    contexts: BlockContexts
    targets: Tensor

    def first_tokens(self, count: int) -> "AttentionSample":
        """Return the rows of the chunk's first `count` tokens."""
        rows, kept = self.rows.first_tokens(count)
        return AttentionSample(self.read[kept], rows, self.contexts, self.targets[kept])


Regression = Callable[[Iterator[Sample]], Tensor]
"""Solves for a linear map per block: features (M, p), targets (M, q), by chunk -> (B, q, p)."""


class Mixer(nn.Module, ABC):
    """A sequence mixer of B blocks with stacked weights, (B, ...) each.

    Attributes:
        name: what a configuration calls it.
        shares_kv_heads: whether several query heads may share a key-value head.
        is_recurrent: whether a fixed-size state stands in for earlier tokens.
        float32_parameters: last parts of parameter names that stay in float32 in any model dtype.
        no_decay_parameters: those that weight decay would harm, besides norms and biases.
        new_parameters: those that no softmax attention has, and that train at the rate of new ones.
        q_proj, k_proj, v_proj: (B, num_heads or num_kv_heads * head_dim, width), and o_proj:
            (B, width, num_heads * head_dim), of mixers that have `heads`.
    """

    name: ClassVar[str]
    shares_kv_heads: ClassVar[bool] = False
    is_recurrent: ClassVar[bool] = False
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    no_decay_parameters: ClassVar[tuple[str, ...]] = ()
    new_parameters: ClassVar[tuple[str, ...]] = ()
    q_proj: nn.Parameter
    k_proj: nn.Parameter
    v_proj: nn.Parameter
    o_proj: nn.Parameter

    def __init__(self, spec: "BlockSpec", config: "MoLConfig") -> None:
        super().__init__()
        self.eps, self.head_dim = config.rms_norm_eps, spec.head_dim

    def initialize(self, std: float) -> None:
        """Draw the weights of an untrained model: norms at 1, biases at 0, matrices normal.

        Args:
            std: standard deviation of matrices.
        """
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_norm"):
                init.ones_(parameter)
            elif name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    @abstractmethod
    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Mix the rows of a forward pass, and update the state if there is one.

        Args:
            x: (M, width), normalised rows.

        Returns:
            (M, width), what the mixer adds to the residual.
        """

    def heads(self, x: Tensor, context: BlockContext) -> Tensor:
        """Compute the heads' outputs, before the output projection `o_proj`.

        Fitting to a dense parent needs them; a mixer without heads is trained from scratch only.

        Args:
            x: (M, width), normalised rows.

        Returns:
            (M, num_heads, head_dim).
        """
        raise NotImplementedError(f"the mixer {self.name} has no heads that could be fitted")

    @abstractmethod
    def step(self, x: Tensor, norm: Tensor | None, context: StepContext) -> Tensor:
        """Mix one new token a sequence, without host synchronisation; update the state in place.

        Args:
            x: (R, width), residual rows.
            norm: (B, width), weights of the RMSNorm that stands before the mixer; None without one.

        Returns:
            (R, width), what the mixer adds to the residual.
        """

    def start_from_attention(
        self, make_samples: Callable[[], Sequence[AttentionSample]], regress: Regression
    ) -> None:
        """Set the parameters that softmax attention does not have, so that the heads come close to
        its heads. q_proj, k_proj and v_proj are set before, o_proj is fitted next.

        Args:
            make_samples: returns samples of the whole text, in order; called if they are needed.
            regress: solves regressions on all of its rows.
        """

    @staticmethod
    @abstractmethod
    def new_state(spec: "BlockSpec") -> State:
        """Make an empty state for a cache that grows."""

    @staticmethod
    @abstractmethod
    def new_static_state(
        spec: "BlockSpec",
        slots: int,
        length: CacheLength,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StaticState:
        """Make an empty state for a cache of fixed size.

        Args:
            slots: blocks of the stack that a token visits.
        """

    @staticmethod
    @abstractmethod
    def count_parameters(spec: "BlockSpec", config: "MoLConfig") -> int:
        """Count the parameters of one block's mixer."""

    @staticmethod
    @abstractmethod
    def count_flops(spec: "BlockSpec", tokens: float) -> tuple[float, float]:
        """Count the operations that one block's mixer spends on a token; a multiply-add is two.

        Args:
            tokens: length of the block's own sequence, over which the mean is taken.

        Returns:
            Operations with weights, and operations of tokens with each other.
        """

    @staticmethod
    @abstractmethod
    def activation_bytes(spec: "BlockSpec", product_bytes: int, compiled: bool) -> int:
        """Estimate what one row of one block's mixer keeps for its backward pass.

        Args:
            product_bytes: bytes of a number that matrices multiply.
            compiled: whether the layer is compiled, and recomputes elementwise operations.
        """
