"""The sections of a recipe, one frozen dataclass for each stage. None of them imports torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from molcli.config.bounds import (
    LARGEST_SIZE,
    MOST_ROWS,
    AtLeast,
    Blocks,
    Count,
    Fraction,
    Layers,
    Length,
    Natural,
    NonNegative,
    Part,
    Positive,
    Rows,
    Seed,
    Size,
)
from molcli.config.layer_choice import LayerChoice

Data = str | dict[str, float]
"""A source of text, or a mapping from sources to weights. A source's weight is its part of the
tokens, in any unit. A source is a .txt, .jsonl or .parquet file, a folder of `molcli data
tokenize`, or a data set on the Hub as hf://org/name[:config[:split]]."""
Preset = Literal["quality", "balanced", "fast", "paper"]
SHAPE_KEYS = (
    *("d_thin", "d_ff_thin", "num_heads_thin"),
    *("d_thin_shared", "d_ff_thin_shared", "num_heads_shared"),
)
"""Keys of the section `upcycle`: the six numbers of a block's shape."""
PRESETS: tuple[Preset, ...] = get_args(Preset)


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense parent becomes a Mixture of Layers model.

    blocks: "slices": the layer keeps its width and its attention. Its FFN neurons are divided: a
        shared slice runs on every token, of the routed slices one on each token. "thin": blocks of
        their own width behind projections (arXiv 2605.09516). "auto": slices, unless the preset is
        "paper" or a key is set that only thin blocks have: d_thin, num_heads_thin, d_thin_shared,
        num_heads_shared, a top_k or num_shared_blocks other than 1, gated_deltanet, a method other
        than fitted, or layers "auto".
    preset: the fraction of the parent layers' weights that run on a token. For slices "quality"
        75%, "balanced" 50%, "fast" 37.5%, of which attention comes first, and a third of the rest
        is the shared slice. "paper": thin blocks of one shape, d_model / A wide where A = S + K of
        them run on a token, with heads and FFN neurons in proportion to the width, or a few heads
        more where whole groups that share a key-value head need fewer weights. With `blocks: thin`
        the others are 75%, 52.5% and 37.5%: if none of the six numbers below is set, the shared
        blocks get seven tenths of it and all of the parent's heads, and the K routed blocks the
        rest; else all blocks have one shape, "balanced" that of "paper", and "quality" and "fast"
        the width and neurons that have their fraction, with the fewest heads that hold all of the
        parent's.
    active: the fraction for slices, in place of the preset's.
    skipped_layers: parent layers that are left out, among those of `layers`: "none", a list, or
        "auto", which is none for thin blocks. For slices it is the layers that change the residual
        least (arXiv 2403.03853), two fifths of the fraction that is saved: six of thirty layers for
        50%; more where all heads would leave room for less than an eighth of the neurons. The other
        converted layers get the weights of those that are left out.
    num_blocks: thin blocks or slices in a layer, shared ones included (N).
    num_shared_blocks: blocks that run on every token (S).
    top_k: routed blocks that run on a token, of the N - S (K). null is 1, or 2 where all thin
        blocks have one shape, and at most N - S.
    d_thin, d_ff_thin, num_heads_thin: shape of a thin block: width, a multiple of head_dim; FFN
        neurons; query heads, at most the parent's. null leaves them to the preset.
    d_thin_shared, d_ff_thin_shared, num_heads_shared: the same for shared blocks. If another of the
        six is set, null is the value of a routed block. Slices have d_ff_thin and d_ff_thin_shared
        only.
    layers: the parent layers that become Mixture of Layers: "all", a list of indices, "middle" (the
        layers nearest to the middle of the model), or "auto" (the layers that cost least). The cost
        of a layer is KL(parent || model) with only that layer converted, its attention softmax, on
        calibration text that its fit did not use.
    layers_budget: fraction of the parent's layers that "middle" and "auto" convert.
    gated_deltanet: the layers whose routed blocks use Gated DeltaNet in place of softmax attention:
        "all", "none", "every:N" (the last of N neighbouring ones), a list of layers, or "auto" (the
        layers that cost least). The cost of a layer is what it adds to KL(parent || model) with
        only that layer converted, on calibration text that its fit did not use.
    gated_deltanet_budget: fraction of the converted layers that "auto" selects.
    ridge: Tikhonov term of the least-squares fits, relative to the mean feature energy.
    shrinkage: fraction of every block's fit that sees all tokens, not only its cluster's.
    method: how blocks are initialised. "fitted" by least squares. The others are baselines to train
        from and to compare with: "random" as by `molcli init`, "svd" truncated weights, "pca"
        weights projected onto the residual's principal axes. "random" and "svd" need no text.
    receipt: "full" adds to receipt.json and receipt.html the baselines on the same held-out text,
        each layer's sensitivity, and greedy continuations. It takes longer, and for the
        continuations loads the parent and the model, one after the other.
    """

    blocks: Literal["auto", "slices", "thin"] = "auto"
    preset: Preset = "balanced"
    active: Fraction | None = None
    skipped_layers: Literal["auto", "none"] | list[int] = "auto"
    num_blocks: Blocks = 9
    num_shared_blocks: int = 1
    top_k: int | None = None
    d_thin: Size | None = None
    d_ff_thin: Size | None = None
    num_heads_thin: Size | None = None
    d_thin_shared: Size | None = None
    d_ff_thin_shared: Size | None = None
    num_heads_shared: Size | None = None
    layers: Literal["all", "middle", "auto"] | list[int] = "all"
    layers_budget: Fraction = 0.5
    gated_deltanet: LayerChoice = "none"
    gated_deltanet_budget: Fraction = 0.5
    ridge: Positive = 1e-2
    shrinkage: Fraction = 0.1
    method: Literal["fitted", "random", "svd", "pca"] = "fitted"
    receipt: Literal["short", "full"] = "short"

    @property
    def has_slices(self) -> bool:
        """Whether the blocks are slices: `blocks`, with what "auto" means."""
        if self.blocks != "auto":
            return self.blocks == "slices"
        thin = (self.d_thin, self.num_heads_thin, self.d_thin_shared, self.num_heads_shared)
        routed = self.num_blocks - self.num_shared_blocks
        usual = self.num_shared_blocks == 1 and self.top_k in (None, min(1, routed))
        fitted = self.method == "fitted" and self.gated_deltanet == "none"
        plain = fitted and self.layers != "auto" and self.preset != "paper"
        return usual and plain and all(number is None for number in thin)

    @property
    def splits_shapes(self) -> bool:
        """Whether the preset gives shared and routed blocks different shapes."""
        routed = (self.d_thin, self.d_ff_thin, self.num_heads_thin)
        shared = (self.d_thin_shared, self.d_ff_thin_shared, self.num_heads_shared)
        mixed = 0 < self.num_shared_blocks < self.num_blocks and self.top_k != 0
        if self.has_slices or self.preset == "paper":
            return False
        return mixed and all(number is None for number in routed + shared)

    @property
    def chosen_top_k(self) -> int:
        """top_k, or the number that null means."""
        if self.top_k is not None:
            return self.top_k
        one = self.splits_shapes or self.has_slices
        return min(1 if one else 2, self.num_blocks - self.num_shared_blocks)


@dataclass(frozen=True)
class ConvertConfig:
    """How softmax attention of a Mixture of Layers model becomes Gated DeltaNet.

    gated_deltanet: as `upcycle.gated_deltanet`, among the layers whose routed blocks use softmax. A
        list may also name dense layers, whose attention is then converted at full width.
    gated_deltanet_budget: fraction of these layers that "auto" selects. The cost of a layer is
        KL(original || original with only that layer converted), on text that its fit did not use.
    ridge: Tikhonov term of the least-squares fits, relative to the mean feature energy.
    steps: steps of Adam for each layer, on the converted attention, towards the output that the
        layer had with softmax.
    learning_rate: of these steps, falling linearly to 0.
    """

    gated_deltanet: LayerChoice = "all"
    gated_deltanet_budget: Fraction = 0.5
    ridge: Positive = 1e-2
    steps: Natural = 0
    learning_rate: Positive = 1e-3


@dataclass(frozen=True)
class CalibrateConfig:
    """The text that a conversion is fitted to.

    data: a source or a mapping from sources to weights. null is train.data in `upcycle` and
        `calibrate`, and text sampled from the parent where that is null, too.
    repeats: part of the sequences that repeat themselves, as in the train section; null is 0.25.
        Held-out text has none, nor have sequences of fewer than 48 tokens.
    tokens: calibration tokens, from the beginning of the data.
    heldout_tokens: further tokens, not used by any fit, for the receipt.
    context_length: tokens in a calibration sequence.
    seed: of the choice of held-out text, of sampled text, and of the clustering.
    """

    data: Data | None = None
    repeats: Part | None = None
    tokens: Count = 65_536
    heldout_tokens: Count = 8_192
    context_length: Length = 512
    seed: Seed = 0


@dataclass(frozen=True)
class SampleConfig:
    """Text sampled from the parent, for use where there is no data set.

    tokens: how many to sample.
    length: tokens in a document.
    batch_size: documents sampled together. "auto" is 64 on a CPU; on a GPU, as many as fit into
        half of its memory, at most 8192.
    temperature: 1.0 samples the parent's own distribution.
    prompts: a source of text as in train.data, whose documents begin the sampled ones, in order and
        from the first again when they run out. null begins with the parent's BOS alone.
    prompt_length: tokens of a prompt to use, at most; null uses all of them.
    repeats: part of the tokens in documents that repeat text of the others, as rows do in the train
        section: for use outside of molcli, whose training and calibration make their own.
    """

    tokens: Count = 100_000
    length: Length = 512
    batch_size: Count | Literal["auto"] = "auto"
    temperature: Positive = 1.0
    prompts: str | None = None
    prompt_length: Size | None = None
    repeats: Part = 0.0
    seed: Seed = 0


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. A value of null is that of the train section.

    kind: "align" trains each Mixture of Layers layer alone towards the parent layer's output on the
        parent's own input. "distill" learns the parent's predictions, "pretrain" the text.
    tokens: of this stage. The other keys are those of the train section.
    """

    kind: Literal["align", "distill", "pretrain"]
    data: Data | None = None
    tokens: Count | None = None
    repeats: Part | None = None
    context_length: Length | None = None
    batch_size: Rows | None = None
    micro_batch_size: Rows | None = None
    learning_rate: Positive | None = None
    new_learning_rate: Positive | None = None
    min_learning_rate_ratio: Fraction | None = None
    warmup_fraction: Fraction | None = None
    trainable: Literal["all", "mol"] | None = None
    kl_weight: NonNegative | None = None
    ce_weight: NonNegative | None = None
    temperature: Positive | None = None
    balance: Literal["bias", "loss", "none"] | None = None
    balance_weight: NonNegative | None = None
    bias_update_rate: NonNegative | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The training run.

    data: a source or a mapping from sources to weights such as {a.jsonl: 0.7, b.txt: 0.3}; --data
        on the command line replaces it. A source that runs out begins again, in another order.
    repeats: part of the rows that repeat themselves, so that the model goes on to look things up in
        its context: passages that come back after other text, and lists of pairs that come back in
        another order. They are made from the data while it is read, from all sources by weight.
        null is 0.25 in stages of kind distill, and 0 in others. Rows of fewer than 48 tokens never
        repeat themselves. Rows of `logits` are as `cache-logits` made them, which reads this key.
    logits: a folder of `molcli data cache-logits`, which replaces data and parent in stages without
        data of their own. Not for align, and only at temperature 1.
    tokens: training tokens of the whole run.
    context_length: tokens in a packed row.
    batch_size: rows in an optimiser step.
    micro_batch_size: rows in a forward pass, at most. Where processes split a batch and each has
        fewer rows, these are one forward pass.
    learning_rate: peak, for inherited weights.
    new_learning_rate: peak, for the router, thin_in and thin_out, and DeltaNet's gates and
        convolutions. Both fall along a cosine to min_learning_rate_ratio of their peak.
    warmup_fraction: of the stage's steps, in which the learning rates rise linearly.
    kl_weight: weight of the forward KL to the parent.
    ce_weight: weight of the next-token loss.
    temperature: of both distributions in the KL, which is multiplied by its square
        (arXiv 1503.02531).
    balance: how routed blocks are kept in use. "bias": after each step, the bias of each block's
        logit moves by bias_update_rate towards an even load (arXiv 2408.15664). "loss": the CV^2
        loss (arXiv 2605.09516) with weight balance_weight. "none".
    start_top_k: routed blocks that run on a token at the start, falling linearly to the model's own
        number over top_k_fraction of all tokens; null keeps the model's.
    routers: "train" trains routers and balances their loads, "keep" leaves them as they are, "auto"
        keeps those of slices: their clusters are what the slices were made for.
    trainable: "mol" trains the Mixture of Layers layers alone and keeps the rest as inherited. On a
        model with dense layers below them, the backward pass then ends early.
    checkpoint_every: optimiser steps between checkpoints; 0 writes none.
    log_every: optimiser steps between lines of the log.
    compile: torch.compile for layers and loss, which takes a minute, and, in one process without
        Gated DeltaNet, CUDA graphs. "auto": on a GPU, in long runs with a constant top_k.
    sharding: between several processes. "full": each holds a part of weights, gradients and
        moments. "optimizer": each holds a part of the moments, and of the weights between steps;
        during a step, weights and gradients are whole on each, so that they are communicated once
        in a step and not in every micro-batch. "auto": "optimizer" where both need at most a third
        of a GPU's memory.
    max_skipped: the run stops after this many steps in a row whose gradient was not finite.
    trackers: services that show the log as it grows, in OUT/molcli (tensorboard) or where the
        service keeps it, under the project molcli.
    precision: "auto" is bf16 where the device multiplies matrices in it natively, else fp32.
    stages: one after another, each with a new optimiser, warm-up and decay. null is one stage,
        distill with a parent and pretrain without. "auto" plans the stages from the model's size
        and `tokens`, then the tokens of all stages together.
    """

    data: Data | None = None
    repeats: Part | None = None
    logits: str | None = None
    tokens: Count = 1_000_000
    context_length: Length = 512
    batch_size: Rows = 16
    micro_batch_size: Rows = 4
    learning_rate: Positive = 1e-4
    new_learning_rate: Positive = 3e-5
    min_learning_rate_ratio: Fraction = 0.1
    warmup_fraction: Fraction = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegative = 0.01
    clip_norm: Positive = 1.0
    kl_weight: NonNegative = 1.0
    ce_weight: NonNegative = 0.0
    temperature: Positive = 1.0
    balance: Literal["bias", "loss", "none"] = "bias"
    balance_weight: NonNegative = 0.05
    bias_update_rate: NonNegative = 1e-3
    start_top_k: Count | None = None
    top_k_fraction: Fraction = 0.5
    routers: Literal["auto", "train", "keep"] = "auto"
    trainable: Literal["all", "mol"] = "all"
    checkpoint_every: Natural = 200
    log_every: Count = 10
    max_skipped: Count = 10
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    sharding: Literal["auto", "full", "optimizer"] = "auto"
    seed: Seed = 0
    stages: Literal["auto"] | list[StageConfig] | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """How a model is measured, and its parent beside it.

    tokens: held-out tokens, at most.
    context_length: tokens in a row.
    batch_size: rows, prompts or sequences that are computed together.
    num_prompts: pieces of the held-out text, of prompt_length tokens each, that model and parent
        continue greedily by continuation_length tokens; 0 skips this.
    recall_sequences: sequences for each of recall_distances, each of which asks for a value by its
        key; 0 skips this.
    recall_pairs: keys and values in a sequence.
    recall_distances: filler tokens between the pairs and the question. Distances beyond the model's
        positions are skipped.
    seed: of the words of the recall test.
    """

    tokens: Count = 65_536
    context_length: Length = 512
    batch_size: Count = 8
    num_prompts: Natural = 32
    prompt_length: Size = 32
    continuation_length: Size = 32
    recall_sequences: Annotated[int, AtLeast(0, MOST_ROWS)] = 32
    recall_pairs: Size = 8
    recall_distances: list[int] = field(default_factory=lambda: [0, 32, 128, 512])
    seed: Seed = 0


@dataclass(frozen=True)
class InspectConfig:
    """Routing statistics.

    tokens: of the text, at most.
    context_length: tokens in a row.
    batch_size: rows that are computed together.
    dead_share: a block with less than this fraction of the uniform load counts as dead.
    """

    tokens: Count = 65_536
    context_length: Length = 512
    batch_size: Count = 8
    dead_share: Fraction = 0.01


@dataclass(frozen=True)
class ModelConfig:
    """An untrained checkpoint (`molcli init`). The defaults are the paper's 80M-scale 1+3of15.

    layer_mixer: the mixer of the routed blocks, in every layer.
    num_blocks, num_shared_blocks, top_k, d_thin, d_ff_thin: as in the upcycle section.
    restrict_attention: false runs every routed block on every token and weights the top_k.
    """

    vocab_size: Size = 32_000
    hidden_size: Size = 1024
    num_hidden_layers: Layers = 8
    head_dim: Annotated[int, AtLeast(2, LARGEST_SIZE)] = 64
    layer_mixer: Literal["attention", "gated_deltanet"] = "gated_deltanet"
    num_blocks: Blocks = 15
    num_shared_blocks: int = 1
    top_k: int = 3
    d_thin: Size = 256
    d_ff_thin: Size = 1024
    mlp_gated: bool = False
    hidden_act: str = "gelu"
    attention_bias: bool = True
    restrict_attention: bool = True
    rope_theta: Positive = 10_000.0
    max_position_embeddings: Size = 4096
    tie_word_embeddings: bool = True
    seed: Seed = 0


@dataclass(frozen=True)
class Recipe:
    """All sections."""

    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
