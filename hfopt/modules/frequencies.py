"""The frequencies of all kinds of RoPE, and up to which position they go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfopt.errors import InvalidInput
from hfopt.host import frequencies

_DYNAMIC, _LONG, _YARN = "dynamic", "longrope", "yarn"
_FIRST_LENGTH = "original_max_position_embeddings"
# what each kind has to be told
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    _DYNAMIC: ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _FIRST_LENGTH),
    _YARN: (),
    _LONG: ("short_factor", "long_factor", _FIRST_LENGTH),
}
_OLD_NAMES = {"su": _LONG}
_STRETCHED = ("linear", _DYNAMIC, _YARN)  # max_position_embeddings times the factor is what they reach


@dataclass(frozen=True)
class Frequencies:
    """A kind of RoPE with its numbers.

    limit: positions that it reaches. A *variant* is None for frequencies that all texts share, else the length of a text
    that has others.
    """

    kind: str
    size: int
    base: float
    max_length: int
    settings: Mapping[str, Any]
    limit: int

    @classmethod
    def of(cls, max_length: int, size: int, base: float, settings: dict[str, Any]) -> "Frequencies":
        """Raises `InvalidInput` for names and numbers that make none."""
        if not isinstance(max_length, int) or max_length < 1:
            raise InvalidInput(f"max_position_embeddings is {max_length!r}: a positive integer is needed")
        if not isinstance(size, int) or size < 2 or size % 2:
            raise InvalidInput(f"pos_embd_dim is {size!r}: a positive even integer is needed")
        _check_positive("base", base)
        kind = settings.get("rope_type") or settings.get("type") or "default"
        kind = _OLD_NAMES.get(kind, kind)
        if kind not in _NEEDS:
            raise InvalidInput(
                f"extra_rope_config has rope_type {kind!r}: one of {sorted(_NEEDS)} is allowed"
            )
        settings = {name: value for name, value in settings.items() if value is not None}
        _fill(kind, settings, max_length)
        _check(kind, settings, size)
        stretch = max(1.0, settings["factor"]) if kind in _STRETCHED else 1.0
        return cls(kind, size, float(base), max_length, settings, math.ceil(max_length * stretch))

    def check_length(self, least: int, most: int, seq_len: int | None) -> int:
        """Length of a text with these positions; raises `InvalidInput` where there are none such."""
        if least < 0 or most >= self.limit:
            wrong = least if least < 0 else most
            raise InvalidInput(f"position_ids holds {wrong}: 0 to {self.limit - 1} are allowed")
        if seq_len is None:
            return most + 1
        if not isinstance(seq_len, int) or not 0 <= seq_len <= self.limit:
            raise InvalidInput(f"seq_len is {seq_len!r}: 0 to {self.limit} are allowed")
        return max(seq_len, most + 1)

    def variant(self, length: int) -> int | None:
        """That of a text of this length."""
        if self.kind == _DYNAMIC and length > self.max_length:
            return length
        if self.kind == _LONG and length > self.settings[_FIRST_LENGTH]:
            return int(self.settings[_FIRST_LENGTH]) + 1
        return None

    def is_for_one_length(self, variant: int | None) -> bool:
        """Whether the next token will have others, so that a table of all positions would be made for each."""
        return self.kind == _DYNAMIC and variant is not None

    def angles(self, variant: int | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [*positions, size / 2]."""
        found, factor = frequencies(self.kind, self.settings, self.size, self.base, self.max_length, variant)
        turned = positions[..., None].float() * found
        return turned.cos() * factor, turned.sin() * factor

    def __str__(self) -> str:
        return f"{self.kind}, size={self.size}, base={self.base:g}, positions={self.limit}"


def _fill(kind: str, settings: dict[str, Any], max_length: int) -> None:
    """What a yarn may leave out, since one follows from the other."""
    if kind != _YARN:
        return
    if "factor" not in settings and _FIRST_LENGTH not in settings:
        raise InvalidInput(
            f"extra_rope_config of 'yarn' has neither factor nor {_FIRST_LENGTH}: one is needed"
        )
    settings.setdefault(_FIRST_LENGTH, max_length)
    _check_positive(_FIRST_LENGTH, settings[_FIRST_LENGTH])
    settings.setdefault("factor", max_length / settings[_FIRST_LENGTH])


def _check(kind: str, settings: Mapping[str, Any], size: int) -> None:
    missing = [name for name in _NEEDS[kind] if name not in settings]
    if missing:
        raise InvalidInput(f"extra_rope_config of {kind!r} has no {' and no '.join(missing)}")
    for name, value in settings.items():
        if name in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple) or len(value) != size // 2:
                given = len(value) if isinstance(value, list | tuple) else type(value).__name__
                raise InvalidInput(f"{name} is {given}: {size // 2} numbers are needed")
            for each in value:
                _check_positive(name, each)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_positive(name, value)
    if kind == "dynamic" and size < 4:
        raise InvalidInput(f"pos_embd_dim is {size}: 4 and more are needed for 'dynamic'")
    low, high = settings.get("low_freq_factor"), settings.get("high_freq_factor")
    if kind == "llama3" and low == high:
        raise InvalidInput(f"high_freq_factor is {high}: another than low_freq_factor is needed")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidInput(f"{name} is {value!r}: a positive finite number is needed")
