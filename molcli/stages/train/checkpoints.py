"""Checkpoints of a run: which run they belong to, and how they are written.

A run keeps the newest two (`checkpoint_folder`). One process writes its tensors to state.pt;
several write the files of torch.distributed.checkpoint, and their random states, which are the same
on all ranks, to generators.pt. Any number of processes reads either (`checkpoint_reader`).
"""

import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils._pytree import tree_leaves

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.errors import MolError
from molcli.files.folders import output_folder, staging_folder
from molcli.files.json_files import shortened
from molcli.stages.train.checkpoint_folder import (
    GENERATORS,
    TENSORS,
    Checkpoint,
    describe_newest,
    remove_old,
    step_folder,
    write_progress,
    write_sums,
)
from molcli.stages.train.checkpoint_reader import describe
from molcli.stages.train.distributed import first_error, local_shard
from molcli.stages.train.nonfinite import first_nonfinite
from molcli.stages.train.optimizer import is_new
from molcli.stages.train.state import TrainState, in_words

DATA = "the data"  # key of an identity: the fingerprint of the current stage's rows
# Settings that may differ between a run and its resumption: they change nothing that is trained,
# or only the order of sums, as another number of processes or compiled code does (and the number of
# rows over which CV^2 is computed).
_FREE_SETTINGS = (
    # The fingerprint of the data tells other repeats from the same ones.
    *("data", "repeats", "logits", "checkpoint_every", "log_every", "max_skipped", "trackers"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "sharding"),
)
_SHOWN = 8  # differences between two runs, in a message


def run_identity(
    config: TrainConfig, stages: list[Stage], *, checkpoint: str, parent: str
) -> dict[str, Any]:
    """Collect what a resumed run must have in common with the one that it continues.

    Args:
        config: the train section.
        stages: of `config`.
        checkpoint: fingerprint of the model that the run begins with.
        parent: fingerprint of the parent or of its cached logits, "" for none.

    Returns:
        Plain JSON values.
    """
    identity: dict[str, Any] = {"the checkpoint": checkpoint, "the parent": parent}
    for number, stage in enumerate(stages):
        name = section(config, number)
        identity[f"`{name}.kind`"] = stage.kind
        settings = asdict(replace(stage.settings, stages=None))
        identity |= {f"`{name}.{k}`": v for k, v in settings.items() if k not in _FREE_SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def check_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        checkpoint: to resume from.
        identity: of this run; data is compared only if it has the key `DATA`.

    Raises:
        MolError: if recipe, model, parent or data differ.
    """
    saved = checkpoint.identity
    keys = [key for key in {**saved, **identity} if key != DATA or DATA in identity]
    changed = [key for key in keys if saved.get(key) != identity.get(key)]
    if changed:
        what = "; ".join(
            f"{shortened(key)} was {shortened(saved.get(key))} and is {identity.get(key)}"
            if key.startswith("`")
            else f"{shortened(key)} was another one"
            for key in changed[:_SHOWN]
        )
        raise MolError(
            f"{checkpoint.folder} belongs to another run: {what}",
            allowed="the recipe, data, checkpoint and parent that the run began with",
            hint="the same command as before with --resume, or another output folder",
        )


class Saver(Protocol):
    """Writes checkpoints. Every rank makes one and calls the same methods at the same steps."""

    folder: Path

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        """Save the state to folder/step-N, which appears when it is complete; keep the newest two.

        Does nothing for the step of the last call.

        Raises:
            MolError: on all ranks, if a value of the state is not finite, or if this checkpoint or
                the one before cannot be written.
        """

    def finish(self) -> None:
        """Wait until everything that was saved is on the disk.

        Raises:
            MolError: on all ranks, if it cannot be written; earlier checkpoints stay.
        """


def make_saver(accelerator: Accelerator, folder: Path) -> Saver:
    """Make the saver for this number of processes."""
    several = accelerator.num_processes > 1
    return BackgroundSaver(accelerator, folder) if several else SingleProcessSaver(folder)


def refuse_nonfinite(
    state: TrainState, checkpoints: Path, accelerator: Accelerator | None = None
) -> None:
    """Check that every value of the state is finite. Collective if there are several ranks.

    A step with finite gradients can still overflow, and every checkpoint after it would be lost.

    Args:
        state: of the run.
        checkpoints: folder of its checkpoints, for the message.
        accelerator: of several ranks.

    Raises:
        MolError: on all ranks, if a value is not.
    """
    name = first_nonfinite(state.existing_tensors(), accelerator)
    if not name:
        return
    kind, parameter = name.split(".", 1)
    rate = "train.new_learning_rate" if is_new(parameter) else "train.learning_rate"
    cause = rate if kind == "model" else "train.clip_norm"
    raise MolError(
        f"after step {state.step}, {in_words(name)} are not finite: a step was too large",
        allowed="finite weights; nothing else is saved",
        hint=f"another output folder and a smaller {cause}; the last good checkpoint is "
        f"{describe_newest(checkpoints)}",
    )


class SingleProcessSaver:
    """Saver of one process: `save` returns when the checkpoint is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._step = folder, -1

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        if self._step == state.step:
            return
        refuse_nonfinite(state, self.folder)
        path = step_folder(self.folder, state.step)
        tensors = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            **_random_states(),
        }
        need = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        try:
            with output_folder(path, need_bytes=need) as staging:
                torch.save(tensors, staging / TENSORS)
                write_progress(staging, state.counters(), identity)
                write_sums(staging)
        # torch reports a full disk as a RuntimeError of its zip writer.
        except (OSError, RuntimeError, MolError) as error:
            found = error.found if isinstance(error, MolError) else str(error)
            if isinstance(error, RuntimeError) and "enforce fail" in found:
                found = "the disk took a part of it only"
            raise _not_writable(path, found) from error
        self._step = state.step
        remove_old(self.folder)

    def finish(self) -> None:
        pass


