"""Write a run's checkpoints, and know whether a run may resume from one."""

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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from molcli.config.sections import TrainConfig
from molcli.config.stages import Stage, section
from molcli.errors import MolError
from molcli.files.folders import output_folder, staging_folder
from molcli.stages.train.distributed import first_message, local
from molcli.stages.train.state import (
    GENERATORS,
    PROGRESS,
    Checkpoint,
    TrainState,
    generators,
    not_written,
    progress_text,
    remove_old,
    save_checkpoint,
    tensors_by_name,
)

DATA = "the data"  # of the stage at hand: its rows' fingerprint
# What may differ between a run and its resumption: it changes nothing that is trained, or only the
# order of sums, as another number of processes or compiled code does (and over how many rows CV^2
# is taken).
_FREE_SETTINGS = (
    *("data", "logits", "checkpoint_every", "log_every", "max_skipped", "trackers"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "sharding"),
)


def run_identity(
    config: TrainConfig, stages: list[Stage], *, checkpoint: str, parent: str
) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues, as plain JSON values.

    checkpoint, parent: fingerprints of the two models; the parent's may be its cached logits'.
    """
    identity: dict[str, Any] = {"the checkpoint": checkpoint, "the parent": parent}
    for number, stage in enumerate(stages):
        name = section(config, number)
        identity[f"`{name}.kind`"] = stage.kind
        settings = asdict(replace(stage.settings, stages=None))
        identity |= {f"`{name}.{k}`": v for k, v in settings.items() if k not in _FREE_SETTINGS}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def refuse_another_run(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Raises MolError if the checkpoint belongs to another recipe, model or parent; with the key
    `DATA` in `now`, or to other data."""
    then = checkpoint.identity
    keys = [key for key in {**then, **now} if key != DATA or DATA in now]
    changed = [key for key in keys if then.get(key) != now.get(key)]
    if changed:
        what = "; ".join(
            f"{key} was {then.get(key)} and is {now.get(key)}"
            if key.startswith("`")
            else f"{key} was another one"
            for key in changed
        )
        raise MolError(
            f"{checkpoint.folder} belongs to another run: {what}",
            allowed="the recipe, data, checkpoint and parent that the run began with",
            hint="the same command as before with --resume, or another output folder",
        )


class Saver(Protocol):
    """Every rank makes one of its kind and calls the same methods at the same steps."""

    folder: Path

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        """Takes the state down, to appear as folder/step-N once it is there as a whole; the newest
        KEPT stay. Raises MolError, on all ranks, if it or the one before cannot be written."""

    def finish(self) -> None:
        """Waits until what was saved is there. Raises MolError, on all ranks, if it is not to be:
        the checkpoints before it still are."""


def open_saver(accelerator: Accelerator, folder: Path) -> Saver:
    """The kind that this number of processes needs."""
    several = accelerator.num_processes > 1
    return _SharedSaver(accelerator, folder) if several else _OwnSaver(folder)


class _OwnSaver:
    """Of one process: `save` returns when the checkpoint is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        save_checkpoint(state, self.folder, identity)

    def finish(self) -> None:
        pass


class _SharedSaver:
    """Of several processes: `save` returns when there is a copy of the state in memory."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder
        # The training's own collectives must not meet those of the background.
        self._group = torch.distributed.new_group(backend="gloo")
        self._writing: Future[None] | None = None
        self._step = -1

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        self.finish()
        if self._step == state.step:
            return
        self._step = state.step
        path = self.folder / f"step-{state.step:08d}"
        tensors = tensors_by_name(state.model, state.optimizer)
        mine = sum(local(tensor).nbytes for tensor in tensors.values())
        sizes = torch.tensor([mine], device=self.accelerator.device)
        need = int(self.accelerator.gather(sizes).sum())
        staging, publish, message = staging_folder(path), ExitStack(), ""
        if self.accelerator.is_main_process:
            publish.callback(remove_old, self.folder)  # last of all
            try:
                publish.enter_context(output_folder(path, need_bytes=need))
            except (OSError, MolError) as error:
                message = error.found if isinstance(error, MolError) else str(error)
        self._raise(message, path)
        # The copy is made here and now. Reading ahead, the background, which has no GPU of its own,
        # would wait for the first one of the machine, whichever is this rank's.
        writer = FileSystemWriter(staging, per_thread_copy_ahead=0)
        with closing(DefaultStager(StagingOptions(*[False] * 4))) as stager:
            written = async_save(
                tensors, storage_writer=writer, async_stager=stager, process_group=self._group
            )
        assert isinstance(written, Future)
        self._writing = written
        if self.accelerator.is_main_process:
            beside = generators(), progress_text(state, identity)
            self._writing = _then(written, publish, partial(_write_beside, staging, *beside))

    def finish(self) -> None:
        if self._writing is None:
            return
        message = ""
        try:
            self._writing.result()
        except (Exception, CheckpointException) as error:
            message = _cause(error)
        self._writing = None
        self._raise(message, self.folder / f"step-{self._step:08d}")

    def _raise(self, message: str, path: Path) -> None:
        message = first_message(message, self.accelerator)
        if message:
            raise not_written(path, message)


def _write_beside(folder: Path, generators: dict[str, Any], progress: str) -> None:
    torch.save(generators, folder / GENERATORS)
    (folder / PROGRESS).write_text(progress)


def _then(
    written: "Future[Any]", publish: ExitStack, complete: Callable[[], None]
) -> "Future[None]":
    """Done when, after `written`, `complete` has run inside `publish`, which is closed with the
    error if there is one.

    The first rank's `written` is done when all ranks have written.
    """
    published: Future[None] = Future()

    def end(done: "Future[Any]") -> None:
        try:
            with publish:
                done.result()
                complete()
        except BaseException as error:  # CheckpointException is no Exception
            published.set_exception(error)
        else:
            published.set_result(None)

    written.add_done_callback(end)
    return published


def _cause(error: BaseException) -> str:
    """In words; a CheckpointException holds an exception and its traceback for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error)
