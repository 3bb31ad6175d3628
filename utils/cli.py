"""What makes a file a script: its flags, its one-line errors, its progress bar, how it ends."""

import argparse
import errno
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import PRESETS, Config


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """tqdm, lively on a terminal and sparing in a log file."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(*arguments, mininterval=seconds, **options)


class UserError(Exception):
    """Something that the user can mend; the scripts show its one line and exit with status 1."""


def under_torchrun() -> bool:
    """Whether torchrun started this process: some of its variables may be left from elsewhere."""
    variables = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return variables <= os.environ.keys()


def is_first_process() -> bool:
    """Of torchrun's processes, or the only one."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def warn(text: str) -> None:
    """A line on stderr, above the progress bar; of torchrun's processes, from the first one."""
    if is_first_process():
        tqdm.write(one_line(f"warning: {text}"), file=sys.stderr)


def one_line(message: Any) -> str:
    """Of a library's error, or around a file's name with a line break in it."""
    lines = str(message).splitlines()
    return " ".join(line.strip() for line in lines if line.strip())


def brief(error: Any) -> str:
    """The beginning of what a library says was wrong."""
    return one_line(error)[:200]


HEADINGS = {  # in --help: the first field of each group of Config
    "data": "data",
    "dim": "network",
    "timesteps": "diffusion",
    "batch_size": "training",
    "device": "where it runs",
    "run_dir": "what it writes",
}


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line and exit status 2."""

    def __init__(self, description: str, usage: str) -> None:
        super().__init__(
            description=description,
            usage=usage,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        if not is_first_process():
            sys.exit(2)  # every process of torchrun has the same command line: rank 0 says it
        line = one_line(f"{self.prog}: error: {message} (--help lists every flag)")
        self.exit(2, f"{line}\n")

    def add_number(
        self, flag: str, kind: type, help: str, least: float, most: float = 1e9,
        **options: Any,
    ) -> None:
        """A flag whose value, or each of whose values, must lie between least and most."""
        name = flag.removeprefix("--")

        def parse(text: str) -> Any:
            number = kind(text)
            if not least <= number <= most:  # not of a nan either
                raise argparse.ArgumentTypeError(
                    f"{name}={text} is impossible: it must be at least {least} and at most "
                    f"{most:,.10g}")
            return number

        parse.__name__ = kind.__name__  # argparse's own message has it: invalid int value
        options = {"metavar": "N" if kind is int else "X", **options}
        self.add_argument(flag, type=parse, help=help, **options)

    def add_settings(self) -> None:
        """A flag for --preset and one for every field of Config.

        A flag that is not given leaves no attribute.
        """
        self.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                          help="start from these settings instead; other flags override them")
        for f in fields(Config):
            if f.name in HEADINGS:
                group = self.add_argument_group(HEADINGS[f.name])
            default = f.default
            options: dict[str, Any] = {"default": argparse.SUPPRESS}
            if f.metadata["choices"]:
                options.update(choices=f.metadata["choices"], type=type(default))
            elif isinstance(default, bool):
                options.update(action=argparse.BooleanOptionalAction)
            elif isinstance(default, tuple):
                options.update(nargs="*", type=int, metavar="N")
                default = " ".join(map(str, default))
            else:
                metavars = {int: "N", float: "X", str: "NAME"}
                options.update(type=type(default), metavar=metavars[type(default)])
            help = f"{f.metadata['help']} (default: {default})"
            group.add_argument(f"--{f.name}", help=help, **options)

    def given_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of Config that flags name."""
        names = {f.name for f in fields(Config)}
        return {name: value for name, value in vars(args).items() if name in names}

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Those of the preset and the flags."""
        preset = PRESETS.get(getattr(args, "preset", ""), {})
        return {**preset, **self.given_settings(args)}

    def config(self, args: argparse.Namespace) -> Config:
        """The Config that they make; ends the script where it is impossible."""
        try:
            return Config(**self.settings(args))
        except ValueError as error:
            self.error(str(error))

    def refuse_without_effect(self, args: argparse.Namespace, where: str, *names: str) -> None:
        """Ends the script if a flag of these names, None unless given, was given."""
        for name in names:
            if getattr(args, name) is not None:
                self.error(f"--{name} has no effect {where}")


class Interrupted(BaseException):
    """SIGTERM or SIGHUP, where nothing has asked for another treatment: as KeyboardInterrupt is."""

    def __init__(self, number: int) -> None:
        self.number = number


# The terminal that is closed (SIGHUP, not on Windows) and the machine that goes down.
END_SIGNALS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
SIGNALS = [signal.SIGINT, *END_SIGNALS]


def interrupt(number: int, frame: Any) -> NoReturn:
    raise Interrupted(number)


def handle(number: int, handler: Any) -> None:
    """Unless whoever started this process had it ignore the signal, as nohup does."""
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a signal ends the process: while PyTorch waits for others, no handler would run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        handle(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """From now on SIGINT, SIGTERM and SIGHUP ask for an end after this step; number says which did.

    A second SIGINT or SIGTERM ends the process at once, unless torchrun started it: that one
    passes on to every process what each may have received itself.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in SIGNALS:
            handle(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        is_second = self.number > 0 and number in (signal.SIGINT, signal.SIGTERM)
        if is_second and not dist.is_initialized():
            os._exit(128 + number)
        self.number = number

    def requested(self) -> bool:
        """Whether any process was told to stop.

        Asked once per step by all of them, so that all of them stop after the same step.
        """
        if not dist.is_initialized():
            return self.number > 0
        shared = torch.tensor(self.number)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        if int(shared) > 0:  # a signal that came meanwhile counts at the next step, for all
            self.number = int(shared)
        return int(shared) > 0


class HarmlessStream:
    """Standard output or error whose reader may go away: what cannot be written is dropped.

    What its encoding lacks, as names of files may have, becomes backslashes and numbers.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or os.fdopen(open_nowhere(), "w")  # it is None where it was closed
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """All that is still to come, and what waits in the buffer, goes to nowhere."""
        os.dup2(open_nowhere(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def run(main: Callable[[], int]) -> NoReturn:
    """Call main and exit with its status; what the user can mend becomes one line and status 1."""
    sys.stdout, sys.stderr = HarmlessStream(sys.stdout), HarmlessStream(sys.stderr)
    for number in END_SIGNALS:
        handle(number, interrupt)
    warnings.showwarning = lambda message, *_: warn(str(message))
    status, problem = 1, ""
    try:
        status = main()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = describe_os_error(error)
    except (torch.OutOfMemoryError, MemoryError):
        problem = OUT_OF_MEMORY
    except RuntimeError as error:  # these two have no types of their own
        if "can't allocate memory" in str(error):
            problem = OUT_OF_MEMORY
        elif dist.is_initialized() and "connection" in str(error).lower():
            problem = PROCESS_ENDED
        else:
            raise
    except KeyboardInterrupt:
        status, problem = 128 + signal.SIGINT, INTERRUPTED
    except Interrupted as error:
        status, problem = 128 + error.number, INTERRUPTED
    finally:
        if dist.is_initialized():
            # Before PyTorch 2.6 destroy_process_group keeps the GIL, and waits for threads of gloo
            # that may need it once more.
            time.sleep(0.1)
            dist.destroy_process_group()
    if problem and not is_first_process():
        if problem in (INTERRUPTED, PROCESS_ENDED):
            problem = ""
        else:  # rank 0 has most likely said the same, and torchrun is about to end this process
            with ended_by_signals():
                time.sleep(10)
    if problem:
        line = one_line(f"{Path(sys.argv[0]).name}: error: {problem}")
        print(line, file=sys.stderr, flush=True)
    print(end="", flush=True)
    sys.exit(status)


INTERRUPTED = "interrupted: what was not finished is not kept"
PROCESS_ENDED = "another process has ended"
OUT_OF_MEMORY = ("out of memory: lower --batch_size, or to train, raise --grad_accum or lower "
                 "--dim or --image_size")


def describe_os_error(error: OSError) -> str:
    """One line: the file, what the system says of it, what to do."""
    remedies = {
        errno.ENOSPC: "free some space, or name another place",
        errno.EDQUOT: "free some space, or name another place",
        errno.EACCES: "allow it, or name another place",
        errno.EROFS: "name another place",
    }
    reason = error.strerror or str(error)
    remedy = remedies.get(error.errno, "try again, or name another one")
    return f"{error.filename or 'a file'}: {reason}: {remedy}"
