"""Numbers and switches as callers give them: Python's, numpy's, or tensors of one element."""

import math
import operator
from typing import Any

import numpy as np

from hfopt.errors import InvalidInput

_LARGEST = float(np.finfo(np.float32).max)


def whole(name: str, given: Any) -> int:
    """Raises `InvalidInput` for what is no integer."""
    try:
        return operator.index(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} is {_in_words(given)}: an integer is needed") from error


def finite(name: str, given: Any) -> float:
    """Raises `InvalidInput` for what is no number, and for what float32 cannot hold."""
    try:
        number = float(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"{name} is {_in_words(given)}: a number is needed") from error
    if math.isnan(number) or abs(number) > _LARGEST:
        raise InvalidInput(f"{name} is {number}: a finite number of float32 is needed")
    return number


def switch(name: str, given: Any) -> bool:
    """Raises `InvalidInput` for what is neither True nor False, nor 1 or 0."""
    if isinstance(given, bool | np.bool_ | int) and given in (0, 1):
        return bool(given)
    raise InvalidInput(f"{name} is {_in_words(given)}: True or False is needed")


def _in_words(given: Any) -> str:
    return repr(given) if isinstance(given, str | int | float) else f"a {type(given).__name__}"
