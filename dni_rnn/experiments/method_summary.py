"""Summary below a table of what a method uses besides truncated BPTT: learnt, conditioned on, remembered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def sources_of(config: Mapping[str, Any]) -> str | None:
    """What the method of a run's configuration uses, in words; None for a net that is not recurrent."""
    if "bptt" not in config:
        return None
    found = []
    if config.get("dni"):
        known = re.fullmatch(r"next-tokens:(\d+)(:.*)?", config["context"])
        told = {"none": "unconditioned"}.get(config["context"], f"conditioned on {config['context']}")
        found.append(f"M, {f'conditioned on the next {known[1]} symbols' if known else told}, is learnt")
    if config.get("lookahead"):
        found.append(f"the next {config['lookahead']} symbols are known")
    if config.get("trace"):
        steps = "all steps before" if config["trace"] == "all" else f"{config['trace']} steps"
        found.append(f"{steps} are remembered")
    return " and ".join(found) or "nothing"


def sources_text(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for a table, or nothing if no cell is recurrent."""
    cells: dict[str, list[str]] = {}
    for name, rows in groups.items():
        said = sources_of(rows[0]["config"]) if rows else None
        if said is not None:
            cells.setdefault(said, []).append(f"`{name}`")
    if not cells:
        return ""
    each = "; ".join(f"{said}: {', '.join(names)}" for said, names in cells.items())
    return f"What there is beside truncated BPTT at this T — {each}.\n"
