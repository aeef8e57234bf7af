"""Checkpoints: one safetensors file, replaced whole or not at all. No pickle is read or written.

The JSON values in the header are followed by a line with the SHA-256 of the file, computed with zeros in its
place. Files of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dni_rnn.errors import UsageError
from dni_rnn.files import write_atomically

NO_DIGEST = "0" * hashlib.sha256().digest_size * 2


def save_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Tensors by name, and JSON values in the file's header, atomically."""
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(flat, metadata={"values": f"{json.dumps(values)}\n{NO_DIGEST}"})
    before, after = _around(content, NO_DIGEST)
    write_atomically(path, b"".join([before, _digest(before, after).encode(), after]))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` wrote.

    Raises:
      UsageError: there is no file, it is not a whole checkpoint, or a byte of it has changed.
    """
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text, line, digest = header["__metadata__"]["values"].partition("\n")
        if line and digest != _digest(*_around(content, digest)):
            raise UsageError(
                f"{path}: not a checkpoint as it was written (its content has another checksum); put a good "
                "copy in its place, or train anew with another --out"
            )
        # Sorted by name, 10 after 9: safetensors promises no order. Cloned, because the offset of a tensor in
        # the file decides its alignment in memory, and that the summation order of vectorised kernels:
        # otherwise a resumed run would differ in the last bits.
        tensors = load(content)
        return {name: tensors[name].clone() for name in sorted(tensors, key=_counted)}, json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no checkpoint there") from None
    except (SafetensorError, AttributeError, KeyError, TypeError, OSError, ValueError) as error:
        raise UsageError(f"{path}: not a checkpoint of this program ({error})") from None


def _counted(name: str) -> list[str | int]:
    return [int(part) if part.isascii() and part.isdigit() else part for part in re.split("([0-9]+)", name)]


def _around(content: bytes, digest: str) -> tuple[memoryview, memoryview]:
    """The file's content before and after the digest: its first occurrence at the end of a header string."""
    written = digest.encode()
    place = content.index(b"\\n" + written + b'"') + 2
    return memoryview(content)[:place], memoryview(content)[place + len(written) :]


def _digest(before: memoryview, after: memoryview) -> str:
    digest = hashlib.sha256(before)
    digest.update(NO_DIGEST.encode())
    digest.update(after)
    return digest.hexdigest()


def nest(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each name under `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, named by parameter number and entry."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{entry}": t for number, entries in state.items() for entry, t in entries.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_state` back. Learning rates stay those the optimizer was built with.

    Tensors of the shape of their parameter also get its memory layout: fused optimizers rely on that.
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
