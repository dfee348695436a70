"""Packed matrices in safetensors files: where they begin, and what the headers say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfopt.checkpoints.reader import Stored, check_header
from hfopt.errors import CorruptCheckpoint
from hfopt.host import Features
from hfopt.quantization import Format, layout_of, misfit
from hfopt.quantization.layout import ALIGNMENT

# The dtypes of models under their names in safetensors, in the order in which a file holds them
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_packed(
    source: str, path: str, linear: nn.Module, format: Format, headers: Mapping[str, Stored]
) -> None:
    """Raises CorruptCheckpoint unless these tensors, by their names in a layer, are its matrix in this format."""
    from hfopt.modules.quantized import PREFIX

    n_inputs, n_outputs = Features.of(linear)
    if (reason := misfit(format, n_inputs)) is not None:
        raise CorruptCheckpoint(f"{source}: {path} is in {format} by its config.json, and {reason}")
    ordered = PREFIX + "order" in headers
    layout = layout_of(format, n_outputs, n_inputs, ordered=ordered)
    if headers.keys() != {PREFIX + name for name in layout}:
        wanted = sorted(PREFIX + name for name in layout)
        raise CorruptCheckpoint(
            f"{source}: {path} in {format} consists of {wanted}, and there are {sorted(headers)}"
        )
    for name, (shape, dtype) in layout.items():
        header = headers[PREFIX + name]
        check_header(source, f"{path}.{PREFIX}{name}", header, shape, DTYPE_NAMES[dtype])


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model as files hold them: of those that share memory, the one that others are tied to."""
    tensors = model.state_dict()
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    tied = {*(getattr(model, "_tied_weights_keys", None) or ())}
    for shared in names.values():
        for name in tied.intersection(shared) if len(shared) > 1 else ():
            del tensors[name]
    return tensors


def padding(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Spaces for the metadata of a safetensors file of these tensors, so that its data begin on a 64-byte boundary.

    A file begins with 8 bytes, then the header as JSON, filled up to a multiple of 8 bytes by spaces; the data follow
    with the largest elements first (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = list(DTYPE_NAMES)
    position = 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    size = 8 + len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return " " * (-size % ALIGNMENT)
