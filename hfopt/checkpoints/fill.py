"""From the tensors of a checkpoint to the parameters of a model, one after the other."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hfopt.checkpoints.foreign import read_linear
from hfopt.checkpoints.hf_config import HfoptConfig, linears_of
from hfopt.checkpoints.names import Matching
from hfopt.checkpoints.packed_files import DTYPE_NAMES, check_packed
from hfopt.checkpoints.reader import FLOATS, Checkpoint, check_finite, check_header
from hfopt.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from hfopt.host import Conv1D, Features
from hfopt.machine.pages import extents, give_back
from hfopt.modules.quantized import PREFIX, quantize_linear
from hfopt.quantization import Format, InputStatistics, Packed, layout_of, packed_from
from hfopt.quantization.layout import BLOCK, aligned

logger = logging.getLogger(__name__)

# Bytes of a float weight that are in memory at a time while it is converted or quantised
SLICE = 1 << 24
# Bytes of a tensor that may be in memory beside a model that stays on disk
_SMALL = 1 << 16
# Tensors of old checkpoints that models compute for themselves now
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")


class Weights:
    """Fills a model whose parameters are on the device `meta` with the tensors of a checkpoint.

    stored: the checkpoint's quantization_config. wanted: what linear layers are to become that it holds as floats.
    on_disk: all large tensors stay in their files, as they are there. Names and shapes are checked here, before anything is
    read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        stored: Mapping[str, Any],
        wanted: HfoptConfig | None,
        *,
        on_disk: bool = False,
    ) -> None:
        self.model, self.checkpoint, self.dtype, self.stored = model, checkpoint, dtype, stored
        self.on_disk = on_disk
        self.linears = linears_of(model)
        self.by_inputs = {path for path, linear in self.linears.items() if isinstance(linear, Conv1D)}
        self.names = dict(model.state_dict(keep_vars=True))
        matching = Matching(model, self._has_place)
        self.keys, parts, unexpected = matching.places(checkpoint)
        for name, each in parts.items():
            checkpoint.join(name, each)
            self.keys[name] = name
        # what is stored of a linear layer beside its bias: the names behind its path, and their keys
        self.parts: dict[str, dict[str, str]] = {path: {} for path in self.linears}
        for name, key in self.keys.items():
            path, _, part = name.rpartition(".")
            if path in self.linears and part != "bias":
                self.parts[path][part] = key
        self.tied = self._tied()
        self.left: dict[str, str] = {}  # why layers of floats are not quantised
        self.quantised: dict[str, Format] = {}  # what becomes of layers of floats
        self.packers = self._packers(wanted)
        self._check_unexpected(unexpected, matching)
        self._check_plain()
        if on_disk:
            self._check_stays()

    def _has_place(self, name: str) -> bool:
        path, _, part = name.rpartition(".")
        return name in self.names or (path in self.linears and part != "bias")

    def _tied(self) -> dict[str, list[str]]:
        """Keys of a parameter under all of its names, by each name in the model; its own comes first."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.names.items():
            names.setdefault(id(tensor), []).append(name)
        return {
            name: [self.keys[other] for other in (name, *names[id(tensor)]) if other in self.keys]
            for name, tensor in self.names.items()
        }

    def _packers(self, wanted: HfoptConfig | None) -> dict[str, Callable[[], Packed]]:
        """Functions that make packed matrices, by the paths of the linear layers that are to have one."""
        method = self.stored.get("quant_method")
        packers: dict[str, Callable[[], Packed]] = {}
        if method == "hfopt":
            try:
                kinds = HfoptConfig(**self.stored).formats_of(self.model)
            except (InvalidInput, TypeError) as error:
                raise self._corrupt(
                    f"the quantization_config of its config.json cannot be used ({error})"
                ) from error
            for path, parts in self.parts.items():
                if any(part.startswith(PREFIX) for part in parts):
                    packers[path] = partial(self._read_written, path, self._checked(path, kinds[path]))
        elif method is not None:
            for path, parts in self.parts.items():
                if parts.keys() - {"weight"}:
                    packers[path] = partial(self._read_foreign, path)
        if wanted is not None:
            # whatever it is that stands for their weights
            done = {path for path, parts in self.parts.items() if parts.keys() - {"weight"}}
            self.quantised, self.left = wanted.plan(self.model, done)
            packers |= {path: partial(self._quantise, path) for path in self.quantised}
        return packers

    # ---- before anything is read -----------------------------------------------------------------------------

    def _checked(self, path: str, format: Format | str) -> Format:
        """The format of a layer that hfopt wrote, which consists of what it says."""
        if isinstance(format, str):
            raise self._corrupt(f"{path} is quantised, and its config.json says that it is not")
        headers = {part: self.checkpoint[key] for part, key in self.parts[path].items()}
        check_packed(self.checkpoint.source, path, self.linears[path], format, headers)
        return format

    def _check_plain(self) -> None:
        """Raise CorruptCheckpoint unless every parameter is there, and of the right size."""
        missing = []
        for name, tensor in self.names.items():
            path, _, part = name.rpartition(".")
            if part == "weight" and path in self.packers and self.parts[path].keys() - {"weight"}:
                continue  # other tensors stand for it
            if not self.tied[name]:
                missing.append(name)
                continue
            key = self.tied[name][0]
            dtypes = tuple(FLOATS) if tensor.is_floating_point() else (self.checkpoint[key].dtype,)
            check_header(self.checkpoint.source, key, self.checkpoint[key], tuple(tensor.shape), *dtypes)
        if missing:
            raise self._corrupt(f"it lacks {len(missing)} tensors, {missing[0]!r} among them")

    def _check_stays(self) -> None:
        """Raise UnsupportedModel where weights would have to be made, in memory, of what is in the files."""
        reason = None
        if self.quantised or self.stored.get("quant_method") not in (None, "hfopt"):
            reason = "its weights are to be packed"
        elif self.by_inputs:
            reason = f"{min(self.by_inputs)} is a Conv1D, whose weight has to be laid otherwise"
        for name, tensor in self.names.items():
            key = next(iter(self.tied[name]), None)
            if reason is None and key is not None and tensor.nbytes > _SMALL:
                if self.checkpoint.is_joined(key):
                    reason = f"{name} is made of several tensors"
                elif self.checkpoint[key].dtype != DTYPE_NAMES[tensor.dtype]:
                    reason = f"{key!r} is {self.checkpoint[key].dtype}, and to be {tensor.dtype}"
        if reason is not None:
            raise UnsupportedModel(
                f"{self.checkpoint.source}: {reason}. A model that stays on disk has to be there as kernels read it: "
                "save it once with hfopt.save, on a machine with enough memory"
            )

    def _check_unexpected(self, keys: Iterable[str], matching: Matching) -> None:
        ignored = (*(self.model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED)
        keys = [key for key in keys if not any(re.search(pattern, key) for pattern in ignored)]
        keys += [
            self.keys[f"{path}.{part}"]
            for path, parts in self.parts.items()
            if path not in self.packers
            for part in parts
            if part != "weight"
        ]
        # the tools of GPTQ write biases of zeros to layers that have none
        keys = [key for key in keys if not (key.endswith(".bias") and self._is_zero(key))]
        for key in keys:
            path, _, part = key.rpartition(".")
            if part != "weight" and matching.is_converted(f"{path}.weight"):
                raise UnsupportedModel(
                    f"{self.checkpoint.source}: {key!r} belongs to a quantised expert; hfopt.load reads experts of floats"
                )
        if keys:
            raise self._corrupt(
                f"it holds {len(keys)} tensors that the model of its config.json has no place for, "
                f"{keys[0]!r} among them"
            )

    def _is_zero(self, key: str) -> bool:
        return not bool(self.checkpoint.read(key).any())

    def _corrupt(self, message: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.checkpoint.source}: {message}")

    # ---- packed matrices -------------------------------------------------------------------------------------

    def _read_written(self, path: str, format: Format) -> Packed:
        (n_inputs, n_outputs), tensors = Features.of(self.linears[path]), {}
        for part, key in self.parts[path].items():
            tensor = self.checkpoint.read(key)
            self._check_numbers(key, tensor)
            tensors[part.removeprefix(PREFIX)] = aligned(tensor)
        return packed_from(format, n_outputs, n_inputs, tensors)

    def _read_foreign(self, path: str) -> Packed:
        tensors = {part: self.checkpoint.read(key) for part, key in self.parts[path].items()}
        packed = read_linear(path, tensors, self.stored)
        for tensor in tensors.values():
            self.checkpoint.forget(tensor)
        return packed

    def _quantise(self, path: str) -> Packed:
        (n_inputs, n_outputs), format = Features.of(self.linears[path]), self.quantised[path]
        layout = layout_of(format, n_outputs, n_inputs)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        self._pack_into(tensors, path, None)
        return Packed(format, n_outputs, n_inputs, **tensors)

    def _pack_into(
        self, tensors: Mapping[str, torch.Tensor], path: str, inputs: InputStatistics | None
    ) -> None:
        """Quantise the float weight of a layer; what the tensors held is lost."""
        stored = self.checkpoint.read(self.tied[f"{path}.weight"][0])
        weight = stored.t() if path in self.by_inputs else stored
        # of a large float matrix, only some rows are in memory at a time
        n_rows = max(SLICE // (weight.nbytes // len(weight)) // BLOCK, 1) * BLOCK
        for first in range(0, len(weight), n_rows):
            rows = weight[first : first + n_rows]
            blocks = slice(first // BLOCK, -(-(first + len(rows)) // BLOCK))
            for name, values in self.quantised[path].pack(rows, inputs).tensors().items():
                tensors[name][blocks] = values
            if weight is stored:
                self.checkpoint.forget(rows)
        self.checkpoint.forget(stored)

    # ---- filling ---------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Read, quantise and place everything, with a bar on standard error."""
        modules = [(path, module, self._own(path, module)) for path, module in self.model.named_modules()]
        filled: dict[int, tuple[nn.Parameter, str]] = {}
        with tqdm(total=len(self.names), desc="Loading weights", unit=" tensors") as bar:
            for path, module, names in modules:
                if path in self.packers:
                    self._pack(path, module)
                    names.remove("weight")
                    bar.update()
                for name in names:
                    self._place(path, module, name, filled)
                    bar.update()

    def quantise_again(
        self, inputs: Mapping[str, InputStatistics | None], advance: Callable[[], None]
    ) -> None:
        """Replace what `fill` has quantised without knowing the inputs, in place. advance: called after each layer."""
        for path, known in inputs.items():
            linear: Any = self.linears[path]  # a QuantizedLinear by now
            self._pack_into(linear.packed.tensors(), path, known)
            advance()

    def _own(self, path: str, module: nn.Module) -> list[str]:
        tensors = (*module._parameters, *module._buffers)
        return [name for name in tensors if _join(path, name) in self.names]

    def _pack(self, path: str, linear: Any) -> None:
        try:
            quantize_linear(linear, self.packers[path]())
        except InvalidInput as error:
            raise self._corrupt(f"{path}: {error}") from error

    def _place(
        self, path: str, module: nn.Module, name: str, filled: dict[int, tuple[nn.Parameter, str]]
    ) -> None:
        full_name = _join(path, name)
        tensor, key = self.names[full_name], self.tied[full_name][0]
        if name in module._buffers:
            module._buffers[name] = self._read(key, tensor.dtype)
            return
        known, known_key = filled.get(id(tensor), (None, ""))
        if known is None or not self._is_same(key, known_key):
            if known is not None:
                logger.warning("%s and %s differ: they are not tied", key, known_key)
                self.model.config.tie_word_embeddings = False
            known = nn.Parameter(self._read(key, tensor.dtype), requires_grad=tensor.requires_grad)
            filled.setdefault(id(tensor), (known, key))
        module._parameters[name] = known

    def _check_numbers(self, key: str, stored: torch.Tensor) -> None:
        """Raises CorruptCheckpoint for NaN and Inf; the numbers are not kept in memory for it if they stay on disk."""
        for each in stored.view(-1).split(SLICE) if self.on_disk else (stored,):
            check_finite(self.checkpoint.source, key, each)
            if self.on_disk:
                give_back(extents([(each.data_ptr(), each.nbytes)]))

    def _is_same(self, key: str, other: str) -> bool:
        return key == other or torch.equal(self.checkpoint.read(key), self.checkpoint.read(other))

    def _read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor as it is stored, in the pages of its file, or a copy of another dtype."""
        if self.checkpoint.is_joined(key):
            return self.checkpoint.joined(key, dtype)
        stored = self.checkpoint.read(key)
        if stored.dtype == dtype:
            self._check_numbers(key, stored)
            return stored
        out = torch.empty(stored.shape, dtype=dtype)
        pairs = zip(stored.view(-1).split(SLICE // 8), out.view(-1).split(SLICE // 8), strict=True)
        for source, target in pairs:
            target.copy_(source)
            check_finite(self.checkpoint.source, key, target)
            self.checkpoint.forget(source)
        return out


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
