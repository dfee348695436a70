"""Quantised models in the files of transformers: save_pretrained, and from_pretrained once hfopt has been imported.

`config.json` then holds a `quantization_config` with the quant_method "hfopt", and the safetensors files the tensors of
packed matrices under the names of the modules.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfopt._memory import forget_pages
from hfopt.checkpoint import Stored, check_finite, check_header, open_files
from hfopt.conversion import Matching
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedDevice, UnsupportedModel
from hfopt.quantization import (
    Format,
    QuantizationConfig,
    check_fits,
    config_of,
    layout_of,
    misfit,
    resolve,
)

try:
    from transformers.core_model_loading import ConversionOps
except ImportError:  # transformers 4
    ConversionOps = object  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)

METHOD = "hfopt"
# What transformers sets on quantised models, but for `is_quantized`, with which float() and half() are refused
_MARKS = ("hf_quantizer", "quantization_method")
SUFFIX = ".safetensors"
ALIGNMENT = 64  # bytes; what kernels ask of packed matrices
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


@register_quantization_config(METHOD)
class HfoptConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=HfoptConfig("int8"))` takes and `config.json` holds.

    body: a format or its name. head, skip: as in `QuantizationConfig`. modules: formats of single linear layers by their
    names, None for floats. ordered: the layers whose inputs are in an order of their own (`Packed.order`).
    Unknown formats and fields raise InvalidInput.
    """

    def __init__(
        self,
        body: str | Mapping[str, Any] | Format = "int8",
        *,
        modules: Mapping[str, Any] | None = None,
        ordered: Sequence[str] = (),
        quant_method: str = METHOD,
        **rest: Any,
    ) -> None:
        if quant_method != METHOD:
            raise InvalidInput(f"quant_method={quant_method!r}: {METHOD!r} is what HfoptConfig is for")
        self.quant_method: Any = METHOD
        self.quantization = QuantizationConfig.from_dict({"body": resolve(body).to_dict(), **rest})
        self.modules = {
            path: None if format is None else resolve(format) for path, format in (modules or {}).items()
        }
        self.ordered = frozenset(ordered)

    @classmethod
    def of(cls, quantization: Any) -> HfoptConfig:
        """From what `hfopt.load` and `hfopt.optimize` take."""
        if isinstance(quantization, cls):
            return quantization
        config = cls()
        config.quantization = config_of(quantization)
        return config

    def format_of(self, path: str, *, is_head: bool) -> Format | str:
        """Of the linear layer at this path; or in words, why it is left."""
        if path in self.modules:
            return self.modules[path] or "modules names it, with None"
        return self.quantization.format_of(path, is_head=is_head)

    def formats_of(self, model: PreTrainedModel) -> dict[str, Format | str]:
        """The same for all linear layers."""
        head = model.get_output_embeddings()
        return {
            path: self.format_of(path, is_head=linear is head) for path, linear in linears_of(model).items()
        }

    def plan(
        self, model: PreTrainedModel, done: Collection[str] = ()
    ) -> tuple[dict[str, Format], dict[str, str]]:
        """(formats of linear layers by their paths, why others are left as they are); but for those that are done.

        Raises InvalidInput for a format that fits no layer.
        """
        head, decoder = model.get_output_embeddings(), set(model.base_model.modules())
        formats: dict[str, Format] = {}
        left: dict[str, str] = {}
        misfits: dict[str, tuple[Format, str]] = {}
        for path, linear in model.named_modules():
            if not isinstance(linear, nn.Linear) or path in done:
                continue
            format = self.format_of(path, is_head=linear is head)
            if linear is not head and linear not in decoder:
                left[path] = "it is outside the decoder"
            elif isinstance(format, str):
                left[path] = format
            elif type(linear) is not nn.Linear:
                left[path] = f"it is a {type(linear).__name__}"
            elif (reason := misfit(format, linear.in_features)) is not None:
                left[path] = reason
                misfits[path] = format, reason
            else:
                formats[path] = format
        check_fits(formats.values(), misfits)
        return formats, left

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quant_method": METHOD,
            **self.quantization.to_dict(),
            "modules": {
                path: None if format is None else format.to_dict() for path, format in self.modules.items()
            },
            "ordered": sorted(self.ordered),
        }


