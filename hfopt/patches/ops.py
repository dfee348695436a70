"""The verbs that blocks are written in, of which there are two kinds: `Eager` runs them on tensors, and the `Recorder` of a
program writes them down as instructions. A block reads like the model's own code and knows neither.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from hfopt.functional import Epilogue, Norm, Weights
from hfopt.functional.epilogue import PLAIN
from hfopt.functional.linear import Rows

X = TypeVar("X")


class Declined(Exception):
    """Kernels cannot do what is asked, and nothing has been touched: the original module has to."""


class Ops(Protocol[X]):
    """Operations on X: a tensor [rows, tokens, size], or the place of one in a program.

    Each raises Declined, or UnsupportedModel in words, where kernels cannot do it as the model is now.
    """

    def part(self, module: Any, name: str, x: X, residuals: Sequence[X] = ()) -> X:
        """The child `name` of the module, a function of x alone, plus the residuals."""

    def attention(self, module: Any, name: str, x: X, residuals: Sequence[X] = ()) -> X:
        """The child `name` of the module, which is attention, plus the residuals."""

    def weights(self, module: Any, role: str, names: Sequence[str], rows: Rows = ()) -> Weights:
        """The matrices of these Linears as one record, which is remembered under `role`; without names those of the module
        itself. rows: (first row, rows) of the matrices that a single Linear is read as.
        """

    def linear(self, x: X, weights: Weights, epilogue: Epilogue[X] = PLAIN) -> X:
        """`functional.linear`."""

    def activate(self, module: Any, name: str, x: X, weights: Weights, *, gated: bool = False) -> X:
        """A linear layer and the activation that the child `name` computes, as its epilogue where that can be."""

    def times_input(self, layer: Any, x: X) -> X:
        """x times what the model gives this layer of its own, besides the hidden states."""

    def norm(self, x: X, norm: Norm) -> X:
        """`functional.norm`."""

    def norm_heads(self, module: Any, qkv: X, path: str, first: int, count: int, size: int) -> None:
        """The norm at `path`, in place, of each of `count` heads of `size` channels from channel `first` on."""

    def clamp(self, x: X, limit: float) -> X:
        """`functional.clamp`."""

    def scale(self, x: X, factor: float, residual: X | None = None) -> X:
        """x * factor, plus the residual if there is one."""

    def past(self, attention: Any, x: X) -> Any:
        """Where keys and values of this attention are, its own or those of another layer, and what x needs besides: a mask,
        and angles of its positions.
        """

    def rotate(self, attention: Any, qkv: X, past: Any, n_heads: int) -> None:
        """Turn the first heads in place by the angles."""

    def store(self, attention: Any, qkv: X, past: Any, *, rotates: bool = True) -> Any:
        """Turn query and key heads in place by the angles, unless they are turned; put keys and values behind those of the
        past, which is returned with them.
        """

    def attend(self, attention: Any, qkv: X, past: Any) -> X:
        """Attention of the query heads over keys and values of the past, new ones included."""
