"""Linear layers with what follows them in the same kernel, under the names of `ipex.llm.modules`."""

from torch import Tensor, nn

from hfopt.modules.fused_linear import FusedLinear


class _Activated(FusedLinear):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear=linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.compute(x, {})


class LinearSilu(_Activated):
    """`silu(linear(x))`, where `silu(y) = y / (1 + e^-y)` (https://arxiv.org/abs/1702.03118).

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] gives [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearSilu
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearSilu(linear)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    activation = "silu"


class LinearRelu(_Activated):
    """`relu(linear(x))`, where `relu(y) = max(y, 0)`.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] gives [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearRelu
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearRelu(linear)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    activation = "relu"


class LinearGelu(_Activated):
    """`gelu(linear(x))`, where `gelu(y) = y (1 + erf(y / sqrt(2))) / 2` (https://arxiv.org/abs/1606.08415).

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] gives [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearGelu
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearGelu(linear)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    activation = "gelu"


class LinearNewGelu(_Activated):
    """`gelu(linear(x))`, where `gelu(y) = y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) / 2`, as in GPT-2.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] gives [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearNewGelu
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearNewGelu(linear)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    activation = "gelu_tanh"


class _Multiplied(FusedLinear):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear=linear)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in], y [..., out] -> [..., out]."""
        return self.compute(x, {}, {"y": y})


class LinearSiluMul(_Multiplied):
    """`silu(linear(x)) * y`, the gate of SwiGLU (https://arxiv.org/abs/2002.05202); `linear(x)` is rounded first.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] and y [..., out] give [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearSiluMul
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearSiluMul(linear)(torch.randn(2, 8), torch.randn(2, 16)).shape
    torch.Size([2, 16])
    """

    activation = "silu"


class LinearMul(_Multiplied):
    """`linear(x) * y`; `linear(x)` is rounded first.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] and y [..., out] give [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearMul
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearMul(linear)(torch.randn(2, 8), torch.randn(2, 16)).shape
    torch.Size([2, 16])
    """


class LinearAdd(FusedLinear):
    """`linear(x) + y`, such as a projection and its residual connection.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in] and y [..., out] give [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearAdd
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearAdd(linear)(torch.randn(2, 8), torch.randn(2, 16)).shape
    torch.Size([2, 16])
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear=linear)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in], y [..., out] -> [..., out]."""
        return self.compute(x, {"y": y})


class LinearAddAdd(FusedLinear):
    """`linear(x) + y + z`, as a layer with a parallel residual connection (GPT-J) needs it.

    See `FusedLinear` for what a Linear may be, for rounding and for errors. x [..., in], y and z [..., out] give [..., out].

    >>> import torch
    >>> from hfopt.modules import LinearAddAdd
    >>> linear = torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     LinearAddAdd(linear)(torch.randn(2, 8), *torch.randn(2, 2, 16)).shape
    torch.Size([2, 16])
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear=linear)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """x [..., in], y and z [..., out] -> [..., out]."""
        return self.compute(x, {"y": y, "z": z})


class Linear2SiluMul(FusedLinear):
    """`silu(linear_s(x)) * linear_m(x)`, the first half of SwiGLU (https://arxiv.org/abs/2002.05202), in one kernel.

    linear_s is the gate, linear_m what it is multiplied with, of one size. See `FusedLinear` for what a Linear may be, for
    rounding and for errors. x [..., in] gives [..., out].

    >>> import torch
    >>> from hfopt.modules import Linear2SiluMul
    >>> gate, up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    >>> with torch.no_grad():
    ...     Linear2SiluMul(gate, up)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    activation = "silu"

    def __init__(self, linear_s: nn.Module, linear_m: nn.Module) -> None:
        super().__init__(linear_s=linear_s, linear_m=linear_m)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.compute(x, {})