def _or_none(format: Format | str) -> Format | None:
    return format if isinstance(format, Format) else None


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that may be quantised, by their paths."""
    return {path: module for path, module in model.named_modules() if type(module) is nn.Linear}


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if kernels cannot read it where it is."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def check_packed(
    source: str, path: str, linear: nn.Linear, format: Format, headers: Mapping[str, Stored]
) -> None:
    """Raises CorruptCheckpoint unless these tensors, by their names in a layer, are its matrix in this format."""
    from hfopt.patches.quantized import PREFIX

    if (reason := misfit(format, linear.in_features)) is not None:
        raise CorruptCheckpoint(f"{source}: {path} is in {format} by its config.json, and {reason}")
    ordered = PREFIX + "order" in headers
    layout = layout_of(format, linear.out_features, linear.in_features, ordered=ordered)
    if headers.keys() != {PREFIX + name for name in layout}:
        wanted = sorted(PREFIX + name for name in layout)
        raise CorruptCheckpoint(
            f"{source}: {path} in {format} consists of {wanted}, and there are {sorted(headers)}"
        )
    for name, (shape, dtype) in layout.items():
        header = headers[PREFIX + name]
        check_header(source, f"{path}.{PREFIX}{name}", header, shape, DTYPE_NAMES[dtype])


def declare(model: PreTrainedModel) -> None:
    """Let the configuration of a model say which of its layers are quantised, so that it can be saved."""
    config = describe(model)
    attributes: dict[str, Any] = vars(model)
    if config is None:
        if attributes.get("quantization_method") == METHOD:  # it was
            for name in _MARKS:
                del attributes[name]
            del model.config.quantization_config
    else:
        marks = (HfoptQuantizer(config, pre_quantized=True), METHOD)
        attributes.update(zip(_MARKS, marks, strict=True))
        model.config.quantization_config = config


def describe(model: PreTrainedModel) -> HfoptConfig | None:
    """The config that says what is quantised in a model; None where nothing is."""
    from hfopt.patches.quantized import QuantizedLinear

    head = model.get_output_embeddings()
    formats = {
        path: module.format if isinstance(module, QuantizedLinear) else None
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    ordered = [
        path
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.packed.order is not None
    ]
    counts = Counter(format for format in formats.values() if format is not None)
    if not counts:
        return None
    of_head = head.format if isinstance(head, QuantizedLinear) else None
    config = HfoptConfig(counts.most_common(1)[0][0], head=of_head, ordered=ordered)
    config.modules = {
        path: format
        for path, format in formats.items()
        if format != _or_none(config.format_of(path, is_head=model.get_submodule(path) is head))
    }
    return config


@register_quantizer(METHOD)
class HfoptQuantizer(HfQuantizer):
    """How transformers loads and saves models whose linear layers hfopt has quantised, or is to quantise."""

    requires_calibration = False
    quantization_config: HfoptConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UnsupportedDevice unless everything is to be on the CPU, and UnsupportedModel with transformers 4."""
        if ConversionOps is object:
            raise UnsupportedModel(
                "from_pretrained of transformers 4 would convert packed weights to the dtype of the model; "
                "hfopt.load reads and quantises them with this release too"
            )
        devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        if any(str(device) not in ("None", "auto", "cpu") for device in devices):
            raise UnsupportedDevice(f"device_map={device_map!r}: quantised layers run on the CPU only")

    def update_device_map(self, device_map: Any) -> dict[str, str]:
        """Everything on the CPU, where "auto" might choose another device."""
        return {"": "cpu"}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bfloat16 for float16, which there are no kernels for."""
        if dtype == torch.float16:
            logger.warning("hfopt has no kernels for float16: what is not quantised becomes bfloat16")
            return torch.bfloat16
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from hfopt.patches.quantized import empty_linear

        config = self.quantization_config
        left: dict[str, str] = {}
        if self.pre_quantized:
            kinds = config.formats_of(model)
            formats = {path: each for path, each in kinds.items() if isinstance(each, Format)}
        else:
            formats, left = config.plan(model)
        if left:
            path, reason = next(iter(left.items()))
            logger.warning("%d linear layers are not quantised, %s among them: %s", len(left), path, reason)
        # the name of a float weight -> the layers that are made of it
        self.targets = {f"{path}.weight": [path] for path in formats}
        self.formats = formats
        # what is wrong with weights; raised once transformers takes errors as they are
        self.damaged: list[str] = []
        tied = getattr(model, "all_tied_weights_keys", {})
        for name in self.targets.keys() & tied.keys():
            self.targets.setdefault(tied.pop(name), []).append(name.removesuffix(".weight"))
        if self.pre_quantized:
            for path, format in formats.items():
                linear: Any = model.get_submodule(path)
                empty_linear(linear, format, ordered=path in config.ordered)
                linear._is_hf_initialized = True
        self._check_files(model, [Path(file) for file in checkpoint_files or () if file.endswith(SUFFIX)])

    def _check_files(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        """Raises CorruptCheckpoint for damaged files and packed matrices that are not whole, which others would fill up."""
        _, headers = open_files(files)
        if not self.pre_quantized or not files:
            return
        matching = Matching(model, model.state_dict().__contains__)
        found: dict[str, dict[str, Stored]] = {path: {} for path in self.formats}
        for key, stored in headers.items():
            path, _, part = (matching.name_of(key) or "").rpartition(".")
            if path in found and part != "bias":
                found[path][part] = stored
        for path, format in self.formats.items():
            linear: Any = model.get_submodule(path)
            check_packed(str(files[0].parent), path, linear, format, found[path])

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether layers are made of this parameter."""
        return not self.pre_quantized and param_name in self.targets

    def get_quantize_ops(self) -> Quantize:
        """What makes them."""
        return Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from hfopt.patches.quantized import QuantizedLinear

        if self.damaged:
            more = f"; {len(self.damaged) - 1} more are damaged" if len(self.damaged) > 1 else ""
            raise CorruptCheckpoint(f"{model.name_or_path}: {self.damaged[0]}{more}")
        for name, tensor in model.state_dict().items():
            check_finite(str(model.name_or_path), name, tensor)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = aligned(buffer)
        declare(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: Any) -> tuple[None, dict[str, str]]:
        """Metadata that make the header of a file so long that all of its tensors are aligned."""
        declare(model)
        return None, {"padding": padding(_saved_tensors(model), {"format": "pt", "padding": ""})}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False


class Quantize(ConversionOps):
    """Packs a float weight as soon as it is read, and puts it into its layers."""

    def __init__(self, quantizer: HfoptQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """What is left for transformers to place: a weight that is an embedding too."""
        from hfopt.patches.quantized import quantize_linear

        ((name, values),) = input_dict.items()
        weight = values[0] if isinstance(values, list) else values
        is_kept = True
        for path in self.quantizer.targets[name]:
            linear = model.get_submodule(path)
            try:
                quantize_linear(linear, self.quantizer.formats[path].pack(weight))
            except InvalidInput as error:  # which transformers would show as a trace in a table
                self.quantizer.damaged.append(f"tensor {name!r}: {error}")
            linear._is_hf_initialized = True
            missing_keys.discard(f"{path}.weight")
            is_kept &= name != f"{path}.weight"
        if is_kept:
            return {name: weight}
        forget_pages(weight.data_ptr(), weight.nbytes)
        return {}


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
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
    """What to put into the metadata of a safetensors file of these tensors for its data to begin on a 64-byte boundary.

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
