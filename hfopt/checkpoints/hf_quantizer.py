"""Quantised models in the files of transformers: save_pretrained, and from_pretrained once hfopt has been imported.

`config.json` then holds a `quantization_config` with the quant_method "hfopt", and the safetensors files the tensors of
packed matrices under the names of the modules.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from hfopt.checkpoints.hf_config import METHOD, HfoptConfig
from hfopt.checkpoints.names import Matching
from hfopt.checkpoints.packed_files import check_packed, padding, saved_tensors
from hfopt.checkpoints.reader import Stored, check_finite, open_files
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedDevice, UnsupportedModel
from hfopt.host import LINEARS, by_outputs
from hfopt.machine.cores import fit_threads
from hfopt.machine.memory import forget_pages
from hfopt.quantization import Format
from hfopt.quantization.layout import aligned

try:
    from transformers.core_model_loading import ConversionOps
except ImportError:  # transformers 4
    ConversionOps = object  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# What transformers sets on quantised models, but for `is_quantized`, with which float() and half() are refused
_MARKS = ("hf_quantizer", "quantization_method")


def declare(model: PreTrainedModel) -> None:
    """Write into the configuration of a model which of its layers are quantised, so that it can be saved."""
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
    from hfopt.modules.quantized import QuantizedLinear

    head = model.get_output_embeddings()
    formats = {
        path: module.format if isinstance(module, QuantizedLinear) else None
        for path, module in model.named_modules()
        if isinstance(module, LINEARS)
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


def _or_none(format: Format | str) -> Format | None:
    return format if isinstance(format, Format) else None


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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from hfopt.modules.quantized import empty_linear

        fit_threads()
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
        """Operation that packs weights while transformers reads them."""
        return Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from hfopt.modules.quantized import QuantizedLinear

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
        return None, {"padding": padding(saved_tensors(model), {"format": "pt", "padding": ""})}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it can be saved: packed weights always can."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: packed weights have no gradients."""
        return False


class Quantize(ConversionOps):
    """Packs a float weight as soon as it is read, and puts it into its layers."""

    def __init__(self, quantizer: HfoptQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Pack a weight; returns what is left for transformers to place, a weight that is an embedding too."""
        from hfopt.modules.quantized import quantize_linear

        ((name, values),) = input_dict.items()
        weight = values[0] if isinstance(values, list) else values
        is_kept = True
        for path in self.quantizer.targets[name]:
            linear = model.get_submodule(path)
            try:
                quantize_linear(linear, self.quantizer.formats[path].pack(by_outputs(linear, weight)))
            except InvalidInput as error:  # which transformers would show as a trace in a table
                self.quantizer.damaged.append(f"tensor {name!r}: {error}")
            linear._is_hf_initialized = True
            missing_keys.discard(f"{path}.weight")
            is_kept &= name != f"{path}.weight"
        if is_kept:
            return {name: weight}
        forget_pages(weight.data_ptr(), weight.nbytes)
        return {}
