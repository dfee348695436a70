"""Weight formats: each is a frozen config with its arithmetic, under a name in the registry.

A new format is one file: a frozen dataclass that derives from `Format`, decorated with `register`. Its fields are
what `config.json` holds; its methods say which scales to try, and how a quotient w / scale becomes a code and back.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch.nn.functional import pad

from hfopt.errors import InvalidInput, UnsupportedDevice
from hfopt.quantization.feedback import InputStatistics, compensate
from hfopt.quantization.layout import (
    BLOCK,
    blocks_to_codes,
    blocks_to_groups,
    ceil_div,
    codes_to_blocks,
    groups_to_blocks,
    inputs_per_unit,
)
from hfopt.quantization.packed import Packed, layout_of
from hfopt.quantization.search import Candidate, divide, reciprocal, search

COMPUTE = ("int8", "float")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Weights that are quantised at once. With fewer, calls cost more than arithmetic; with more, the caches are too small.
SLICE = 1 << 19
# The same where they are rounded one column after the other
FEEDBACK_SLICE = 1 << 22
# A row without a larger weight becomes zeros: its scales would lose their precision.
TINY = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A weight format; see `Int8`, `Int4`, `NF4`.

    group: inputs that share a scale, or None for one scale per output row. compute: "int8" multiplies by inputs that
    are quantised to 8 bits as well, for each row and group of at most 256 inputs; "float" by inputs of 16 bits where they
    are bfloat16, and of 24 where they are float32. Values outside of what is allowed raise InvalidInput.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    groups: ClassVar[tuple[int | None, ...]]
    zero_code: ClassVar[int]  # the code of 0 where groups have no zero points of their own
    levels: ClassVar[tuple[int, ...] | None] = (
        None  # what codes stand for, -127 to 127, if not for themselves
    )

    group: int | None
    compute: str

    def __post_init__(self) -> None:
        self._check("group", self.groups)
        self._check("compute", COMPUTE)

    def _check(self, field: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, field)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise InvalidInput(f"{field}={value!r} of format {self.name!r} must be one of {list(allowed)}")

    @property
    def has_zeros(self) -> bool:
        """Whether every group has a zero point of its own."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON, and the name under "format"."""
        return {"format": self.name, **asdict(self)}

    @abstractmethod
    def candidates(self, groups: torch.Tensor) -> Iterator[Candidate]:
        """Scales and zero points to try for weights [rows, n_groups, group]."""

    @abstractmethod
    def nearest(self, quotients: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The representable values next to quotients = weight / scale (+ the zero point of their group)."""

    @abstractmethod
    def encode(self, quotients: torch.Tensor) -> torch.Tensor:
        """The uint8 codes of these quotients; they may be overwritten."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """float32 values of uint8 codes, in units of the scale."""

    def pack(self, weight: torch.Tensor, inputs: InputStatistics | None = None) -> Packed:
        """Quantise a matrix [out, in] of float64, float32, bfloat16 or float16.

        inputs: what calibration has seen of the inputs, to make the error of the outputs small; None: that of the
        weights. A group that does not divide the inputs, NaN and Inf raise InvalidInput.
        """
        check_weight(weight)
        out_features, in_features = weight.shape
        layout = layout_of(self, out_features, in_features)
        if inputs is not None and len(inputs.mean_squares) != in_features:
            raise InvalidInput(
                f"inputs describes {len(inputs.mean_squares)} inputs: {in_features} are needed"
            )
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        step = max((SLICE if inputs is None else FEEDBACK_SLICE) // in_features // BLOCK, 1) * BLOCK
        for first in range(0, out_features, step):
            rows = weight[first : first + step].detach().float()
            magnitude = torch.maximum(rows.amax(1), -rows.amin(1))
            if not (finite := magnitude.isfinite()).all():
                raise InvalidInput(f"weight must be finite; row {first + int((~finite).nonzero()[0])} is not")
            blocks = slice(first // BLOCK, ceil_div(first + len(rows), BLOCK))
            for name, values in self._pack_rows(rows, magnitude, inputs).items():
                tensors[name][blocks] = values
        return Packed(self, out_features, in_features, **tensors)

    def _pack_rows(
        self, rows: torch.Tensor, magnitude: torch.Tensor, inputs: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        power = magnitude / (2 * torch.frexp(magnitude).mantissa)  # of two, so that dividing by it is exact
        power = torch.where(magnitude < TINY, 0, power)
        groups = (
            (rows * reciprocal(power)[:, None]).contiguous().view(len(rows), -1, self.group or rows.shape[1])
        )
        importance = None if inputs is None else _shares(inputs.mean_squares).view(groups.shape[1:])
        scale, zero = search(groups, self.candidates(groups), self.nearest, importance)
        peak = scale.abs().amax(1, keepdim=True) if self.group else scale
        relative = (scale * reciprocal(peak)).half()
        scale = relative.float() * peak
        if inputs is not None:
            groups = compensate(groups, scale, zero, self.nearest, inputs)
        codes = self.encode(divide(groups, reciprocal(scale), zero, out=torch.empty_like(groups)))
        return arrange(
            self,
            codes.view(rows.shape),
            row_scales=peak.view(-1) * power,
            scales=relative[:, :, 0] if self.group else None,
            zeros=None if zero is None else zero[:, :, 0].to(torch.uint8),
        )

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The matrix that a packed one stands for, float32 [out, in]."""
        out = torch.empty(packed.out_features, packed.in_features)
        step = max(SLICE // packed.in_features // BLOCK, 1)
        for first in range(0, len(packed.codes), step):
            blocks = slice(first, first + step)
            rows = out[first * BLOCK : (first + step) * BLOCK]
            codes = blocks_to_codes(packed.codes[blocks], self.bits)[: len(rows), : packed.in_features]
            groups = codes.reshape(len(rows), -1, self.group or packed.in_features)
            zero = (
                None if packed.zeros is None else blocks_to_groups(packed.zeros[blocks])[: len(rows), :, None]
            )
            values = self.decode(groups, zero)
            if packed.scales is not None:
                values *= blocks_to_groups(packed.scales[blocks])[: len(rows), :, None].float()
            values *= packed.row_scales[blocks].view(-1)[: len(rows), None, None]
            if packed.order is None:
                rows.copy_(values.view(rows.shape))
            else:
                rows[:, packed.order.long()] = values.view(rows.shape)
        return out


def _shares(mean_squares: torch.Tensor) -> torch.Tensor:
    """Shares of the largest, so that sums of them neither overflow nor vanish."""
    return mean_squares * reciprocal(mean_squares.max())


def check_weight(weight: torch.Tensor) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise InvalidInput(
            f"weight must be a matrix [out, in] that is not empty, got shape {list(weight.shape)}"
        )
    if weight.dtype not in FLOATS:
        raise InvalidInput(f"weight must be one of {[str(dtype) for dtype in FLOATS]}, got {weight.dtype}")
    if weight.device.type != "cpu":
        raise UnsupportedDevice(f"weight must be in CPU memory, got device {weight.device}")


def arrange(
    format: Format,
    codes: torch.Tensor,
    *,
    row_scales: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The tensors of a packed matrix from codes [rows, in], row_scales [rows], scales and zeros [rows, n_groups].

    Rows are filled up to whole blocks by ones of scale 0, and inputs to whole units by the zero point.
    """
    rows, in_features = codes.shape
    missing = -rows % BLOCK
    if extra := -in_features % inputs_per_unit(format.bits):
        fill = torch.full((rows, 1), format.zero_code, dtype=torch.uint8) if zeros is None else zeros[:, -1:]
        codes = torch.cat([codes, fill.expand(rows, extra)], dim=1)
    fill_code = format.zero_code if zeros is None else 0
    codes = pad(codes, (0, 0, 0, missing), value=fill_code)
    tensors = {
        "codes": codes_to_blocks(codes, format.bits),
        "row_scales": pad(row_scales, (0, missing)).view(-1, BLOCK),
    }
    if scales is not None:
        tensors["scales"] = groups_to_blocks(pad(scales, (0, 0, 0, missing)))
    if zeros is not None:
        tensors["zeros"] = groups_to_blocks(pad(zeros, (0, 0, 0, missing)))
    return tensors


FORMATS: dict[str, type[Format]] = {}
F = TypeVar("F", bound=type[Format])


def register(format: F) -> F:
    """Make a format known under its name; a class decorator.

    Example:
        >>> import hfopt
        >>> from dataclasses import dataclass
        >>> from typing import ClassVar
        >>> from hfopt.quantization import Int4, register
        >>> @register
        ... @dataclass(frozen=True, kw_only=True)
        ... class FineInt4(Int4):
        ...     name: ClassVar[str] = "int4-fine"
        ...     group: int | None = 32
        >>> hfopt.load(hfopt.embedded_model(), quantization="int4-fine").hfopt.quantized[0].format
        "FineInt4(group=32, compute='int8', symmetric=True)"
    """
    FORMATS[format.name] = format
    return format


def named(name: object) -> type[Format]:
    if not isinstance(name, str) or name not in FORMATS:
        raise InvalidInput(f"quantization format {name!r} is not known; formats are {sorted(FORMATS)}")
    return FORMATS[name]


def from_dict(values: Mapping[str, Any]) -> Format:
    """The format that `Format.to_dict` described; unknown names, fields and values raise InvalidInput."""
    rest = dict(values)
    format: Any = named(rest.pop("format", None))
    known = [field.name for field in fields(format)]
    if unknown := sorted(rest.keys() - set(known)):
        raise InvalidInput(f"format {format.name!r} has no options {unknown}; options are {known}")
    return format(**rest)


def resolve(quantization: "str | Mapping[str, Any] | Format") -> Format:
    """A format from its name (with the defaults), from a dictionary of `to_dict`, or as it is."""
    if isinstance(quantization, Format):
        return quantization
    if isinstance(quantization, Mapping):
        return from_dict(quantization)
    return from_dict({"format": quantization})
