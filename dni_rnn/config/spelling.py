"""Parsers of options that have a small grammar."""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from typing import Any

from dni_rnn.errors import UsageError


def flag(name: str) -> str:
    """The option of a setting: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


def parse_synthesizer(text: str) -> tuple[int | Fraction, ...]:
    """Widths of the hidden layers of `--synthesizer`: units, or a fraction of the width of the core.

        linear  |  mlp  |  mlp:WIDTH  |  mlp:WIDTH,WIDTH      WIDTH: units, 128, or a part, 1/4

    mlp alone is mlp:1/1, one hidden layer as wide as the core.
    """
    width = r"([1-9]\d*(?:/[1-9]\d*)?)"
    found = re.fullmatch(f"linear|mlp(?::{width}(?:,{width})?)?", text)
    widths = [Fraction(1)] if text == "mlp" else []
    if found is not None:
        widths += [Fraction(each) if "/" in each else int(each) for each in found.groups() if each]
    if found is None or any(isinstance(each, Fraction) and each > 1 for each in widths):
        raise UsageError(
            f"--synthesizer {text}: give linear, mlp, mlp:WIDTH or mlp:WIDTH,WIDTH; "
            "a WIDTH is a number of units or, as 1/4, a part of the core's"
        )
    return tuple(widths)


def parse_context(text: str) -> int:
    """W of `--context`: 0 for `none`, W for `next-tokens:W`."""
    found = re.fullmatch(r"none|next-tokens:([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"--context {text}: give none, or next-tokens:W with W at least 1")
    return int(found[1] or 0)


def parse_call(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments of `NAME,argument=value,...`; values are Python's, or text."""
    name, *given = text.split(",")
    options: dict[str, Any] = {}
    for each in given:
        argument, equals, value = each.partition("=")
        if not (equals and argument.isidentifier()):
            raise UsageError(f"{option} {text}: {each!r} is not argument=value")
        try:
            options[argument] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[argument] = value
    return name, options
