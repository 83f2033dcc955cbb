"""Read weights: safetensors or torch's pickles, in one file or in shards with an index.

Pickles are read with `weights_only`: one that would run code is refused.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mor.errors import CheckpointError

_WHOLE = ("model.safetensors", "pytorch_model.bin")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's folder, by their names in it.

    Raises:
        CheckpointError: there are none, a file is damaged, or a shard lacks what the index names.
    """
    for name in _WHOLE:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise CheckpointError(
        f"{folder} holds no weights: it has neither {' nor '.join(_WHOLE)}, whole or as shards "
        "with an .index.json."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {values!r:.40}.")
    return values


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or a torch pickle by its name.

    Raises:
        CheckpointError: it is missing, damaged, or a pickle that holds more than tensors.
    """
    if file.suffix != ".safetensors":
        return _read_pickle(file)
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        where = _cut_tensor(file)
        part = f"ends before the end of {where!r}" if where else f"is damaged ({error})"
        raise CheckpointError(f"{file} {part}: copy it again from where it came.") from error


def _cut_tensor(file: Path) -> str | None:
    """Name of the first tensor that lies beyond the end of a safetensors file; None if none does.

    The format: 8 bytes of length, a JSON header with each tensor's offsets, the tensors.
    """
    try:
        data = file.read_bytes()[: 2**26]  # a header is at most 64 MiB here
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        room = file.stat().st_size - 8 - length
        ends = {n: e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return next((n for n in sorted(ends, key=lambda name: ends[name]) if ends[n] > room), None)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or would run code when it is read ({str(error).splitlines()[0]}): "
            "only plain tensors are taken; save its state_dict() again, or as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is damaged ({reason}): copy it again.") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state_dict.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name!r} is no tensor: save the state_dict() alone.")
    return dict(state)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index names, from the files beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensors to files.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:  # "../x": a file outside the checkpoint
            raise CheckpointError(f"{index} names {name!r}: shards must lie beside it.")
        wanted = [tensor for tensor, file in places.items() if file == name]
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks {name}, the file of {wanted[0]!r}.")
        shard = read_tensors(index.parent / name)
        for tensor in wanted:
            if tensor not in shard:
                raise CheckpointError(f"{index.parent / name} lacks {tensor!r}.")
            state[tensor] = shard[tensor]
    return state
