"""One setting of Config: what declares it, and what checks a value of it.

    dim: int = fixed(64, "base width", 4, 4096)
    value = checked(field_of_dim, value)      raises ValueError: dim=3 is impossible ...
"""

from collections.abc import Iterable
from dataclasses import Field, field
from functools import partial
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any


def setting(
    default: Any, help: str, least: float = 0, most: float = 1e9, choices: tuple[Any, ...] = (),
    fixed: bool = False, heading: str = "",
) -> Any:
    """Declare a field of Config.  A heading stands above it, and those after it, in --help."""
    return field(default=default, metadata={
        "help": help, "least": least, "most": most, "choices": choices, "fixed": fixed,
        "heading": heading})


# Declares a setting that defines the weights or the diffusion: a resumed run cannot change it.
fixed = partial(setting, fixed=True)


def require(name: str, value: Any, holds: bool, remedy: str) -> None:
    """Raise ValueError unless it holds, with what works instead."""
    if not holds:
        raise ValueError(f"{name}={value!r} is impossible: {remedy}")


def checked(f: Field, value: Any) -> Any:
    """The value as a file can hold it: NumPy's numbers become Python's, and a path its name.

    Raises ValueError if it is of another type, out of bounds or none of the choices.
    """
    kind, choices = type(f.default), f.metadata["choices"]
    if choices:
        known = value in choices
        require(f.name, value, known, f"choose from {', '.join(map(str, choices))}")
        return choices[choices.index(value)]
    if kind is bool:
        require(f.name, value, isinstance(value, bool), "it must be a bool")
        return value
    if kind is str:
        require(f.name, value, isinstance(value, (str, PathLike)), "it must be a str")
        return str.__str__(fspath(value))  # the string itself, also of an Enum
    if kind is tuple:
        require(f.name, value, isinstance(value, Iterable), "it must be a list of numbers")
        return tuple(checked_number(f, value, number, int) for number in value)
    return checked_number(f, value, value, kind)


def checked_number(f: Field, value: Any, number: Any, kind: type) -> int | float:
    """One number of the value, as a Python number of that kind."""
    least, most = f.metadata["least"], f.metadata["most"]
    abstract, word = (Integral, "whole number") if kind is int else (Real, "number")
    is_number = isinstance(number, abstract) and not isinstance(number, bool)
    in_bounds = is_number and least <= kind(number) <= most
    require(f.name, value, in_bounds,
            f"it must be a {word} of at least {least} and at most {most:,.10g}")
    return kind(number)
