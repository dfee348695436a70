"""What keys and values depend on besides tokens: the weights of a model as they are now, its settings, its adapters."""

from __future__ import annotations

import functools
import hashlib
import marshal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hfopt import host

_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = (dict, list, tuple)
_OF_EVERY_MODULE = frozenset(dir(nn.Module())) - {"training"}
_NAMES = frozenset(
    {"name_or_path", "_name_or_path", "transformers_version"}
)  # of a config, which say where it is from
_SAMPLES = 8  # at least, along each dimension
_WIDE = 64  # columns of which there are others for each row


def obstacle(model: Any) -> str | None:
    """In words, why keys and values of a model follow from more than the tokens so far; None if from those alone."""
    config = model.config
    if config.is_encoder_decoder:
        return "it has an encoder"
    if model.is_remote_code():
        return "its code is not transformers' own"
    if None in host.windows_of(config):
        return "not all of its layers have full attention or that of a window"
    if host.steady_length(model.modules()) < sys.maxsize:
        return "its angles depend on how long a text is"
    return None


def state_of(model: nn.Module) -> bytes:
    """A digest that differs once weights, settings or adapters have changed, in this process.

    Weights are told by where they are, by torch's count of writes, and by a sample of what is in them: a change of a few
    numbers past that count (`weight.data[3, 5] = 0`) is not seen.
    """
    facts: list[Any] = []
    samples: dict[torch.dtype, list[Tensor]] = {}
    with torch.no_grad():
        for module in _modules(model):
            own = vars(module)
            facts += (id(type(module)), id(own.get("forward")))
            for name, value in own.items():
                if name in _OF_EVERY_MODULE:
                    continue
                if type(value) in _PLAIN:
                    facts += (name, value)
                elif isinstance(value, _CONTAINERS) and _is_plain(value):
                    facts += (name, repr(value))
            for tensor in _tensors(module):
                if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                    facts.append(id(tensor))
                    continue
                version = None if tensor.is_inference() else tensor._version
                shape, strides, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
                facts += (tensor.data_ptr(), version, id(dtype), shape, strides)
                sample = tensor.as_strided(*_sample(shape, strides)).reshape(-1)
                samples.setdefault(dtype, []).append(sample)
        facts.append(repr(_settings(model)))
        # of the forms that tell 1 from True and 1.0 the quickest; later ones depend on what else refers to a value
        digest = hashlib.blake2b(marshal.dumps(facts, 2), digest_size=16)
        for each in samples.values():
            digest.update(_bytes(torch.cat(each)))
    return digest.digest()


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model.modules()`, without the names that it puts together."""
    waiting, seen = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        yield module
        for child in vars(module)["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


@functools.lru_cache(1024)
def _sample(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Shape and strides of some elements of a tensor: every so many along each dimension, of a wide matrix other columns
    from row to row."""
    steps = [max(1, size // _SAMPLES) for size in shape]
    counts = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    distances = [stride * step for stride, step in zip(strides, steps, strict=True)]
    if len(shape) == 2 and counts[0] > 1 and shape[1] >= _WIDE:
        step = (shape[1] - counts[0]) // _SAMPLES
        n_left = shape[1] - 1 - _SAMPLES * step  # columns behind the last one
        counts[1] = _SAMPLES + 1
        distances = [distances[0] + n_left // (counts[0] - 1) * strides[1], step * strides[1]]
    return counts, distances


def digest_of(model: nn.Module) -> str:
    """The same for other processes: it holds every bit of the weights, and takes as long as to read them."""
    digest = hashlib.blake2b(digest_size=32)
    for name, module in model.named_modules():
        digest.update(repr((name, *_attributes(module))).encode())
        for tensor in _tensors(module):
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(_bytes(tensor.detach()))
    digest.update(repr(_settings(model)).encode())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (
        each for held in (module._parameters, module._buffers) for each in held.values() if each is not None
    )


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Plain values that a module has of its own: factors, flags, names of adapters."""
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and _is_plain(value):
            yield name, value


def _settings(model: nn.Module) -> list[tuple[str, Any]]:
    fields = vars(getattr(model, "config", None) or model)
    return sorted((name, value) for name, value in fields.items() if name not in _NAMES and _is_plain(value))


def _is_plain(value: Any) -> bool:
    """Whether `repr` says all of it, alike in each process."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else type(value) in _PLAIN


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
