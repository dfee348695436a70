"""Linear layers over one or several weight matrices, with everything that follows them in one kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

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

Rows: TypeAlias = tuple[tuple[int, int], ...]

_NO_RESIDUALS = np.empty(0, np.int64)


class Fingerprint(NamedTuple):
    """What must not change about a tensor while its address is in use."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    room: int  # bytes of its storage: another one, smaller, may come to lie at the same address

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Fingerprint | None":
        if tensor is None:
            return None
        room = tensor.untyped_storage().nbytes()
        return cls(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), room)


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One or several `[out_i, in]` matrices with their biases, as kernels read them: in place, by address.

    The tensors are kept alive. Weights that are moved or replaced are noticed by `reads`; build a new record then.
    rows: where the matrices lie in a single tensor that holds them all, (first row, rows) each; else empty.
    """

    table: np.ndarray
    in_features: int
    sizes: list[int]  # out_i of each
    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]
    fingerprints: tuple[Fingerprint | None, ...]
    rows: Rows = ()

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None], rows: Rows = ()
    ) -> "LinearWeights":
        """Record of the matrices `weights` ([out_i, in] each) and `biases` ([out_i] or None each).

        rows: (first row, rows) of the matrices that a single weight is to be read as. Raises `InvalidInput` unless all are
        contiguous CPU tensors of one dtype, of `DTYPES`, and for rows that the weight has not.
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
        dtype, n_inputs = weights[0].dtype, weights[0].shape[1]
        entries = []
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            address = 0 if bias is None else check_array(f"biases[{index}]", bias, (weight.shape[0],), dtype)
            entries.append((address_of(f"weights[{index}]", weight), address, weight.shape[0]))
        if rows:
            _check_rows(rows, weights)
            ((weight_at, bias_at, _),) = entries
            entries = [
                (
                    weight_at + first * n_inputs * dtype.itemsize,
                    bias_at and bias_at + first * dtype.itemsize,
                    n,
                )
                for first, n in rows
            ]
        sizes = [n for *_, n in entries]
        columns = [sum(sizes[:place]) for place in range(len(sizes))]
        tensors = (*weights, *biases)
        table = [(*entry, column) for entry, column in zip(entries, columns, strict=True)]
        return cls(
            # parts of one matrix in the order of memory: what is asked for in advance is what comes next there; of two the
            # first may be a gate
            table=np.array(sorted(table) if len(rows) > 2 else table, np.int64),
            in_features=n_inputs,
            sizes=sizes,
            dtype=dtype,
            tensors=tensors,
            fingerprints=tuple(Fingerprint.of(tensor) for tensor in tensors),
            rows=rows,
        )

    def reads(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        """Whether the record still describes exactly these tensors."""
        return self.fingerprints == tuple(Fingerprint.of(tensor) for tensor in (*weights, *biases))

    def multiply(
        self, hidden_states: Tensor, epilogue: Epilogue[Tensor] = PLAIN, by: Kernels = "hfopt"
    ) -> Tensor:
        """See `linear`."""
        x, address, out, addresses, n_rows = prepare_call(hidden_states, self, epilogue)
        if n_rows == 0:
            return out
        if by != "hfopt" and takes_torch(by, "linear", x.dtype, n_rows):
            return _linear_in_torch(x, self, epilogue)
        prepare_threads()
        kernel = kernels.linear_rows if n_rows <= kernels.ROW_LIMIT else linear_tiles
        kernel(
            ELEMENTS[x.dtype],
            address,
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


def _check_rows(rows: Rows, weights: Sequence[Tensor]) -> None:
    if len(weights) != 1:
        raise InvalidInput(f"rows are given for {len(weights)} weights: they are of one")
    n_rows = weights[0].shape[0]
    wrong = next(((first, n) for first, n in rows if first < 0 or n < 0 or first + n > n_rows), None)
    if wrong is not None:
        raise InvalidInput(f"rows has {wrong[1]} from {wrong[0]} on: the weight has {n_rows}")


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
) -> tuple[Tensor, int, Tensor, np.ndarray, int]:
    """(x, its address, memory of the result, addresses of residuals, rows) of a call of `linear`, its arguments checked."""
    if epilogue.activation not in CODES:
        raise InvalidInput(
            f"activation is {epilogue.activation!r}: None or one of {sorted(k for k in CODES if k)} is allowed"
        )
    x, address = check_rows("hidden_states", hidden_states, weights.dtype)
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
    return x, address, out, addresses, n_rows


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
    n_weights = len(weights.tensors) // 2
    pairs = zip(weights.tensors[:n_weights], weights.tensors[n_weights:], strict=True)
    parts = [F.linear(x, weight, bias) for weight, bias in pairs]  # type: ignore[arg-type]
    if weights.rows:
        (whole,) = parts
        parts = [whole[..., first : first + n] for first, n in weights.rows]
    y = parts[0] if epilogue.gated or len(parts) == 1 else torch.cat(parts, -1)
    if epilogue.activation is not None:
        y = ACTIVATIONS[epilogue.activation](y)
    if epilogue.gated:
        y *= parts[1]
    for residual in epilogue.residuals:
        y += residual
    return y
