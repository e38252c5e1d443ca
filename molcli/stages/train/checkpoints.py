"""Checkpoints of a run: which run they belong to, how they are written, read and removed.

A run keeps the newest two in OUT/checkpoints/step-N. One process writes its tensors to state.pt;
several write the files of torch.distributed.checkpoint, and their random states, which are the same
on all ranks, to generators.pt. progress.json has the counters and the identity. Any number of
processes reads either.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils._pytree import tree_leaves

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.errors import MolError
from molcli.files.folders import output_folder, staging_folder
from molcli.stages.train.distributed import first_error, is_sharded, local_shard
from molcli.stages.train.state import TrainState

DATA = "the data"  # key of an identity: the fingerprint of the current stage's rows
# Settings that may differ between a run and its resumption: they change nothing that is trained,
# or only the order of sums, as another number of processes or compiled code does (and the number of
# rows over which CV^2 is computed).
_FREE_SETTINGS = (
    *("data", "logits", "checkpoint_every", "log_every", "max_skipped", "trackers"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "sharding"),
)
_NUM_KEPT = 2
_TENSORS, _GENERATORS, _PROGRESS = "state.pt", "generators.pt", "progress.json"
_UNREADABLE = (pickle.UnpicklingError, CheckpointException)  # the latter is no Exception


@dataclass(frozen=True)
class Checkpoint:
    """A saved state, its tensors not read yet.

    Attributes:
        folder: of this checkpoint.
        counters: the numbers of its TrainState.
        identity: of the run that wrote it.
    """

    folder: Path
    counters: dict[str, Any]
    identity: dict[str, Any]


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
            f"{key} was {saved.get(key)} and is {identity.get(key)}"
            if key.startswith("`")
            else f"{key} was another one"
            for key in changed
        )
        raise MolError(
            f"{checkpoint.folder} belongs to another run: {what}",
            allowed="the recipe, data, checkpoint and parent that the run began with",
            hint="the same command as before with --resume, or another output folder",
        )


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `folder`, None if there is none.

    Raises:
        MolError: if it is damaged.
    """
    folders = sorted(folder.glob("step-*"))
    if not folders:
        return None
    try:
        progress = json.loads((folders[-1] / _PROGRESS).read_text())
        return Checkpoint(folders[-1], progress["state"], progress["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folders[-1], error) from error


def describe_newest(folder: Path) -> str:
    """Name the newest checkpoint in words.

    Every checkpoint is good to resume from: a step that is not finite changes nothing.
    """
    folders = sorted(folder.glob("step-*"))
    return str(folders[-1]) if folders else "the beginning: no checkpoint was written yet"


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load tensors, random states and counters, whichever number of processes wrote them.

    Raises:
        MolError: if the tensors cannot be read.
    """
    folder = checkpoint.folder
    single = folder / _TENSORS
    parameter = next(state.model.parameters())
    try:
        tensors = torch.load(
            single if single.is_file() else folder / _GENERATORS,
            map_location="cpu",
            mmap=is_sharded(parameter),  # each rank reads only its shards
            weights_only=True,
        )
        if single.is_file():
            state.load_unsharded(tensors)
        else:
            # In place: these are the parameters, buffers and moments themselves.
            with warnings.catch_warnings():  # that one process reads, which is intended
                warnings.simplefilter("ignore")
                load(state.tensors_by_name(), checkpoint_id=folder)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, *_UNREADABLE) as error:
        raise _damaged(folder, error) from error
    torch.set_rng_state(tensors["rng"])
    # Another number of GPUs is no reason to stop: nothing in training draws from their generators.
    if parameter.is_cuda and len(tensors["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tensors["cuda_rng"])
    state.restore_counters(checkpoint.counters)


class Saver(Protocol):
    """Writes checkpoints. Every rank makes one and calls the same methods at the same steps."""

    folder: Path

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        """Save the state to folder/step-N, which appears when it is complete; keep the newest two.

        Raises:
            MolError: on all ranks, if it or the one before cannot be written.
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


class SingleProcessSaver:
    """Saver of one process: `save` returns when the checkpoint is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        path = _step_folder(self.folder, state)
        if path.is_dir():
            return
        tensors = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            **_random_states(),
        }
        need = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        try:
            with output_folder(path, need_bytes=need) as staging:
                torch.save(tensors, staging / _TENSORS)
                (staging / _PROGRESS).write_text(_progress_json(state, identity))
        # torch reports a full disk as a RuntimeError of its zip writer.
        except (OSError, RuntimeError, MolError) as error:
            found = error.found if isinstance(error, MolError) else str(error)
            raise _not_writable(path, found) from error
        _remove_old(self.folder)

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
        self._path, self._step = _step_folder(self.folder, state), state.step
        tensors = state.tensors_by_name()
        own_bytes = sum(local_shard(tensor).nbytes for tensor in tensors.values())
        sizes = torch.tensor([own_bytes], device=self.accelerator.device)
        need = int(self.accelerator.gather(sizes).sum())
        staging, publish, message = staging_folder(self._path), ExitStack(), ""
        if self.accelerator.is_main_process:
            publish.callback(_remove_old, self.folder)  # runs last
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
            small_files = _random_states(), _progress_json(state, identity)
            complete = partial(_write_small_files, staging, *small_files)
            self._writing = _publish_after(written, publish, complete)

    def finish(self) -> None:
        if self._writing is None:
            return
        message = ""
        try:
            self._writing.result()
        except (Exception, CheckpointException) as error:
            message = _cause(error)
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


def _write_small_files(folder: Path, random_states: dict[str, Any], progress: str) -> None:
    torch.save(random_states, folder / _GENERATORS)
    (folder / _PROGRESS).write_text(progress)


def _cause(error: BaseException) -> str:
    """In words; a CheckpointException holds an exception and its traceback for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error)


def _step_folder(folder: Path, state: TrainState) -> Path:
    return folder / f"step-{state.step:08d}"


def _progress_json(state: TrainState, identity: dict[str, Any]) -> str:
    return json.dumps({"state": state.counters(), "identity": identity})


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def _remove_old(folder: Path) -> None:
    for old in sorted(folder.glob("step-*"))[:-_NUM_KEPT]:
        shutil.rmtree(old)


def _not_writable(path: Path, found: str) -> MolError:
    return MolError(
        f"the checkpoint {path} could not be written: {found}",
        allowed="a disk with room for three times the weights",
        hint=f"free some space, then the same command with --resume, which continues from "
        f"{describe_newest(path.parent)}",
    )


def _damaged(folder: Path, error: BaseException) -> MolError:
    return MolError(
        f"the checkpoint {folder} cannot be read: {error}",
        allowed="a complete checkpoint",
        hint=f"remove {folder}; --resume then continues from the one before it",
    )
