"""What a stage minimises: losses of a batch, and their gradients.

`PredictionObjective` serves stages of kind distill and pretrain, `AlignmentObjective` those of kind
align.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from molcli.data.logits import LogitCache
from molcli.data.packing import Batch
from molcli.errors import MolError
from molcli.fitting.chunks import token_context
from molcli.maths.losses import Head, TrainingLoss, training_loss
from molcli.maths.top_k import TopK
from molcli.model import MoLForCausalLM
from molcli.model.layers import ConvertedLayer
from molcli.model.routing.balance import cv_squared
from molcli.stages.train.balance import RouterLoads
from molcli.stages.train.batches import MicroBatches
from molcli.stages.train.distributed import set_gradient_sync, shard
from molcli.stages.train.gradient_graph import GradientGraph


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses of a stage.

    Attributes:
        ce: of the next-token cross-entropy.
        kl: of the forward KL to the parent.
        temperature: of the KL.
        compiled: whether `training_loss` is compiled.
    """

    ce: float
    kl: float
    temperature: float = 1.0
    compiled: bool = False


class Student(nn.Module):
    """The model and its losses in one module, which FSDP2 wraps as a whole.

    So its forward pass gathers the weights of embeddings, final norm and head; each layer gathers
    its own.

    Attributes:
        dtype: of matrix products, float32 or bfloat16; the weights stay float32.
        loads: counts the routing.
        optimizer_sharding: gradients are reduced over ranks after the last micro-batch of a step,
            not after each (`distributed.uses_optimizer_sharding`).
    """

    def __init__(
        self,
        model: MoLForCausalLM,
        dtype: torch.dtype,
        loads: RouterLoads,
        *,
        optimizer_sharding: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.loads = model, dtype, loads
        self.optimizer_sharding = optimizer_sharding

    def initialise_fsdp(self, on_device: Tensor) -> None:
        """Do nothing: a first forward pass of the root module, before that of any of its parts.

        Without a tensor argument to move to its GPU, FSDP2 of torch 2.11 fails.
        """

    def forward(
        self, batch: Batch, parent: Head | TopK | None, weights: LossWeights
    ) -> tuple[TrainingLoss, Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: B rows of T tokens.
            parent: its hidden states and head, or its top-k predictions (B, T, k), or None.
            weights: of the losses.

        Returns:
            The losses, summed over predicted tokens, in nats, and 0-d CV^2, mean over layers.
        """
        with _autocast(batch.input_ids.device, self.dtype):
            out = self.model.model(**batch.inputs(), use_cache=False)
            head = Head(out.last_hidden_state, self.model.lm_head.weight)
            losses = training_loss(
                head,
                batch.labels,
                parent,
                ce_weight=weights.ce,
                kl_weight=weights.kl,
                temperature=weights.temperature,
                compiled=weights.compiled,
            )
        balance = losses.kl.new_zeros(())
        if out.routing:
            routing_weights = torch.stack([routing.weights for routing in out.routing])
            blocks = torch.stack([routing.blocks for routing in out.routing])
            self.loads.add(blocks)
            balance = cv_squared(routing_weights, blocks, out.routing[0].logits.shape[1]).mean()
        return losses, balance


def make_student(
    model: MoLForCausalLM,
    dtype: torch.dtype,
    accelerator: Accelerator,
    *,
    optimizer_sharding: bool = False,
) -> Student:
    """Wrap the model with its losses; several ranks shard it, each on its device.

    Args:
        model: every parameter takes a gradient at this point.
        dtype: of matrix products.
        accelerator: gives ranks and device.
        optimizer_sharding: a layer's gathered weights are kept until the backward pass.
    """
    if accelerator.num_processes == 1:
        return Student(model, dtype, RouterLoads(model), optimizer_sharding=optimizer_sharding)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.model.layers:
        shard(layer, mesh, reshard_after_forward=not optimizer_sharding)
    student = Student(model, dtype, RouterLoads(model), optimizer_sharding=optimizer_sharding)
    # Weights kept after a forward pass without a backward pass would be stale after the next step.
    shard(student, mesh, reshard_after_forward=True)
    # FSDP2 takes the first module that runs as the root; alignment runs layers on their own.
    register_fsdp_forward_method(student, Student.initialise_fsdp.__name__)
    student.initialise_fsdp(torch.zeros((), device=accelerator.device))
    return student


@dataclass(frozen=True)
class PredictionObjective:
    """Next-token losses: on the text, and towards the parent's predictions.

    Attributes:
        student: the model that is trained.
        parent: the dense model in evaluation mode, or its cached predictions of the rows, or None.
        weights: of the losses.
        balance_weight: of CV^2, for each micro-batch.
        graph: replays micro-batches; only in one process and without cached predictions.
    """

    student: Student
    parent: MoLForCausalLM | LogitCache | None
    weights: LossWeights
    balance_weight: float
    graph: GradientGraph | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Which of loss, ce, kl and balance `backward` fills."""
        return ("loss", "ce", "balance") + (("kl",) if self.parent is not None else ())

    def backward(self, step: MicroBatches, accelerator: Accelerator) -> Tensor:
        """Add this rank's part of the gradient of a step to the parameters' gradients.

        Returns:
            (4,) float32, this rank's part of the mean loss, cross-entropy, KL and balance. The
            first three are means over the predicted tokens of the batch, the balance over its
            micro-batches.
        """
        device = accelerator.device
        count = torch.full((), step.predicted, dtype=torch.float32, device=device)
        means = torch.zeros(4, device=device)
        for number, (index, batch) in enumerate(step.batches, start=1):
            if self.student.optimizer_sharding:
                set_gradient_sync(self.student, now=number == len(step))
            add_gradient = partial(self._add_gradient, index, len(step), accelerator.num_processes)
            if self.graph is None:
                means += add_gradient(batch, count)
            else:
                means += self.graph(add_gradient, batch, count)
        return means

    @torch.no_grad()
    def losses_are_finite(self, step: MicroBatches, accelerator: Accelerator) -> bool:
        """Run this rank's part of a step without gradients and check its losses."""
        total = torch.zeros((), device=accelerator.device)
        for index, batch in step.batches:
            losses, balance = self.student(
                batch, self._parent_predictions(batch, index), self.weights
            )
            total += losses.loss + balance
        return bool(total.isfinite())

    def _add_gradient(
        self, index: Tensor, num_micro_batches: int, ranks: int, batch: Batch, count: Tensor
    ) -> Tensor:
        """One micro-batch of `backward`, the rows `index`. count: 0-d, of predicted tokens."""
        losses, balance = self.student(batch, self._parent_predictions(batch, index), self.weights)
        balance = balance / (num_micro_batches * ranks)
        loss = losses.loss / count + self.balance_weight * balance
        (loss * ranks).backward()  # FSDP2 averages over ranks; this is a sum
        means = (losses.cross_entropy / count, losses.kl / count)
        return torch.stack([loss, *means, balance]).detach()

    @torch.no_grad()
    def _parent_predictions(self, batch: Batch, index: Tensor) -> Head | TopK | None:
        if self.parent is None:
            return None
        if isinstance(self.parent, LogitCache):
            device = batch.input_ids.device
            return TopK(*(field.to(device) for field in self.parent.predictions(index)))
        out = self.parent.model(**batch.inputs(), use_cache=False)
        return Head(out.last_hidden_state, self.parent.lm_head.weight)


@dataclass(frozen=True)
class AlignmentObjective:
    """Layer by layer: the input of the parent's layer should give the output of that layer.

    Every Mixture of Layers layer gets the parent's residual and learns the parent's next one. The
    loss of a layer is the squared error of its output relative to the squared norm of the parent's,
    mean over tokens; relative, since a norm follows before the residual is used. No gradient leaves
    a layer, and each is computed before the next layer runs, so the activations of one layer are
    held at a time.

    Attributes:
        student: the model that is trained.
        parent: the dense model.
        dtype: of matrix products; residuals are float32.
        balance_weight: of CV^2, for each layer and micro-batch.
        loads: counts the routing.
    """

    student: MoLForCausalLM
    parent: MoLForCausalLM
    dtype: torch.dtype
    balance_weight: float
    loads: RouterLoads

    metrics = ("loss", "balance")

    def backward(self, step: MicroBatches, accelerator: Accelerator) -> Tensor:
        """Add this rank's part of the gradient of a step to the parameters' gradients.

        Returns:
            (4,) float32, this rank's part of the mean loss, 0, 0, and balance, means over layers.
        """
        ranks = accelerator.num_processes
        sums, layers = torch.zeros(4, device=accelerator.device), 0
        for _, batch in step.batches:
            for error, balance in self._layers(batch):
                error, balance = error / step.tokens, balance / (len(step) * ranks)
                loss = error + self.balance_weight * balance
                (loss * ranks).backward()  # FSDP2 averages over ranks; this is a sum
                sums[0] += loss.detach()
                sums[3] += balance.detach()
                layers += 1
        return sums / (layers / len(step))

    @torch.no_grad()
    def losses_are_finite(self, step: MicroBatches, accelerator: Accelerator) -> bool:
        """Run this rank's part of a step without gradients and check its losses."""
        total = torch.zeros((), device=accelerator.device)
        for _, batch in step.batches:  # no early exit: all ranks must run the same layers
            for error, balance in self._layers(batch):
                total += error + balance
        return bool(total.isfinite())

    def _layers(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the loss of each Mixture of Layers layer, summed over tokens, and its CV^2."""
        device = batch.input_ids.device
        context = token_context(
            self.student.config,
            batch.document_ids,
            batch.position_ids,
            device,
            batch.attention_mask,
        )
        with torch.no_grad():
            forward = context.forward_context()
            x = context.stream.flatten(self.parent.model.embed_tokens(batch.input_ids)).float()
        num_routed = 0  # layers so far that route
        pairs = zip(self.parent.model.layers, self.student.model.layers, strict=True)
        for dense, layer in pairs:
            with torch.no_grad(), _autocast(device, self.dtype):
                target = dense(x, forward)[0]
            if isinstance(layer, ConvertedLayer):
                with _autocast(device, self.dtype):
                    out, routing = layer(x, forward)
                balance = out.new_zeros(())
                if routing is not None:
                    self.loads.add(routing.blocks[None], num_routed)
                    num_routed += 1
                    balance = cv_squared(routing.weights, routing.blocks, routing.logits.shape[1])
                yield ((out - target).square().sum(-1) / target.square().sum(-1)).sum(), balance
            x = target


Objective = PredictionObjective | AlignmentObjective


def check_alignable(student: MoLForCausalLM, parent: MoLForCausalLM) -> None:
    """Check that each layer of the student corresponds to one of the parent's.

    Raises:
        MolError: if number, width or head size of the layers differ.
    """
    for name in ("num_hidden_layers", "hidden_size", "head_dim"):
        found, wanted = getattr(parent.config, name), getattr(student.config, name)
        if found != wanted:
            raise MolError(
                f"layers cannot be aligned: `{name}` is {found} in the parent, {wanted} in the "
                "model",
                allowed="the parent that the model was converted from",
            )


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast matrix products to `dtype`; does nothing for float32."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype if low else None, enabled=low)