class BackgroundSaver:
    """Saver of several processes: `save` returns when a copy of the state is in memory."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder
        # A group of its own: its collectives must not mix with those of training.
        self._group = torch.distributed.new_group(backend="gloo")
        self._writing: Future[None] | None = None
        self._path, self._step = folder, -1

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        self.finish()
        if self._step == state.step:
            return
        tensors = state.tensors_by_name()
        refuse_nonfinite(state, self.folder, self.accelerator)
        self._path, self._step = step_folder(self.folder, state.step), state.step
        own_bytes = sum(local_shard(tensor).nbytes for tensor in tensors.values())
        sizes = torch.tensor([own_bytes], device=self.accelerator.device)
        need = int(self.accelerator.gather(sizes).sum())
        staging, publish, message = staging_folder(self._path), ExitStack(), ""
        if self.accelerator.is_main_process:
            publish.callback(remove_old, self.folder)  # runs last
            try:
                publish.enter_context(output_folder(self._path, need_bytes=need))
            except (OSError, MolError) as error:
                message = error.found if isinstance(error, MolError) else str(error)
        self._raise_first(message)
        # The copy to memory is made in this call. With copying ahead, the background thread, which
        # has no GPU of its own, would wait for the machine's first one, whichever this rank uses.
        writer = FileSystemWriter(staging, per_thread_copy_ahead=0)
        with closing(DefaultStager(StagingOptions(*[False] * 4))) as stager:
            written = async_save(
                tensors, storage_writer=writer, async_stager=stager, process_group=self._group
            )
        assert isinstance(written, Future)
        self._writing = written
        if self.accelerator.is_main_process:
            numbers = state.counters(), dict(identity)
            complete = partial(_write_small_files, staging, _random_states(), *numbers)
            self._writing = _publish_after(written, publish, complete)

    def finish(self) -> None:
        if self._writing is None:
            return
        message = ""
        try:
            self._writing.result()
        except (Exception, CheckpointException) as error:
            message = describe(error)
        self._writing = None
        self._raise_first(message)

    def _raise_first(self, message: str) -> None:
        message = first_error(message, self.accelerator)
        if message:
            raise _not_writable(self._path, message)


def _publish_after(
    written: "Future[Any]", publish: ExitStack, complete: Callable[[], None]
) -> "Future[None]":
    """Run `complete` inside `publish` after `written`, and return the future of that.

    `publish` is closed with the error if there is one. The future `written` of the main rank is
    done when all ranks have written.
    """
    published: Future[None] = Future()

    def run(done: "Future[Any]") -> None:
        try:
            with publish:
                done.result()
                complete()
        except BaseException as error:  # CheckpointException is no Exception
            published.set_exception(error)
        else:
            published.set_result(None)

    written.add_done_callback(run)
    return published


def _write_small_files(
    folder: Path,
    random_states: dict[str, Any],
    counters: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    torch.save(random_states, folder / GENERATORS)
    write_progress(folder, counters, identity)
    write_sums(folder)


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def _not_writable(path: Path, found: str) -> MolError:
    return MolError(
        f"the checkpoint {path} could not be written: {found}",
        allowed="a disk with room for three times the weights",
        hint=f"free some space, then the same command with --resume, which continues from "
        f"{describe_newest(path.parent)}",
    )
