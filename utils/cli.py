"""The command line: flags from Config, errors of one line, the progress bar."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from tqdm import tqdm

from config import PRESETS, Config


class UserError(Exception):
    """Something that the user can mend; the scripts show its one line and exit with status 1."""


def under_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started.

    One variable alone may be left from elsewhere, and clusters set them for a single process too.
    """
    variables = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return variables <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def is_first_process() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def say(text: str) -> None:
    """Print the text, in the first of torchrun's processes."""
    if is_first_process():
        print(text)


def warn(text: str) -> None:
    """Write a line on stderr, above the progress bar, in the first of torchrun's processes."""
    if is_first_process() and sys.stderr is not None:
        tqdm.write(one_line(f"warning: {text}"), file=sys.stderr)


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """tqdm in the first of torchrun's processes, lively on a terminal and sparing in a log file."""
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)  # a notebook's may have none
    seconds = 0.5 if is_terminal() else 30
    hidden = not is_first_process() or sys.stderr is None
    return tqdm(*arguments, mininterval=seconds, disable=hidden, **options)


def one_line(message: Any) -> str:
    """The message joined into one line."""
    lines = str(message).splitlines()
    return " ".join(line.strip() for line in lines if line.strip())


def brief(error: Any) -> str:
    """The beginning of what a library says was wrong."""
    text = one_line(error)
    return text if len(text) <= 200 else f"{text[:200]} ..."


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
        parse = bounded(flag.removeprefix("--"), kind, least, most)
        options = {"metavar": "N" if kind is int else "X", **options}
        self.add_argument(flag, type=parse, help=help, **options)

    def add_settings(self) -> None:
        """A flag for --preset and one for every field of Config.

        A flag that is not given leaves no attribute.
        """
        self.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                          help="start from these settings instead; other flags override them")
        for f in fields(Config):
            if f.metadata["heading"]:
                group = self.add_argument_group(f.metadata["heading"])
            self.add_setting(f.name, group, default=argparse.SUPPRESS)

    def add_setting(self, name: str, group: Any = None, **options: Any) -> None:
        """Add the flag of one field of Config; options replace what Config says of it."""
        f = Config.__dataclass_fields__[name]
        kind, choices = type(f.default), f.metadata["choices"]
        default = " ".join(map(str, f.default)) if kind is tuple else f.default
        metavar = {int: "N", float: "X", str: "NAME", tuple: "N"}.get(kind)
        known: dict[str, Any] = {
            "default": f.default, "help": f"{f.metadata['help']} (default: {default})"}
        if choices:
            known.update(choices=choices, type=kind)
        elif kind is bool:
            known.update(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            known.update(nargs="*", type=int, metavar=metavar)
        elif kind is str:
            known.update(metavar=metavar)
        else:
            bounds = f.metadata["least"], f.metadata["most"]
            known.update(type=bounded(name, kind, *bounds), metavar=metavar)
        (group or self).add_argument(f"--{name}", **{**known, **options})

    def given_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of Config that flags name; --epochs counts, whatever a preset has."""
        given = {}
        for name, value in vars(args).items():
            if name in Config.__dataclass_fields__:
                given[name] = tuple(value) if isinstance(value, list) else value
        if "epochs" in given:
            given.setdefault("max_steps", 0)
        return given

    def settings_with_preset(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of Config that the preset or a flag names."""
        preset = PRESETS.get(getattr(args, "preset", ""), {})
        return {**preset, **self.given_settings(args)}

    def config(self, args: argparse.Namespace) -> Config:
        """Make the Config of the flags; end the script if it is impossible."""
        try:
            return Config(**self.settings_with_preset(args))
        except ValueError as error:
            self.error(str(error))

    def refuse_without_effect(self, args: argparse.Namespace, where: str, *names: str) -> None:
        """Ends the script if a flag of these names, None unless given, was given."""
        for name in names:
            if getattr(args, name) is not None:
                self.error(f"--{name} has no effect {where}")


def bounded(name: str, kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Return a parser of numbers within bounds, for argparse."""
    def parse(text: str) -> Any:
        number = kind(text)
        if not least <= number <= most:  # a nan is not either
            raise argparse.ArgumentTypeError(
                f"{name}={text} is impossible: it must be at least {least} and at most "
                f"{most:,.10g}")
        return number

    parse.__name__ = kind.__name__  # argparse's own message has it: invalid int value
    return parse
