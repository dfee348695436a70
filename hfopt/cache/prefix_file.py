"""The file of a PrefixCache: safetensors, with what it was made of in the metadata. Nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfopt.cache.codes import KV_CACHES
from hfopt.cache.prefix_tree import Block, Parts, cut
from hfopt.cache.storage import DTYPES
from hfopt.errors import CorruptCheckpoint, InvalidInput

_FORMAT = "hfopt prefixes 1"
Kind: TypeAlias = tuple[str | None, torch.dtype]  # of the cache, of what it holds or stands for
Text: TypeAlias = tuple[np.ndarray, Callable[[int, int], list[Parts]]]  # as `PrefixTree.add` takes it


def write(path: str, model: str, texts: Mapping[Any, Iterable[Block]]) -> None:
    """Write blocks, parents first, of each `Kind`; model: digest of that which they are of. Raises InvalidInput."""
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    for (kv_cache, dtype), blocks in texts.items():
        first = len(entries)
        for number, block in enumerate(blocks, first):
            parent = None if block.parent is None else first + block.parent
            layers = len(block.parts)
            entries.append({"kv_cache": kv_cache, "dtype": str(dtype), "parent": parent, "layers": layers})
            tensors[f"{number}.tokens"] = torch.from_numpy(block.tokens)
            for layer, (elements, scales) in enumerate(block.parts):
                tensors[f"{number}.{layer}"] = elements.contiguous()
                if scales is not None:
                    tensors[f"{number}.{layer}.scales"] = scales.contiguous()
    metadata = {"format": _FORMAT, "model": model, "blocks": json.dumps(entries), "content": _digest(tensors)}
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"path = {path!r}: no file can be written there ({error})") from error
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def read(path: str, model: str) -> dict[Kind, list[Text]]:
    """What `write` has written for this model. Raises InvalidInput and CorruptCheckpoint."""
    if not os.path.isfile(path):
        raise InvalidInput(f"path = {path!r}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                given = metadata.get("format", "something else")
                raise InvalidInput(f"path = {path!r}: the file holds {given!r}, and {_FORMAT!r} is needed")
            if metadata.get("model") != model:
                raise InvalidInput(
                    f"path = {path!r}: the file is of another model, or of this one with other weights, settings or adapters"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if _digest(tensors) != metadata["content"]:
            raise ValueError("its content is not what was written")
        return _texts(json.loads(metadata["blocks"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise CorruptCheckpoint(f"{path} is damaged: {error}") from error


def _texts(entries: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> dict[Kind, list[Text]]:
    """Each block as a text from its beginning on; raises ValueError and the like for what no cache can hold."""
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    found: dict[Kind, list[Text]] = {}
    known: list[tuple[Kind, np.ndarray, list[Parts]]] = []
    for number, entry in enumerate(entries):
        kind = entry["kv_cache"], dtypes[entry["dtype"]]
        if kind[0] not in KV_CACHES:
            raise ValueError(f"kv_cache is {kind[0]!r}")
        tokens = tensors[f"{number}.tokens"].numpy()
        parts = [
            (tensors[f"{number}.{layer}"], tensors.get(f"{number}.{layer}.scales"))
            for layer in range(entry["layers"])
        ]
        _check(parts, tokens, kind)
        pieces: list[Parts] = []
        if entry["parent"] is not None:
            of, before, pieces = known[:number][entry["parent"]]
            if of != kind:
                raise ValueError(f"block {number} is of another kind than the one before it")
            tokens = np.concatenate([before, tokens])
        known.append((kind, tokens, [*pieces, parts]))
        found.setdefault(kind, []).append((tokens, _reader(known[-1][2])))
    return found


def _check(parts: Parts, tokens: np.ndarray, kind: Kind) -> None:
    kv_cache, dtype = kind
    if tokens.dtype != np.int64 or tokens.ndim != 1 or not len(tokens) or not parts:
        raise ValueError("a block has no tokens")
    for elements, scales in parts:
        is_float = kv_cache is None
        if elements.dim() != 4 or elements.shape[::2] != (2, len(tokens)):
            raise ValueError(f"a block of {len(tokens)} tokens has elements {tuple(elements.shape)}")
        if elements.dtype is not (dtype if is_float else torch.int8) or (scales is None) is not is_float:
            raise ValueError(f"a block of {kv_cache or dtype} has elements of {elements.dtype}")
        if scales is not None and (scales.dtype is not torch.float32 or scales.shape != elements.shape[:3]):
            raise ValueError(f"a block has scales {scales.dtype} {tuple(scales.shape)}")


def _reader(pieces: list[Parts]) -> Callable[[int, int], list[Parts]]:
    def read(first: int, end: int) -> list[Parts]:
        start, wanted = 0, []
        for piece in pieces:
            n_tokens = piece[0][0].shape[2]
            if start < end and first < start + n_tokens:
                wanted.append(cut(piece, max(first - start, 0), min(end - start, n_tokens)))
            start += n_tokens
        return wanted

    return read


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
