"""The sections of a recipe, one frozen dataclass per stage. No section imports torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from molcli.config.layer_choice import LayerChoice

Preset = Literal["quality", "balanced", "fast"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
Data = str | dict[str, float]
"""A source, or a mapping from sources to weights, a source's share of the tokens in any unit. A
source is a .txt, .jsonl or .parquet file, a folder of `molcli data tokenize`, or a data set on the
Hub as hf://org/name[:config[:split]]."""


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense parent becomes a Mixture of Layers.

    preset: the shape of blocks, as a share of the parent layer's weights that run on a token:
        "quality" 75%, "balanced" 52.5%, "fast" 37.5%. Where none of the six numbers below is set,
        the shared blocks get seven tenths of it and all of the parent's heads, the K routed ones
        the rest. Where one is set, or nothing is shared or routed, all blocks have one shape, and
        A = S + K run on a token: "balanced" is then the paper's rule, d_model / A wide, with heads
        and neurons in proportion to the width, or a few heads more where whole groups that share a
        key-value head take fewer weights; "quality" and "fast" are as wide and have as many neurons
        as give the A blocks their share, and the fewest heads that hold all of the parent's.
    num_blocks: thin blocks in a layer, shared ones included (N).
    num_shared_blocks: blocks that run on every token (S).
    top_k: routed blocks that run on a token, of the N - S (K); null takes 1, 2 where all blocks
        have one shape, or all where there are fewer.
    d_thin, d_ff_thin, num_heads_thin: width of a thin block, a multiple of head_dim; its FFN
        neurons; its query heads, at most the parent's. null leaves them to the preset.
    d_thin_shared, d_ff_thin_shared, num_heads_shared: the same of a shared block; where another
        number is set, null is as in a routed one.
    layers: which parent layers become Mixture of Layers: "all", a list of indices, "middle": those
        halfway between input and output, or "auto": those that cost least. The cost of a layer is
        KL(parent || model) with that layer alone converted, its attention softmax, on calibration
        text kept from its fit.
    layers_budget: share of the parent's layers that "middle" and "auto" take.
    gated_deltanet: layers whose routed blocks use Gated DeltaNet instead of softmax attention:
        "all", "none", "every:N" (of N neighbouring ones the last), a list of layers, or "auto":
        those that cost least. The cost of a layer is what it adds to KL(parent || model) with that
        layer alone converted, on calibration text kept from its fit.
    gated_deltanet_budget: share of the converted layers that "auto" takes.
    ridge: Tikhonov term of the least-squares refits, relative to the mean feature energy.
    shrinkage: share of every block's refit that sees all tokens, not only its cluster's.
    method: how blocks are filled. "fitted" by least squares; the others are baselines, to train
        from and compare with: "random" as `molcli init`, "svd" the truncated weights, "pca" weights
        projected onto the residual's principal axes. "random" and "svd" need no text.
    receipt: "full" adds to receipt.json and receipt.html the baselines on the same held-out text,
        each layer's sensitivity, and greedy continuations. It takes longer, and for the last of
        these loads both models as a whole, one after the other.
    """

    preset: Preset = "balanced"
    num_blocks: int = 9
    num_shared_blocks: int = 1
    top_k: int | None = None
    d_thin: int | None = None
    d_ff_thin: int | None = None
    num_heads_thin: int | None = None
    d_thin_shared: int | None = None
    d_ff_thin_shared: int | None = None
    num_heads_shared: int | None = None
    layers: Literal["all", "middle", "auto"] | list[int] = "all"
    layers_budget: float = 0.5
    gated_deltanet: LayerChoice = "none"
    gated_deltanet_budget: float = 0.5
    ridge: float = 1e-2
    shrinkage: float = 0.1
    method: Literal["fitted", "random", "svd", "pca"] = "fitted"
    receipt: Literal["short", "full"] = "short"

    @property
    def splits_shapes(self) -> bool:
        """Whether the preset gives shared and routed blocks a shape each."""
        routed = (self.d_thin, self.d_ff_thin, self.num_heads_thin)
        shared = (self.d_thin_shared, self.d_ff_thin_shared, self.num_heads_shared)
        mixed = 0 < self.num_shared_blocks < self.num_blocks and self.top_k != 0
        return mixed and all(number is None for number in routed + shared)

    @property
    def chosen_top_k(self) -> int:
        """top_k, or what null stands for."""
        if self.top_k is not None:
            return self.top_k
        return min(1 if self.splits_shapes else 2, self.num_blocks - self.num_shared_blocks)


@dataclass(frozen=True)
class ConvertConfig:
    """Softmax attention of a Mixture of Layers model becomes Gated DeltaNet.

    gated_deltanet: as `upcycle.gated_deltanet`, among the layers whose routed blocks use softmax; a
        list may also name dense layers, whose attention is then converted at full width.
    gated_deltanet_budget: share of these layers that "auto" takes; the cost of a layer is
        KL(original || original with that layer alone converted), on text kept from its fit.
    ridge: Tikhonov term of the least-squares refits, relative to the mean feature energy.
    steps: of Adam, per layer, on the converted attention: it learns to give the layer the output
        that it had with softmax. learning_rate: of these steps, falling linearly to 0.
    """

    gated_deltanet: LayerChoice = "all"
    gated_deltanet_budget: float = 0.5
    ridge: float = 1e-2
    steps: int = 0
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class CalibrateConfig:
    """Text that the conversion looks at.

    data: a source or a mapping from sources to weights; null samples text from the parent itself.
    tokens: calibration tokens, the first of the data. heldout_tokens: further ones, never fitted,
        for the receipt.
    context_length: tokens in a calibration sequence.
    seed: draws what of the data is held out, the sampled text and the clusters.
    """

    data: Data | None = None
    tokens: int = 65_536
    heldout_tokens: int = 8_192
    context_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class SampleConfig:
    """Text sampled from the parent, for those without a data set.

    tokens: how many to sample. length: tokens in a document. batch_size: documents at a time;
        "auto": 64 on a CPU, on a GPU as many as half of its memory is for, at most 8192.
    temperature: 1.0 samples the parent's own distribution.
    prompts: what the documents begin with, a source like train.data; in its order, and from its
        first again when they run out. null begins with the parent's BOS alone.
    prompt_length: tokens of a prompt that its document begins with, at most; null takes them all.
    """

    tokens: int = 100_000
    length: int = 512
    batch_size: int | Literal["auto"] = "auto"
    temperature: float = 1.0
    prompts: str | None = None
    prompt_length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. What is null is as in the train section.

    kind: "align" teaches every Mixture of Layers layer the parent layer's output on the parent's
        own input, each on its own; it trains those layers alone. "distill" learns the parent's
        predictions, "pretrain" the text.
    tokens: of this stage. The other keys mean what they mean in the train section.
    """

    kind: Literal["align", "distill", "pretrain"]
    data: Data | None = None
    tokens: int | None = None
    context_length: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    new_learning_rate: float | None = None
    min_learning_rate_ratio: float | None = None
    warmup_fraction: float | None = None
    trainable: Literal["all", "mol"] | None = None
    kl_weight: float | None = None
    ce_weight: float | None = None
    temperature: float | None = None
    balance: Literal["bias", "loss", "none"] | None = None
    balance_weight: float | None = None
    bias_update_rate: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The recovery run.

    data: a source or a mapping from sources to weights such as {a.jsonl: 0.7, b.txt: 0.3} (the
        command line's --data wins). A source that runs out begins again, in another order.
    logits: a folder of `molcli data cache-logits`, which stands for both data and parent in stages
        without data of their own; not for align, and at temperature 1 alone.
    tokens: training tokens in all. context_length: tokens in a packed row.
    batch_size: rows in an optimiser step. micro_batch_size: rows in a forward pass, at most: where
        processes share a batch, each takes its rows at once if they are fewer.
    learning_rate: peak, for inherited weights; new_learning_rate for the router, thin_in and
        thin_out, and DeltaNet's gates and convolutions. Cosine to min_learning_rate_ratio of it.
    kl_weight: weight of the forward KL to the parent; ce_weight of the next-token loss.
    temperature: at which the KL compares the two, times its square (arXiv 1503.02531).
    balance: how routed blocks are kept in use. "bias": after a step, the bias of each block's logit
        moves by bias_update_rate towards an even load (arXiv 2408.15664); "loss": the CV^2 loss
        (arXiv 2605.09516) with weight balance_weight; "none".
    start_top_k: routed blocks that run on a token at first, falling linearly to the model's own
        number over top_k_fraction of all tokens; null keeps the model's.
    trainable: "mol" trains the Mixture of Layers layers alone and keeps the rest as inherited; on a
        model with dense layers below them, the backward pass ends early.
    checkpoint_every: optimiser steps between checkpoints; 0 writes none.
    compile: torch.compile for layers and loss, which takes a minute, and, in one process without
        Gated DeltaNet, CUDA graphs; "auto": on a GPU, in long runs that keep one number of blocks.
    sharding: between several processes. "full": each holds a share of weights, gradients and
        moments. "optimizer": of moments, and of weights between steps; while a step lasts, weights
        and gradients are whole on each, so that they are exchanged once in it and not in every
        micro-batch. "auto": "optimizer" where both take at most a third of a GPU's memory.
    max_skipped: the run stops after so many steps in a row whose gradient was not finite.
    trackers: that show the log as it grows, in OUT/molcli (tensorboard) or where the service keeps
        it, under the project molcli.
    precision: "auto" is bf16 where the device multiplies matrices in it natively, else fp32.
    stages: one after another, each with a fresh optimiser, warm-up and decay; null is one stage,
        distill with a parent and pretrain without; "auto" plans them from the model's size and
        `tokens`, then the tokens of all stages together.
    """

    data: Data | None = None
    logits: str | None = None
    tokens: int = 1_000_000
    context_length: int = 512
    batch_size: int = 16
    micro_batch_size: int = 4
    learning_rate: float = 1e-4
    new_learning_rate: float = 3e-5
    min_learning_rate_ratio: float = 0.1
    warmup_fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    balance: Literal["bias", "loss", "none"] = "bias"
    balance_weight: float = 0.05
    bias_update_rate: float = 1e-3
    start_top_k: int | None = None
    top_k_fraction: float = 0.5
    trainable: Literal["all", "mol"] = "all"
    checkpoint_every: int = 200
    log_every: int = 10
    max_skipped: int = 10
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    sharding: Literal["auto", "full", "optimizer"] = "auto"
    seed: int = 0
    stages: Literal["auto"] | list[StageConfig] | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """How good a model is, beside its parent.

    tokens: held-out tokens, at most. context_length: tokens in a row. batch_size: rows, prompts or
        sequences at a time.
    num_prompts: pieces of the held-out text, of prompt_length tokens each, that model and parent
        continue greedily by continuation_length tokens; 0 leaves this out.
    recall_sequences: sequences for each of recall_distances, in which a value is asked for by its
        key; 0 leaves this out. recall_pairs: pairs in a sequence. recall_distances: filler tokens
        between the pairs and the question; those beyond the model's positions are left out.
    seed: draws the words of the recall test.
    """

    tokens: int = 65_536
    context_length: int = 512
    batch_size: int = 8
    num_prompts: int = 32
    prompt_length: int = 32
    continuation_length: int = 32
    recall_sequences: int = 32
    recall_pairs: int = 8
    recall_distances: list[int] = field(default_factory=lambda: [0, 32, 128, 512])
    seed: int = 0


@dataclass(frozen=True)
class InspectConfig:
    """Routing statistics. tokens: at most so many; dead_share: a block below this share of the
    uniform load counts as dead.
    """

    tokens: int = 65_536
    context_length: int = 512
    batch_size: int = 8
    dead_share: float = 0.01


@dataclass(frozen=True)
class ModelConfig:
    """An untrained checkpoint (`molcli init`). Defaults: the paper's 80M-scale 1+3of15.

    layer_kind: the mixer of the routed blocks, in every layer.
    restrict_attention: false runs every routed block on every token and weights the top_k.
    """

    vocab_size: int = 32_000
    hidden_size: int = 1024
    num_hidden_layers: int = 8
    head_dim: int = 64
    layer_kind: Literal["softmax", "gated_deltanet"] = "gated_deltanet"
    num_blocks: int = 15
    num_shared_blocks: int = 1
    top_k: int = 3
    d_thin: int = 256
    d_ff_thin: int = 1024
    mlp_gated: bool = False
    hidden_act: str = "gelu"
    attention_bias: bool = True
    restrict_attention: bool = True
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Every section, with defaults that work."""

    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
