"""Baselines of a conversion: dense models with a part of the parent.

"skipped" drops the layers that would be converted. "depth_pruned" drops the least influential
layers, as many as bring the parent down to the conversion's active parameters. A full receipt has
the same two baselines; here they are checkpoints that can be evaluated on any text, and trained.
"width_pruned" keeps all layers and, in each, the neurons with the largest activations, as many as
the conversion's active parameters allow (as Minitron, arXiv 2407.14679). A neuron's rank is the L2
norm of its hidden activation, act(gate) * up, over the calibration's tokens. Heads carry recall, so
that they go last: only where the budget has no room for all heads beside an eighth of the neurons
are key-value groups dropped, a key-value head with its query heads, those whose output has the
smallest L2 norm, as few as make that room. Each layer has as many heads and neurons as any other.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molcli.data.packing import TokenRows
from molcli.estimate.cost import parent_config
from molcli.estimate.parameters import ParameterCount, count_parameters
from molcli.families.parent import Parent
from molcli.model import MoLConfig, MoLForCausalLM
from molcli.model.parent import load_dense

Cut = Literal["skipped", "depth_pruned", "width_pruned"]
CUTS: tuple[Cut, ...] = ("skipped", "depth_pruned", "width_pruned")
ROWS = 16  # of a batch
FEWEST_NEURONS = 1 / 8  # of the parent's, before heads are dropped


def kept_layers(cut: Cut, shape: MoLConfig, influence: Callable[[], list[float]]) -> list[int]:
    """Return the indices of the parent's layers that a baseline keeps, ascending.

    Args:
        cut: the baseline.
        shape: configuration of the conversion that it is compared with.
        influence: returns the influence of each layer.
    """
    layers = range(shape.num_hidden_layers)
    if cut == "skipped":
        return [i for i in layers if shape.is_dense(i)]
    count = max(0, int(_budget(shape) // _layer_size(shape)))
    scores = influence()
    return sorted(sorted(layers, key=lambda i: -scores[i])[:count])


def kept_width(shape: MoLConfig, count: ParameterCount | None = None) -> tuple[int, int]:
    """Return how many key-value groups and neurons of each layer "width_pruned" keeps.

    Args:
        shape: configuration of the conversion that it is compared with.
        count: the parameters to have as many active ones as; None for those of `shape`.

    Raises:
        ValueError: there is no room for one group and one neuron.
    """
    most, budget = shape.intermediate_size, (count or count_parameters(shape)).active
    neurons = 0
    for groups in range(shape.num_key_value_heads, 0, -1):
        size, more = (count_parameters(narrow_config(shape, groups, n)).active for n in (0, 1))
        neurons = min(most, (budget - size) // (more - size))
        if neurons >= FEWEST_NEURONS * most:
            return groups, neurons
    if neurons < 1:
        raise ValueError("the active parameters leave no room for neurons beside a head")
    return 1, neurons


def narrow_config(shape: MoLConfig, groups: int, neurons: int) -> MoLConfig:
    """Return the configuration of the parent with this many key-value groups and neurons."""
    config = deepcopy(parent_config(shape))
    config.num_attention_heads = groups * (shape.num_attention_heads // shape.num_key_value_heads)
    config.num_key_value_heads = groups
    config.intermediate_size = neurons
    return config


def _budget(shape: MoLConfig) -> int:
    """Active parameters of all layers."""
    count = count_parameters(shape)
    return count.active - count.embedding - shape.hidden_size  # without the final norm


def _layer_size(shape: MoLConfig) -> float:
    """Parameters of one of the parent's layers."""
    dense = count_parameters(parent_config(shape))
    return (dense.non_embedding - shape.hidden_size) / shape.num_hidden_layers


def activations(parent: MoLForCausalLM, rows: TokenRows) -> list[Tensor]:
    """Return for each layer the root mean square of each neuron's activation, (d_ff,) float64."""
    networks = [layer.block.mlp for layer in parent.model.layers]
    return _root_mean_squares(parent, rows, networks, lambda network, *args: network.hidden(*args))


def group_outputs(parent: MoLForCausalLM, rows: TokenRows) -> list[Tensor]:
    """Return for each layer the root mean square of the norm of each key-value group's output.

    The output is that of its query heads together, after the output projection: (groups,) float64.
    """

    def norms(mixer: Any, *args: Any) -> Tensor:
        heads = mixer.heads(*args).flatten(1)  # (M, query heads * head_dim)
        size = heads.shape[1] // groups
        parts = zip(heads.split(size, 1), mixer.o_proj[0].split(size, 1), strict=True)
        return torch.stack([(x @ weight.T).norm(dim=1) for x, weight in parts], dim=1)

    groups = parent.config.num_key_value_heads
    mixers = [layer.block.mixer for layer in parent.model.layers]
    return _root_mean_squares(parent, rows, mixers, norms)


