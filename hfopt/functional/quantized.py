"""Linear layers over quantised weight matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.kernels.linear.quantized import MAX_TERMS
from hfopt.kernels.linear.quantized import quantized_linear as quantized_kernel
from hfopt.quantization.layout import ALIGNMENT, Layout, QuantizedMatrix, layout

from .activation import CODES
from .checks import ELEMENTS, check_array, check_floats, check_rows, prepare_threads
from .choice import Kernels
from .epilogue import PLAIN, Epilogue
from .linear import Fingerprint, prepare_call

Compute = Literal["int8", "float"]

_COMPUTE = ("float", "int8")


def _addresses(name: str, matrix: QuantizedMatrix, parts: Layout, group: int | None) -> dict[str, int]:
    """Addresses of the tensors of a packed matrix, which must be those of a layout."""
    for part in ("scales", "zeros"):
        if (getattr(matrix, part) is not None) != (part in parts):
            raise InvalidInput(
                f"{name}.{part} is {'missing' if part in parts else 'given'}: with group={group} there are "
                f"{'no ' if group is None else ''}scales, and zero points in all matrices or in none"
            )
    return {
        part: _check_part(f"{name}.{part}", getattr(matrix, part), shape, dtype)
        for part, (shape, dtype) in parts.items()
    }


def _check_part(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Address of a tensor of a packed matrix."""
    address = check_array(name, tensor, shape, dtype)
    if address % ALIGNMENT:
        raise InvalidInput(
            f"{name} starts {address % ALIGNMENT} bytes behind a multiple of {ALIGNMENT}: none are allowed"
        )
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        raise InvalidInput(f"{name} is {float(tensor[tuple(place)])} at {place}: it must be finite")
    return address


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """One or several packed matrices of one format with their biases, as kernels read them: in place, by address.

    The tensors are kept alive. Weights that are moved or replaced are noticed by `reads`; build a new record then.
    """

    table: np.ndarray  # int64 [matrices, 4]: codes, bias or 0, out features, first output column
    scaling: np.ndarray  # int64 [matrices, 3]: scales or 0, zero points or 0, scales of rows
    bits: int
    group: int  # 0: none
    levels: Tensor | None  # uint8 [16], 128 added
    order: Tensor | None  # int32 [in], of the inputs
    compute: str
    in_features: int
    sizes: list[int]  # out_i of each
    dtype: torch.dtype | None  # of biases, and so of x; None: either
    tensors: tuple[Tensor | None, ...]
    fingerprints: tuple[Fingerprint | None, ...]

    @classmethod
    def of(
        cls,
        matrices: Sequence[QuantizedMatrix],
        biases: Sequence[Tensor | None],
        *,
        in_features: int,
        bits: int,
        group: int | None = None,
        levels: Sequence[int] | None = None,
        compute: str = "int8",
    ) -> "QuantizedWeights":
        """Record of packed matrices and biases ([out_i] or None each).

        Args:
            in_features: of each matrix, without padding.
            bits: of a code, 8 or 4.
            group: inputs with a scale in common: a multiple of 32, above 128 only 256, 512, ...; None: whole rows.
            levels: 16 integers from -127 to 127 that 4-bit codes are indices into.
            compute: "int8": rows of x are quantised to 8 bits, with a scale for each group of at most 256 inputs
                (absmax / 127), and products are summed as integers; a NaN or Inf in a row makes all of its results NaN.
                "float": what that leaves of x is quantised again, once where x is bfloat16 and twice otherwise, up to
                254^-2 or 254^-3 of the largest input of a group.

        Raises:
            InvalidInput: unless all tensors are contiguous, in CPU memory, aligned to 64 bytes, of the shapes and dtypes of
                `QuantizedMatrix`, with finite scales, all matrices with zero points or none and in one order; biases of one
                dtype.
        """
        _checked_compute(compute)
        if not matrices or len(biases) != len(matrices):
            raise InvalidInput(
                f"matrices and biases have {len(matrices)} and {len(biases)} entries: as many are needed"
            )
        _check_sizes(bits, in_features, group)
        has_zeros = matrices[0].zeros is not None
        table, scaling = np.zeros((len(matrices), 4), np.int64), np.zeros((len(matrices), 3), np.int64)
        column = 0
        dtype = _dtype_of(biases)
        for index, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            name, size = f"matrices[{index}]", matrix.out_features
            if size < 1:
                raise InvalidInput(f"{name}.out_features is {size!r}: a positive number is needed")
            parts = layout(size, in_features, bits, group, has_zeros=has_zeros, ordered=False)
            places = _addresses(name, matrix, parts, group)
            address = 0 if bias is None else check_array(f"biases[{index}]", bias, (size,), dtype)
            table[index] = places["codes"], address, size, column
            scaling[index] = places.get("scales", 0), places.get("zeros", 0), places["row_scales"]
            column += size
        order = _common_order([matrix.order for matrix in matrices], in_features)
        shifted = _shift_levels(levels, bits, has_zeros)
        tensors = (*(part for matrix in matrices for part in matrix[1:]), *biases)
        return cls(
            table=table,
            scaling=scaling,
            bits=bits,
            group=group or 0,
            levels=shifted,
            order=order,
            compute=compute,
            in_features=in_features,
            sizes=[matrix.out_features for matrix in matrices],
            dtype=dtype,
            tensors=tensors,
            fingerprints=tuple(Fingerprint.of(tensor) for tensor in tensors),
        )

    def reads(self, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor | None]) -> bool:
        """Whether the record still describes exactly these tensors."""
        tensors = (*(part for matrix in matrices for part in matrix[1:]), *biases)
        return self.fingerprints == tuple(Fingerprint.of(tensor) for tensor in tensors)

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `linear.linear`; only hfopt has such kernels."""
        if self.order is not None:
            hidden_states, _ = check_rows("hidden_states", hidden_states, self.dtype)
            hidden_states = hidden_states.index_select(-1, self.order)
        x, address, out, addresses, n_rows = prepare_call(hidden_states, self, epilogue)
        if n_rows == 0:
            return out
        prepare_threads()
        quantized_kernel(
            ELEMENTS[x.dtype],
            address,
            n_rows,
            self.in_features,
            self.table,
            self.scaling,
            self.bits,
            self.group,
            0 if self.levels is None else self.levels.data_ptr(),
            terms_of(self.compute, x.dtype),
            epilogue.gated,
            CODES[epilogue.activation],
            addresses,
            out.data_ptr(),
            out.shape[-1],
        )
        return out


def _checked_compute(compute: str) -> str:
    if compute not in _COMPUTE:
        raise InvalidInput(f"compute is {compute!r}: one of {list(_COMPUTE)} is allowed")
    return compute


def _common_order(orders: Sequence[Tensor | None], in_features: int) -> Tensor | None:
    order = orders[0]
    if any((each is None) != (order is None) for each in orders):
        raise InvalidInput("order is given for some matrices: all or none need one")
    if order is None:
        return None
    for index, each in enumerate(orders):
        check_array(f"matrices[{index}].order", each, (in_features,), torch.int32)  # type: ignore[arg-type]
        if each is not order and not torch.equal(each, order):  # type: ignore[arg-type]
            raise InvalidInput(f"matrices[{index}].order is another than that of matrices[0]: one is needed")
    return order


def _dtype_of(biases: Sequence[Tensor | None]) -> torch.dtype | None:
    """dtype of the first bias; None without any."""
    for index, bias in enumerate(biases):
        if bias is not None:
            check_floats(f"biases[{index}]", bias)
            return bias.dtype
    return None


def _check_sizes(bits: int, in_features: int, group: int | None) -> None:
    if bits not in (4, 8):
        raise InvalidInput(f"bits is {bits!r}: 4 or 8 is allowed")
    if in_features < 1:
        raise InvalidInput(f"in_features is {in_features!r}: a positive number is needed")
    if group is None:
        return
    allowed = group > 0 and group % 32 == 0
    if group > 128:
        allowed = group & (group - 1) == 0
    if not allowed:
        raise InvalidInput(f"group is {group!r}: 32, 64, 96, 128, 256, 512 and so on, or None, is allowed")
    if in_features % group:
        raise InvalidInput(f"group is {group}: it must divide in_features, {in_features}")


def _shift_levels(levels: Sequence[int] | None, bits: int, has_zeros: bool) -> Tensor | None:
    """Levels as unsigned bytes with the zero point 128."""
    if levels is None:
        return None
    if bits != 4 or has_zeros:
        raise InvalidInput(
            f"levels are given with bits={bits}{' and zero points' if has_zeros else ''}: they need 4 bits and none"
        )
    if len(levels) != 16 or not all(-127 <= level <= 127 for level in levels):
        raise InvalidInput(f"levels is {list(levels)}: 16 integers from -127 to 127 are needed")
    return torch.tensor([level + 128 for level in levels], dtype=torch.uint8, device="cpu")


def terms_of(compute: str, dtype: torch.dtype) -> int:
    """Number of rows of 8-bit codes that a row of x is the sum of."""
    return 1 if compute == "int8" else MAX_TERMS[ELEMENTS[dtype].dtype.name]


def quantized_linear(
    hidden_states: Tensor,
    weights: QuantizedWeights,
    *,
    activation: str | None = None,
    gated: bool = False,
    residuals: Sequence[Tensor] = (),
    compute: str | None = None,
) -> Tensor:
    """y = act(x W^T + b) + residuals for quantised W, as `linear.linear`.

    Args:
        hidden_states: [..., in], of one of `DTYPES` (that of the biases), last dimension contiguous.
        weights: the matrices.
        activation: None or a key of `ACTIVATIONS`.
        gated: y = act(x W0^T + b0) * (x W1^T + b1) + residuals, for two matrices of one size.
        residuals: tensors of the result's shape and dtype, contiguous.
        compute: in place of that of the weights.

    Returns:
        [..., sum of out_i], or [..., out] with `gated`.

    Raises:
        InvalidInput: for any other dtype, shape, layout, device or name.
    """
    if compute is not None:
        weights = replace(weights, compute=_checked_compute(compute))
    return weights.multiply(hidden_states, Epilogue(activation, gated, residuals))
