"""What makes a file a script: its flags, its one-line errors, its progress bar, how it ends."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import PRESETS, Config

# Lively on a terminal, sparing in a log file.
progress_bar = partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)


class UserError(Exception):
    """Something that the user can mend; the scripts show its one line and exit with status 1."""


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
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def add_number(
        self, flag: str, kind: type, help: str, least: float, most: float = math.inf,
        **options: Any,
    ) -> None:
        """A flag whose value, or each of whose values, must lie between least and most."""
        name = flag.removeprefix("--")

        def parse(text: str) -> Any:
            number = kind(text)
            if not least <= number <= most:  # not of a nan either
                bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise argparse.ArgumentTypeError(
                    f"{name}={text} is impossible: it must be {bounds}")
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
            self.add_argument(f"--{f.name}", help=help, **options)

    def given_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of Config that the command line names, by its preset or by a flag."""
        names = {f.name for f in fields(Config)}
        flags = {name: value for name, value in vars(args).items() if name in names}
        preset = PRESETS.get(getattr(args, "preset", ""), {})
        return {**preset, **flags}

    def config(self, args: argparse.Namespace) -> Config:
        """The Config of the command line; ends the script where it is impossible."""
        try:
            return Config(**self.given_settings(args))
        except ValueError as error:
            self.error(str(error))

    def refuse_without_effect(self, args: argparse.Namespace, where: str, *names: str) -> None:
        """Ends the script if a flag of these names, None unless given, was given."""
        for name in names:
            if getattr(args, name) is not None:
                self.error(f"--{name} has no effect {where}")


class StopSignal:
    """SIGINT and SIGTERM: the first asks for an end after this step, a second ends the process now.

    number is that of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    def requested(self) -> bool:
        """Whether any process was told to stop.  Asked once per step by all of them, so that all of
        them stop after the same one."""
        if dist.is_initialized():
            shared = torch.tensor(self.number)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            self.number = int(shared)
        return self.number > 0


def run(main: Callable[[], int]) -> NoReturn:
    """Call main and exit with its status; what the user can mend becomes one line and status 1."""
    try:
        status = main()
    except UserError as error:
        status = f"{sys.argv[0]}: error: {error}"
    except (torch.OutOfMemoryError, MemoryError):
        status = out_of_memory()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no type of its own
            raise
        status = out_of_memory()
    except KeyboardInterrupt:
        status = 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)


def out_of_memory() -> str:
    return (f"{sys.argv[0]}: error: out of memory: lower --batch_size, or to train, raise "
            "--grad_accum or lower --dim or --image_size")
