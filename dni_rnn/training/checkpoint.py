"""Checkpoints: one safetensors file, replaced whole or not at all. No pickle is read or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dni_rnn.atomic_files import write_atomically
from dni_rnn.errors import UsageError


def save_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Tensors by name, and JSON values in the file's header, atomically."""
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(flat, metadata={"values": json.dumps(values)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote.

    Raises:
      UsageError: there is no file, or it is not a whole checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, because where a tensor lies in the file decides its alignment in memory, and that the
            # order in which vectorised kernels add: without it, a resumed run would differ in the last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["values"])
    except FileNotFoundError:
        raise UsageError(f"{path}: no checkpoint there") from None
    except (SafetensorError, KeyError, TypeError, OSError, ValueError) as error:
        raise UsageError(f"{path}: not a checkpoint of this program ({error})") from None


def nest(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each name under `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names stand under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named by parameter number and entry."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{entry}": t for number, entries in state.items() for entry, t in entries.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_state` back. Learning rates stay those the optimizer was built with.

    What has the shape of its parameter gets its layout in memory too: fused optimizers rely on that.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, entry = name.partition(".")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        state.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
