"""A run's folder: who holds it, what is written to it and when, how a run is resumed.

    with open_run(run_dir, resume, tensorboard) as run:     locked; latest.pth is read
        config = run.resumed_config(given)
        run.restore(config, state)                          ... and let go of
        run.begin(state, total_steps, num_images)
        ...                   each step: grid_is_due, save_grid, write_row, save_if_due
        return run.end(state, total_steps, stop.number)

Of torchrun's processes the first one alone touches a file here, or says a word.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from config import FIXED, Config
from utils.checkpoint import (
    NAMES,
    checkpoints_in,
    does_not_fit_error,
    is_finite,
    is_of_step,
    load_checkpoint,
    read_config,
    save_checkpoint,
    tensors_of,
)
from utils.cli import UserError, is_first_process, say, warn
from utils.files import locked, make_writable, remove_left_overs
from utils.metrics import MetricsFile, not_finite_error
from utils.pictures import save_png
from utils.process import broadcast, from_first_process

MOST_KEPT = 20  # a run of few images has many epochs
ONLY_IN_LATEST = {"model", "optimizer", "scaler", "sums", "images_seen"}


class State(Protocol):
    """What a run's folder needs of train.py's TrainingState."""

    step: int
    images_seen: int
    ema: nn.Module
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, content: dict[str, Any]) -> None: ...


@contextmanager
def open_run(run_dir: str, resume: bool, tensorboard: bool) -> Iterator["RunFolder"]:
    """The run in run_dir, held against other processes inside.

    Raises UserError if it is held already, or if starting would write over a run.
    """
    run = RunFolder(Path(run_dir), tensorboard)
    with run.held():
        run.read(resume)
        yield run


def first_process_only(method: Callable) -> Callable:
    """The method in the first of torchrun's processes; in the others it returns None at once."""
    @wraps(method)
    def wrapper(*args: Any) -> Any:
        return method(*args) if is_first_process() else None
    return wrapper


