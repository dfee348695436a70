"""Linear layers over one or several weight matrices, with everything that follows them in one kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.errors import InvalidInput
from hfopt.kernels.linear import rows as kernels
from hfopt.kernels.linear.tiles import linear_tiles

from .activation import ACTIVATIONS, CODES
from .checks import (
    ELEMENTS,
    address_of,
    check_array,
    check_contiguous,
    check_floats,
    check_rows,
    check_shape,
    prepare_threads,
)
from .choice import Kernels, takes_torch
from .epilogue import PLAIN, Epilogue

_NO_RESIDUALS = np.empty(0, np.int64)


class Fingerprint(NamedTuple):
    """What must not change about a tensor while its address is in use."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Fingerprint | None":
        if tensor is None:
            return None
        return cls(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One or several `[out_i, in]` matrices with their biases, as kernels read them: in place, by address.

    The tensors are kept alive. Weights that are moved or replaced are noticed by `reads`; build a new record then.
    """

    table: np.ndarray
    in_features: int
    sizes: list[int]  # out_i of each
    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]
    fingerprints: tuple[Fingerprint | None, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> "LinearWeights":
        """Record of the matrices `weights` ([out_i, in] each) and `biases` ([out_i] or None each).

        Raises `InvalidInput` unless all are contiguous CPU tensors of one dtype, float32, bfloat16 or float16.
        """
        if not weights or len(biases) != len(weights):
            raise InvalidInput(
                f"weights and biases have {len(weights)} and {len(biases)} entries: as many are needed"
            )
        for index, weight in enumerate(weights):
            check_floats(f"weights[{index}]", weight, weights[0].dtype if index else None)
            if weight.ndim != 2:
                raise InvalidInput(f"weights[{index}] has shape {tuple(weight.shape)}: [out, in] is needed")
            check_shape(f"weights[{index}]", weight, (weight.shape[0], weights[0].shape[1]))
            check_contiguous(f"weights[{index}]", weight)
        dtype = weights[0].dtype
        table = np.zeros((len(weights), 4), np.int64)
        column = 0
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            address = 0 if bias is None else check_array(f"biases[{index}]", bias, (weight.shape[0],), dtype)
            table[index] = weight.data_ptr(), address, weight.shape[0], column
            column += weight.shape[0]
        tensors = (*weights, *biases)
        return cls(
            table=table,
            in_features=weights[0].shape[1],
            sizes=[weight.shape[0] for weight in weights],
            dtype=dtype,
            tensors=tensors,
            fingerprints=tuple(Fingerprint.of(tensor) for tensor in tensors),
        )

    def reads(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        """Whether the record still describes exactly these tensors."""
        return self.fingerprints == tuple(Fingerprint.of(tensor) for tensor in (*weights, *biases))

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `linear`."""
        x, out, addresses, n_rows = prepare_call(hidden_states, self, epilogue)
        if n_rows == 0:
            return out
        if by != "hfopt" and takes_torch(by, "linear", x.dtype, n_rows):
            return _linear_in_torch(x, self, epilogue)
        prepare_threads()
        kernel = kernels.linear_rows if n_rows <= kernels.ROW_LIMIT else linear_tiles
        kernel(
            ELEMENTS[x.dtype],
            address_of("hidden_states", x),
            n_rows,
            self.in_features,
            self.table,
            epilogue.gated,
            CODES[epilogue.activation],
            addresses,
            out.data_ptr(),
            out.shape[-1],
        )
        return out


class Weights(Protocol):
    """What `LinearWeights`, `QuantizedWeights` and `MixedWeights` have in common: [out_i, in] matrices with biases."""

    @property
    def in_features(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """That x needs to have; None: any."""

    @property
    def sizes(self) -> list[int]: ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]: ...

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor: ...


def width_of(sizes: Sequence[int], gated: bool) -> int:
    """Columns of the result for matrices of these sizes; raises `InvalidInput` if `gated` does not fit them."""
    if not gated:
        return sum(sizes)
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise InvalidInput(f"gated needs two matrices of one size: weights has rows {list(sizes)}")
    return sizes[0]


def prepare_call(
    hidden_states: Tensor, weights: Weights, epilogue: Epilogue[Tensor]
) -> tuple[Tensor, Tensor, np.ndarray, int]:
    """(x, memory of the result, addresses of the residuals, rows) of a call of `linear`, whose arguments are checked."""
    if epilogue.activation not in CODES:
        raise InvalidInput(
            f"activation is {epilogue.activation!r}: None or one of {sorted(k for k in CODES if k)} is allowed"
        )
    x = check_rows("hidden_states", hidden_states, weights.dtype)
    given = x.shape
    size = given[-1]
    if size != weights.in_features:
        raise InvalidInput(f"hidden_states has {size} features: the weights need {weights.in_features}")
    width = width_of(weights.sizes, epilogue.gated)
    shape = (*given[:-1], width)
    out = x.new_empty(*shape)
    addresses = _NO_RESIDUALS
    if epilogue.residuals:
        addresses = np.empty(len(epilogue.residuals), np.int64)
        for index, residual in enumerate(epilogue.residuals):
            addresses[index] = check_array(f"residuals[{index}]", residual, shape, x.dtype)
    n_rows = out.numel() // width if width else 0
    return x, out, addresses, n_rows


def linear(
    hidden_states: Tensor,
    weights: Weights,
    *,
    activation: str | None = None,
    gated: bool = False,
    residuals: Sequence[Tensor] = (),
    by: Kernels = "hfopt",
) -> Tensor:
    """y = act(x W^T + b) + residuals, the outputs of several matrices side by side.

    With `gated` (two matrices of one shape): y = act(x W0^T + b0) * (x W1^T + b1) + residuals. In hfopt's kernels sums,
    activation and residuals are float32 and are rounded once; torch rounds after each operation.

    Args:
        hidden_states: [..., in], the dtype of the weights, last dimension contiguous.
        weights: the matrices, [out_i, in] each.
        activation: None or a key of `ACTIVATIONS`.
        residuals: tensors of the result's shape and dtype, contiguous.
        by: "hfopt", "torch", or "auto": what is faster for this number of rows (see `choice`). Only hfopt's kernels
            multiply by quantised matrices.

    Returns:
        [..., sum of out_i], or [..., out] with `gated`.

    Raises:
        InvalidInput: for any other dtype, shape, layout, device or name.
    """
    return weights.multiply(hidden_states, Epilogue(activation, gated, residuals), by)


@torch.no_grad()
def _linear_in_torch(x: Tensor, weights: LinearWeights, epilogue: Epilogue[Tensor]) -> Tensor:
    """`linear` as the modules of transformers compute it."""
    n_matrices = len(weights.table)
    pairs = zip(weights.tensors[:n_matrices], weights.tensors[n_matrices:], strict=True)
    parts = [F.linear(x, weight, bias) for weight, bias in pairs]  # type: ignore[arg-type]
    y = parts[0] if epilogue.gated or n_matrices == 1 else torch.cat(parts, -1)
    if epilogue.activation is not None:
        y = ACTIVATIONS[epilogue.activation](y)
    if epilogue.gated:
        y *= parts[1]
    for residual in epilogue.residuals:
        y += residual
    return y