@torch.no_grad()
def _root_mean_squares(
    parent: MoLForCausalLM,
    rows: TokenRows,
    modules: list[nn.Module],
    values: Callable[..., Tensor],
) -> list[Tensor]:
    """Return the root mean square over tokens of `values(module, *inputs)`, (M, n), per module."""
    sums: list[Any] = [0.0] * len(modules)

    def add(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums[index] += values(module, *inputs).double().square().sum(0)

        return hook

    hooks = [module.register_forward_pre_hook(add(i)) for i, module in enumerate(modules)]
    for batch in rows.batches(ROWS, parent.device):
        parent.model(**batch.inputs(), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [(total / rows.tokens).sqrt() for total in sums]


@torch.no_grad()
def influences(parent: MoLForCausalLM, rows: TokenRows) -> list[float]:
    """Return for each layer 1 - the mean cosine of its input and output (arXiv 2403.03853)."""
    sums = [0.0] * len(parent.model.layers)

    def add(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor]) -> None:
            cosine = F.cosine_similarity(inputs[0].float(), output[0].float(), dim=-1)
            sums[index] += (1 - cosine).double().sum().item()

        return hook

    hooks = [layer.register_forward_hook(add(i)) for i, layer in enumerate(parent.model.layers)]
    for batch in rows.batches(ROWS, parent.device):
        parent.model(**batch.inputs(), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [total / rows.tokens for total in sums]


def write_dense(parent: Parent, layers: list[int], out: Path) -> None:
    """Write the parent with only these layers as a checkpoint."""
    model = load_dense(parent, parent.embedding().dtype, torch.device("cpu"))
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in layers)
    model.config.num_hidden_layers = len(layers)
    model.config.layer_structures = ["dense"] * len(layers)
    model.config.layer_mixers = ["attention"] * len(layers)
    model.save_pretrained(out)
    parent.copy_tokenizer(out)


@torch.no_grad()
def write_narrow(
    parent: Parent,
    out: Path,
    neurons: tuple[list[Tensor], int],
    groups: tuple[list[Tensor], int] | None = None,
) -> None:
    """Write the parent with some neurons and key-value groups as a checkpoint.

    Args:
        parent: the dense model.
        out: folder to write.
        neurons: (d_ff,) scores for each layer, and how many to keep in each: the highest.
        groups: the same of key-value groups; None keeps all of them.
    """
    model = load_dense(parent, parent.embedding().dtype, torch.device("cpu"))
    config = model.config
    for i, layer in enumerate(model.model.layers):
        _keep(layer.block.mlp, _best(neurons[0][i], neurons[1]), _NEURONS)
        if groups is not None:
            best = _best(groups[0][i], groups[1])
            head = torch.arange(config.head_dim)
            per_group = torch.arange(config.num_attention_heads // config.num_key_value_heads)
            heads = (best[:, None] * len(per_group) + per_group).flatten()
            queries, keys = ((x[:, None] * len(head) + head).flatten() for x in (heads, best))
            full = config.qk_norm_full_width  # otherwise all heads have the same norms
            mixer = layer.block.mixer
            _keep(mixer, queries, {"q_proj": 1, "q_bias": 1, "o_proj": 2} | _when(full, "q_norm"))
            _keep(mixer, keys, {"k_proj": 1, "k_bias": 1, "v_proj": 1, "v_bias": 1})
            _keep(mixer, keys, _when(full, "k_norm"))
    count = config.num_key_value_heads if groups is None else groups[1]
    model.config = narrow_config(config, count, neurons[1])
    model.save_pretrained(out)
    parent.copy_tokenizer(out)


_NEURONS = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}  # their dimension, by weight


def _when(wanted: bool, name: str) -> dict[str, int]:
    return {name: 1} if wanted else {}


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, ascending."""
    return scores.topk(count).indices.sort().values.cpu()


def _keep(module: nn.Module, kept: Tensor, dimensions: dict[str, int]) -> None:
    """Reduce parameters, where the module has them, to the kept indices of these dimensions."""
    for name, dimension in dimensions.items():
        if (weight := getattr(module, name)) is not None:
            setattr(module, name, nn.Parameter(weight.index_select(dimension, kept)))