class RunFolder:
    """The files of a run, for methods that are called in the order in which they stand here."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.folder, self.tensorboard = folder, tensorboard
        self.checkpoints, self.samples = folder / "checkpoints", folder / "samples"
        self.latest = self.checkpoints / "latest.pth"
        self.final = self.checkpoints / "final_model.pth"
        self.metrics_csv = folder / "metrics.csv"
        self.unwritten: set[Path] = set()  # what the disk refused

    # Opening

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folders and hold their lock inside; what is refused there leaves none behind."""
        if not is_first_process():
            yield
            return
        folders = (self.samples, self.checkpoints, self.folder)  # an inner one before its outer one
        made_here = [folder for folder in folders if not folder.exists()]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with locked(self.checkpoints):
            try:
                yield
            except BaseException:
                for folder in made_here:
                    with suppress(OSError):  # it is not empty
                        folder.rmdir()
                raise

    def read(self, resume: bool) -> None:
        """Read latest.pth; the other processes are told its config alone."""
        self.saved = self.content_to_resume(resume) or {}
        self.is_new, self.saved_config = from_first_process(
            lambda: (not self.saved, self.saved.get("config")))

    @first_process_only
    def content_to_resume(self, resume: bool) -> dict[str, Any]:
        """What latest.pth holds, {} to start anew.

        Raises UserError if that would write over a run.
        """
        if resume and self.latest.exists():
            content = load_checkpoint(self.latest)
            if missing := ONLY_IN_LATEST - content.keys():
                raise UserError(f"{self.latest} cannot be resumed from: it lacks "
                                f"{', '.join(sorted(missing))}")
            return content
        if checkpoints_in(self.checkpoints):
            holds = "already holds a run: go on with --resume, or"
            if resume:
                holds = "holds checkpoints but no latest.pth to resume from:"
            raise UserError(f"{self.folder} {holds} choose another --run_dir")
        if self.metrics_csv.exists():
            raise UserError(f"{self.folder} holds a metrics.csv but no run to resume: move it "
                            "away, or choose another --run_dir")
        return {}

    def resumed_config(self, given: dict[str, Any]) -> Config | None:
        """The settings of latest.pth, changed by the flags given; None if there is no run yet.

        Raises UserError if they cannot be.  A preset counts for a new run only.
        """
        if self.is_new:
            return None
        saved = read_config({"config": self.saved_config}, self.latest)
        before = asdict(saved)
        if refused := [f"{name} {before[name]} -> {given[name]}" for name in FIXED
                       if name in given and given[name] != before[name]]:
            raise UserError("the checkpoint is of another network or diffusion: "
                            f"{'; '.join(refused)}; leave these flags out, or choose another "
                            "--run_dir")
        try:
            config = Config(**{**before, **given, "run_dir": str(self.folder)})
        except ValueError as error:
            raise UserError(f"with the settings of the checkpoint, {error}") from error
        after = asdict(config)
        changes = [f"{name} {before[name]} -> {after[name]}" for name in before
                   if before[name] != after[name] and name != "run_dir"]
        if changes:
            say(f"resuming with changed settings: {'; '.join(changes)}")
        return config

    def restore(self, config: Config, state: State) -> None:
        """Put what was saved, if anything was, into the state of every process, and let go of it.

        It is as large as the state itself.  Raises UserError if it is of another network.
        """
        if self.saved:
            try:
                state.load_state_dict(self.saved)
            except Exception as error:  # what does not fit can raise anything
                raise does_not_fit_error(self.latest, error) from error
        if not self.is_new:
            state.step, state.images_seen, scaler = from_first_process(
                lambda: (state.step, state.images_seen, state.scaler.state_dict()))
            state.scaler.load_state_dict(scaler)
            content = state.state_dict()
            del content["sums"]  # which are added up over the processes: once is enough
            broadcast(tensors_of(content))
        self.saved = {}
        self.config, self.first_step = config, state.step

    def is_finished(self, step: int, total_steps: int) -> bool:
        """Whether nothing is left to train, to draw or to write: rank 0 alone sees the files."""
        finished = from_first_process(
            lambda: step >= total_steps and not self.grid_is_due(step)
            and is_of_step(self.final, total_steps))
        if finished:
            say(f"already finished: {self.final}")
        return finished

    # While it runs

    @first_process_only
    def begin(self, state: State, total_steps: int, num_images: int) -> None:
        """Clear away what a killed run left behind, and read the rows of metrics.csv up to here.

        A new run saves latest.pth, so that from now on --resume finds one.  Raises OSError if a
        folder cannot be written, before the work.
        """
        for folder in (self.folder, self.checkpoints, self.samples):
            make_writable(folder / "trial")
        remove_left_overs(self.checkpoints, NAMES)
        remove_left_overs(self.samples, r"sample_step_\d+\.png")
        remove_left_overs(self.folder, r"metrics\.csv")
        self.rows = MetricsFile(self.metrics_csv, state.step, self.tensorboard)
        if self.is_new:
            self.save_latest(state)
        self.last_save = time.monotonic()
        images_ahead = (total_steps - state.step) * self.config.batch_size
        total_epochs = (state.images_seen + images_ahead) // num_images
        self.epochs_between = epochs_between_kept(self.config.save_every, total_epochs)
        self.num_images = num_images

    @first_process_only
    def grid_is_due(self, step: int) -> bool:
        """Whether this step has a grid; the step resumed from, only if it is missing."""
        if step == 0 or not self.config.sample_every or step % self.config.sample_every:
            return False
        return step > self.first_step or not self.grid_path(step).exists()

    def grid_path(self, step: int) -> Path:
        return self.samples / f"sample_step_{step}.png"

    @first_process_only
    def save_grid(self, picture: Image.Image | None, step: int) -> None:
        if picture is not None:  # as it is if a signal came
            self.write(self.grid_path(step), partial(save_png, picture))

    @first_process_only
    def write_row(self, row: dict[str, float]) -> None:
        self.rows.add(row)
        self.write(self.metrics_csv, self.rows.save)

    @first_process_only
    def save_if_due(self, state: State) -> None:
        epoch = self.kept_epoch(state.images_seen)
        # First latest.pth, which a disk that fills up must not refuse for want of room.
        if epoch or time.monotonic() - self.last_save >= 60 * self.config.save_minutes:
            self.save_latest(state)
            self.last_save = time.monotonic()
        if epoch:
            self.save_weights(state, self.checkpoints / f"checkpoint_epoch_{epoch}.pth")

    def kept_epoch(self, images_seen: int) -> int:
        """The epoch with a checkpoint to be kept that ended with the last step; 0 if none did."""
        if not self.epochs_between:
            return 0
        images_between = self.epochs_between * self.num_images
        before = (images_seen - self.config.batch_size) // images_between
        now = images_seen // images_between
        return now * self.epochs_between if now > before else 0

    def end(self, state: State, total_steps: int, signal: int) -> int:
        """Save everything, say where it is, and return the exit status."""
        finished = state.step == total_steps
        self.save_the_last(state, total_steps, finished)
        if not finished:
            return 128 + signal
        return 1 if self.unwritten & {self.latest, self.final, self.metrics_csv} else 0

    @first_process_only
    def save_the_last(self, state: State, total_steps: int, finished: bool) -> None:
        self.save_latest(state)
        if finished:
            self.save_weights(state, self.final)
        if self.metrics_csv.exists() or self.metrics_csv in self.unwritten:
            # Once more: a full disk refused its last row, or it still has rows beyond this step.
            self.write(self.metrics_csv, self.rows.save)
        path = self.final if finished else self.latest
        where = f"{path} could not be written" if path in self.unwritten else f"{path}"
        if finished:
            say(f"finished {state.step:,} steps: {where}")
        else:
            say(f"stopped after {state.step:,} of {total_steps:,} steps: {where}; the same "
                "command with --resume goes on")

    # Writing

    def save_latest(self, state: State) -> None:
        self.save(state.state_dict(), self.latest)

    def save_weights(self, state: State, path: Path) -> None:
        self.save({"step": state.step, "ema": state.ema.state_dict()}, path)

    def save(self, content: dict[str, Any], path: Path) -> None:
        if not is_finite(content):
            raise not_finite_error(content["step"])
        content = {"config": asdict(self.config), **content}
        self.write(path, partial(save_checkpoint, content))

    def write(self, path: Path, save: Callable[[Path], None]) -> None:
        """Call save(path); warn and go on if the disk refuses.

        The next save of that path is the next try; a grid or a kept checkpoint has none.
        """
        try:
            save(path)
            self.unwritten.discard(path)
        except OSError as error:
            self.unwritten.add(path)
            warn(f"{path} could not be written ({error}); what was there before is still there")


def epochs_between_kept(save_every: int, total_epochs: int) -> int:
    """The least multiple of save_every of which a run keeps at most MOST_KEPT checkpoints.

    It is 0 if save_every is.
    """
    if not save_every:
        return 0
    multiple = total_epochs // ((MOST_KEPT + 1) * save_every) + 1
    return multiple * save_every
