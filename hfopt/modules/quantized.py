"""Linear layers without a float weight: packed matrices as buffers of the module, which stays the same object."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hfopt import functional
from hfopt.errors import InvalidInput
from hfopt.functional import QuantizedWeights
from hfopt.functional.linear import Rows
from hfopt.host import Conv1D, Features
from hfopt.modules.guards import is_plain_inference, is_readable
from hfopt.modules.records import Records
from hfopt.quantization import Format, Packed, layout_of
from hfopt.quantization.layout import PARTS, QuantizedMatrix, aligned

PREFIX = "quantized_"  # of the names of the buffers
BUFFERS = tuple(PREFIX + name for name in PARTS)


class _Unpacked(torch.Tensor):
    """A weight that was unpacked to be read. What is written to it would be lost, so its `data` cannot be replaced."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise InvalidInput(
            "the weight of a quantised Linear cannot be written: merge adapters, or change weights, before quantising"
        )


class QuantizedLinear(nn.Linear):
    """`y = x W^T + b` for a packed W; made of a Linear or Conv1D by `quantize_linear` or `empty_linear`, by a change of its
    class.

    The tensors of `packed` are persistent buffers, `quantized_codes` and so on; a conversion of the model to another dtype
    leaves them as they are. There is no parameter `weight`: the attribute of this name is dequantised each time it is
    read, which is slow, and what is assigned to it is ignored, so that `tie_weights()` cannot undo the quantisation.
    """

    format: Format
    weight_dtype: torch.dtype  # of the attribute `weight`
    original: nn.Parameter | None  # the float weight, if it was kept
    float_class: type[nn.Module]  # what it was made of
    _own: Records

    @property
    def packed(self) -> Packed:
        """The matrix."""
        return Packed(self.format, self.out_features, self.in_features, **self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        buffers: Any = self._buffers
        return {name: buffers[PREFIX + name] for name in PARTS if PREFIX + name in buffers}

    @property
    def matrix(self) -> QuantizedMatrix:
        """The tensors that kernels read."""
        return QuantizedMatrix(self.out_features, **self._tensors())

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float weight [out, in] that the matrix stands for, of `weight_dtype`."""
        if self._buffers[BUFFERS[0]].is_meta:  # type: ignore[union-attr]
            return torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")
        return self._unpacked().as_subclass(_Unpacked)

    def _unpacked(self) -> torch.Tensor:
        return self.format.unpack(self.packed).to(self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shard = self.__dict__.get("shard")
        if shard is None:
            return self._multiply(input)
        y: torch.Tensor = shard.join(self._multiply(shard.cut(input)))
        return y

    def _multiply(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and is_plain_inference(self, (input,), {}):
            weights = read_quantized(self._own, "own", (self,))
            if weights is not None and is_readable(input, weights.dtype or input.dtype):
                return functional.quantized_linear(input.contiguous(), weights)
        return F.linear(input, self._unpacked().to(input.dtype), self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        packed: dict[str, torch.Tensor] = {
            name: tensor for name, tensor in self._buffers.items() if name in BUFFERS and tensor is not None
        }
        # conversions of floats leave bytes as they are
        self._buffers.update({name: tensor.view(torch.uint8) for name, tensor in packed.items()})
        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in packed.items():
                moved: Any = self._buffers[name]
                self._buffers[name] = moved.view(tensor.dtype) if moved.dtype is torch.uint8 else tensor
        self.weight_dtype = fn(torch.empty(1, dtype=self.weight_dtype)).dtype
        if self.original is not None:
            self.original.data = fn(self.original.data)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, errors = args
        for name in BUFFERS:
            tensor = state_dict.get(prefix + name)
            # kernels would compute something finite from it
            if isinstance(tensor, torch.Tensor) and not (tensor.is_meta or tensor.isfinite().all()):
                errors.append(f"{prefix}{name} holds NaN or Inf")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, tensor in self._tensors().items():
            self._buffers[PREFIX + name] = aligned(tensor)  # assign=True takes a tensor where it is

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"


def quantize_linear(linear: nn.Module, packed: Packed, *, keep_original: bool = False) -> None:
    """Make a Linear or Conv1D compute with a packed matrix; its float weight is freed, or kept in `original`.

    Raises InvalidInput for a matrix of another shape.
    """
    n_inputs, n_outputs = Features.of(linear)
    if (packed.out_features, packed.in_features) != (n_outputs, n_inputs):
        raise InvalidInput(
            f"packed is {packed.out_features} × {packed.in_features}: {n_outputs} × {n_inputs} is needed"
        )
    _change(linear, packed.format, packed.tensors(), keep_original)


def empty_linear(linear: nn.Module, format: Format, *, ordered: bool = False) -> None:
    """Make a Linear or Conv1D a quantised one with buffers on the device `meta`, for a checkpoint. ordered: with an `order`.

    Raises InvalidInput for a format whose groups do not divide the inputs.
    """
    n_inputs, n_outputs = Features.of(linear)
    layout = layout_of(format, n_outputs, n_inputs, ordered=ordered)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()
    }
    _change(linear, format, tensors, keep_original=False)


def _change(linear: nn.Module, format: Format, tensors: dict[str, torch.Tensor], keep_original: bool) -> None:
    weight: Any = linear._parameters.pop("weight")
    n_inputs, n_outputs = Features.of(linear)
    linear.__dict__.update(
        in_features=n_inputs,
        out_features=n_outputs,
        float_class=type(linear),
        format=format,
        weight_dtype=weight.dtype,
        original=weight if keep_original else None,
        _own=Records(),
    )
    if "shard" in linear.__dict__ and not keep_original:
        linear.__dict__["shard"].weights["weight"] = None  # the same memory, as transformers has it
    linear.__class__ = QuantizedLinear
    for name, tensor in tensors.items():
        linear.register_buffer(PREFIX + name, tensor)


def unquantize_linear(linear: Any) -> None:
    """Undo `quantize_linear` where the float weight was kept."""
    weight, kind = linear.original, linear.float_class
    for name in BUFFERS:
        linear._buffers.pop(name, None)
    names = ("format", "weight_dtype", "original", "float_class", "_own")
    for name in (*names, "in_features", "out_features") if kind is Conv1D else names:
        del linear.__dict__[name]
    linear.__class__ = kind
    parameters = {"weight": weight, **linear._parameters}
    linear._parameters.clear()
    linear._parameters.update(parameters)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is other or one is None or other is None:
        return one is other
    return torch.equal(one, other)


def read_quantized(
    record: Records, role: str, linears: Sequence[QuantizedLinear], rows: Rows = ()
) -> QuantizedWeights | None:
    """The packed matrices of these Linears as one record, or None where kernels cannot read them together.

    rows: (first row, rows) of the matrices that a single Linear is read as.
    """
    format, in_features = linears[0].format, linears[0].in_features
    parts = [_split(linear, rows) for linear in linears]
    if any(linear.format != format for linear in linears) or None in parts:
        record.weights.pop(role, None)
        return None
    matrices, biases = zip(*(each for part in parts for each in part or ()), strict=True)
    return read_matrices(record, role, format, in_features, matrices, biases)


def _split(linear: QuantizedLinear, rows: Rows) -> list[tuple[QuantizedMatrix, torch.Tensor | None]] | None:
    """The matrix and its bias, or these rows of both; None where rows begin within a block."""
    matrix, bias = linear.matrix, linear._parameters["bias"]
    if not rows:
        return [(matrix, bias)]
    parts = [matrix.rows(first, n) for first, n in rows]
    biases = [None if bias is None else bias.detach()[first : first + n] for first, n in rows]
    found = [(part, each) for part, each in zip(parts, biases, strict=True) if part is not None]
    return None if len(found) < len(rows) else found


def read_matrices(
    record: Records,
    role: str,
    format: Format,
    in_features: int,
    matrices: Sequence[QuantizedMatrix],
    biases: Sequence[torch.Tensor | None],
) -> QuantizedWeights | None:
    """Matrices of one format, such as `QuantizedLinear.matrix` or rows of it, as one record under `role`.

    The record is made anew when it does not read exactly these tensors any more. None where kernels cannot read them
    together.
    """
    order = matrices[0].order
    are_alike = all(_equal(order, matrix.order) for matrix in matrices)
    known = record.weights.get(role)
    if (
        are_alike
        and isinstance(known, QuantizedWeights)
        and known.compute == format.compute
        and known.reads(matrices, biases)
    ):
        return known
    # a stale record would keep the old weights in memory
    record.weights.pop(role, None)
    if not are_alike:
        return None
    try:
        known = record.weights[role] = QuantizedWeights.of(
            matrices,
            biases,
            in_features=in_features,
            bits=format.bits,
            group=format.group,
            levels=format.levels,
            compute=format.compute,
        )
    except InvalidInput:
        return None
    return known
