"""What tests of the public building blocks have in common."""

import torch
from torch import Tensor

from tests.reference import Guarded


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """float32 within 1e-5 of a float64 result, bfloat16 and float16 within the tolerances of torch.testing."""
    bound = 1e-5 if ours.dtype is torch.float32 else None
    torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=bound, atol=bound)


def laid(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout: "rows" of a wider tensor, "steps" of two, "turned" last two dimensions."""
    if layout == "rows":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if layout == "steps":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    if layout == "turned":
        return tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    return tensor.clone()


LAYOUTS = ("contiguous", "rows", "steps", "turned")


def guarded(tensor: Tensor) -> Guarded:
    """A copy between guards."""
    found = Guarded(tensor.dtype, *tensor.shape)
    found.tensor.copy_(tensor)
    return found
