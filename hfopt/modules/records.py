"""What follows from a module's weights, kept until they are others."""

from hfopt.functional import Weights


class Records:
    """Weights as kernels read them, by role. They are neither pickled nor copied: a copy of the module makes its own."""

    __slots__ = ("weights",)

    def __init__(self) -> None:
        self.weights: dict[str, Weights] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Records, ()
