"""Numbers and switches that are arguments, as kernels and torch's operations get them."""

import math
import operator
from typing import Any

import numpy as np
import torch

from hfopt.errors import InvalidInput

_NUMBERS, _SWITCHES = (int, float, np.integer, np.floating), (int, np.bool_)
_LARGEST = torch.finfo(torch.float32).max


def integer(name: str, value: Any) -> int:
    """An integer, of Python, numpy or one in a tensor; raises `InvalidInput` for anything else, switches too."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    raise InvalidInput(f"{name} is {_in_words(value)}: an integer is needed")


def finite(name: str, value: Any, least: float = -math.inf) -> float:
    """A number from `least` on, finite in float32, or one in a tensor; raises `InvalidInput` for anything else."""
    if type(value) is float and least <= value <= _LARGEST and value >= -_LARGEST:
        return value
    if isinstance(value, torch.Tensor) and value.is_cpu and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, _NUMBERS) and not isinstance(value, bool)
    if not is_number or not max(least, -_LARGEST) <= value <= _LARGEST:
        limit = "" if least == -math.inf else f" from {least} on"
        raise InvalidInput(f"{name} is {_in_words(value)}: a finite number{limit} is needed")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A switch; raises `InvalidInput` for anything but True and False, or 1 and 0."""
    if value is True or value is False:
        return value
    if not isinstance(value, _SWITCHES) or value not in (0, 1):
        raise InvalidInput(f"{name} is {_in_words(value)}: True or False is allowed")
    return bool(value)


def _in_words(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
