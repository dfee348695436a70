"""What a decoder looks up for tokens and positions, as tables: read off its modules, and tried on them."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hfopt.errors import UnsupportedModel
from hfopt.program.program import Table
from hfopt.words import DTYPES, dtype_name

_N_TRIED = 64  # rows
_TABLE = "weights"  # a buffer of positions that are computed, and of more if there are more
_POSITIONS = "position_ids"


def token_table(name: str, module: Any, scale: str | None) -> Table:
    """What `module` looks up, which is torch's own, or multiplies by its attribute `scale` besides."""
    _check(name, module)
    if _class_of(module) is not nn.Embedding and not (scale is not None and _scales(module, scale)):
        raise _does_more(name, module)
    return Table(module.weight.detach(), shard=vars(module).get("shard"))


def _class_of(module: Any) -> type[nn.Embedding]:
    """That of the whole, of one that processes have parts of."""
    kind: type[nn.Embedding] = getattr(module, "host_class", type(module))
    return kind


def scale_of(module: Any, name: str | None) -> float | None:
    """What tokens are multiplied by, rounded to the dtype of the weights, if the module does that itself."""
    scale = None if name is None else getattr(module, name, None)
    return None if scale is None else float(torch.as_tensor(scale).to(module.weight.dtype))


def position_table(name: str, module: Any, dtype: torch.dtype) -> Table:
    """What `module` gives for positions 0, 1, ...; the first rows of what it holds may be for other purposes."""
    offset = vars(module).get("offset", 0)
    if isinstance(module, nn.Embedding):
        _check(name, module)
        rows = module.weight.detach()[offset:]
        is_known = type(module) is nn.Embedding or torch.equal(
            _positions(name, module, min(len(rows), _N_TRIED)), rows[:_N_TRIED]
        )
        if not is_known:
            raise _does_more(name, module)
        return Table(rows)
    if module._buffers.get(_TABLE) is None:
        raise _does_more(name, module)
    return Table(
        _positions(name, module, _N_TRIED).to(dtype), lambda n: _positions(name, module, n).to(dtype)
    )


def _check(name: str, module: Any) -> None:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise _does_more(name, module)
    if module.weight.dtype not in DTYPES:
        raise UnsupportedModel(f"its weights are {dtype_name(module.weight.dtype)}")


def _does_more(name: str, module: Any) -> UnsupportedModel:
    return UnsupportedModel(f"{name} is a {type(module).__name__} that does more than look up")


def _scales(module: Any, name: str) -> bool:
    """Whether it looks up, and multiplies by what it has under this name."""
    ids = torch.arange(min(len(module.weight), _N_TRIED), device="cpu")
    factor = torch.as_tensor(getattr(module, name, torch.nan)).to(module.weight.dtype)
    with torch.no_grad():
        return torch.equal(_class_of(module).forward(module, ids), module.weight[ids] * factor)


def _positions(name: str, module: nn.Module, n: int) -> Tensor:
    """What it gives for n positions, [n, size]."""
    forward: Any = type(module).forward
    twin = copy.copy(module)  # some write into their buffers
    twin._buffers = dict(module._buffers)
    positions = torch.arange(n, device="cpu")[None]
    given = {
        argument: positions if argument == _POSITIONS else torch.ones_like(positions)
        for argument, each in list(inspect.signature(forward).parameters.items())[1:]
        if argument == _POSITIONS or each.default is each.empty
    }
    if _POSITIONS not in given:
        raise _does_more(name, module)
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = forward(twin, **given)
    return found.reshape(n, -1).contiguous()
