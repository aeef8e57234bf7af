"""Summary below a table of what a method uses besides truncated BPTT: learnt, conditioned on, remembered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def used_by(config: Mapping[str, Any]) -> str | None:
    """What the method of a run's configuration uses, in words; None for a net that is not recurrent."""
    if "bptt" not in config:
        return None
    found = []
    if config.get("dni"):
        known = re.fullmatch(r"next-tokens:(\d+)(:.*)?", config["context"])
        other = {"none": "unconditioned"}.get(config["context"], f"conditioned on {config['context']}")
        found.append(f"a learnt M, {f'conditioned on the next {known[1]} symbols' if known else other}")
    if config.get("lookahead"):
        found.append(f"the next {config['lookahead']} symbols")
    if config.get("trace"):
        found.append(f"a trace of {'all earlier' if config['trace'] == 'all' else config['trace']} steps")
    return ", and ".join(found) or "nothing"


def summary_text(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for a table, or nothing if no cell is recurrent."""
    cells: dict[str, list[str]] = {}
    for name, rows in groups.items():
        used = used_by(rows[0]["config"]) if rows else None
        if used is not None:
            cells.setdefault(used, []).append(f"`{name}`")
    if not cells:
        return ""
    each = "; ".join(f"{used}: {', '.join(names)}" for used, names in cells.items())
    return f"What a cell uses besides truncated BPTT at this T — {each}.\n"
