"""The weights of a checkpoint folder: safetensors files, read by mapping them into memory.

A file that is cut short or damaged, and an index that contradicts its files, raise CorruptCheckpoint before any weight is
read; a folder whose weights are in other files than safetensors raises UnsupportedModel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from hfopt.checkpoints.names import Parts
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from hfopt.machine.memory import forget_pages
from hfopt.words import first_line

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHERS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack")


class Stored(NamedTuple):
    """Header of a tensor in a file."""

    file: int  # -1: it is made of others
    shape: tuple[int, ...]
    dtype: str  # in safetensors' names: "BF16"


class Checkpoint:
    """The tensors of a checkpoint, a mapping from their names to what is known without reading them.

    Args:
        source: a folder or an id of the Hub.
        hub: arguments of `transformers.utils.hub.cached_file`, `revision` for example.
    """

    def __init__(self, source: str, hub: Mapping[str, Any]) -> None:
        self.source = source
        files, index = _find(source, dict(hub))
        self._files, self.tensors = open_files(files)
        self._parts: dict[str, Parts] = {}
        for name, file_name in index.items():
            if name not in self.tensors or files[self.tensors[name].file].name != file_name:
                raise CorruptCheckpoint(
                    f"{source}: its index says that tensor {name!r} is in {file_name}, which is not so"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def join(self, name: str, parts: Parts) -> None:
        """Add a tensor that is made of stored ones, under a name of its own; see `Parts`."""
        first = self.tensors[parts.rows[0][0]]
        headers = [[self.tensors[key][1:] for key in row] for row in parts.rows]
        for row, keys in zip(headers, parts.rows, strict=True):
            ends = {(shape[1:], dtype) for shape, dtype in row}
            if row != headers[0] or ends != {(first.shape[1:], first.dtype)} or not first.shape:
                raise CorruptCheckpoint(
                    f"{self.source}: {name} is made of tensors that differ in shape or dtype, {keys} among them"
                )
        shape = (sum(shape[0] for shape, _ in headers[0]), *first.shape[1:])
        self._parts[name] = parts
        self.tensors[name] = Stored(-1, (len(headers), *shape) if parts.is_stacked else shape, first.dtype)

    def is_joined(self, name: str) -> bool:
        """Whether the tensor is made of others."""
        return name in self._parts

    def joined(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that is made of others, in memory of its own; raises CorruptCheckpoint for NaN and Inf."""
        rows, is_stacked = self._parts[name]
        out = torch.empty(self.tensors[name].shape, dtype=dtype)
        for target, row in zip(out if is_stacked else [out], rows, strict=True):
            first = 0
            for key in row:
                part = self.read(key)
                check_finite(self.source, key, part)
                target[first : first + len(part)] = part
                first += len(part)
                self.forget(part)
        return out

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the pages of its file: no copy, and not to be written to. Made of others, it is a copy."""
        if self.is_joined(name):
            return self.joined(name, FLOATS[self.tensors[name].dtype])
        try:
            return self._files[self.tensors[name].file].get_tensor(name)
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{self.source}: tensor {name!r} cannot be read ({error})") from error

    @staticmethod
    def forget(tensor: torch.Tensor) -> None:
        """Release the pages of a tensor that `read` gave and that is not needed any more."""
        forget_pages(tensor.data_ptr(), tensor.nbytes)


def _find(source: str, hub: dict[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and from its index the file of every tensor (nothing without an index)."""
    try:
        if single := cached_file(
            source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub
        ):
            return [Path(single)], {}
        index = cached_file(
            source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(_unknown(source, error)) from error
    if index is None:
        raise _without_safetensors(source, hub)
    places = _places(source, Path(index))
    if os.path.isdir(source):
        folder = Path(index).parent
        files = [folder / name for name in sorted(set(places.values()))]
        for file in files:
            if not file.is_file():
                raise CorruptCheckpoint(f"{source} lacks {file.name}, which its index names")
        return files, places
    try:
        names, _ = get_checkpoint_shard_files(source, index, **hub)
    except (OSError, ValueError) as error:
        raise InvalidInput(_unknown(source, error)) from error
    return [Path(name) for name in names], places


def _places(source: str, index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{source}: {index.name} is no index of safetensors ({error!r})") from error
    if not isinstance(places, dict) or not places:
        raise CorruptCheckpoint(
            f"{source}: the weight_map of {index.name} is {type(places).__name__}, or empty"
        )
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptCheckpoint(f"{source}: {index.name} names {name!r}, which is no file of the folder")
    return places


def _without_safetensors(source: str, hub: dict[str, Any]) -> Exception:
    if os.path.isdir(source):
        folder = Path(source, hub.get("subfolder", ""))
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHERS)
    else:
        found = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
            for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        )
        others = [Path(name).name for name in found if name is not None]
    if others:
        return UnsupportedModel(
            f"{source} holds its weights in {others[0]}: hfopt reads safetensors only, which "
            "from_pretrained and save_pretrained of transformers make of them"
        )
    return CorruptCheckpoint(f"{source} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def check_header(source: str, name: str, stored: Stored, shape: tuple[int, ...], *dtypes: str) -> None:
    """Raises CorruptCheckpoint unless a tensor has this shape and one of these dtypes."""
    if stored.shape != shape or stored.dtype not in dtypes:
        raise CorruptCheckpoint(
            f"{source}: tensor {name!r} is {stored.dtype} {list(stored.shape)}, where the model of its config.json has "
            f"{' or '.join(dtypes)} {list(shape)}"
        )


def check_finite(source: str, name: str, tensor: torch.Tensor) -> None:
    """Raises CorruptCheckpoint for a tensor that holds NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # many times as fast as isfinite()
    if not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
        raise CorruptCheckpoint(f"{source}: tensor {name!r} holds NaN or Inf")


def open_files(files: Sequence[Path]) -> tuple[list[Any], dict[str, Stored]]:
    """(safetensors files, what their headers say of each tensor)."""
    opened: list[Any] = []
    tensors: dict[str, Stored] = {}
    for place, file in enumerate(files):
        try:
            opened.append(safe_open(str(file), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"{file} is cut short or damaged ({error})") from error
        for name in opened[place].keys():  # noqa: SIM118  it is no mapping
            if name in tensors:
                raise CorruptCheckpoint(f"{file.parent} holds tensor {name!r} twice, once in {file.name}")
            header = opened[place].get_slice(name)
            tensors[name] = Stored(place, tuple(header.get_shape()), header.get_dtype())
    return opened, tensors


def _unknown(source: str, error: Exception) -> str:
    return f"path_or_id={source!r} is neither a folder nor an id of the Hub that can be loaded ({first_line(error)})"
