"""A stream of a model: what its parts are, and where calls of the model find their turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.host import is_sharded, local_part
from hfopt.machine import pages
from hfopt.machine.memory import available_memory
from hfopt.streaming.budget import split
from hfopt.streaming.stream import LayerStream, Part, Turn

_STREAM, _TURN = "_hfopt_stream", "_hfopt_turn"  # attributes of a model, and of its layers and head
_SHARE = 0.8  # of the memory that is there, for weights
_LEAST = 1 << 17  # bytes of an extent; smaller ones stay, since to fetch them takes longer than to read them


@dataclass(frozen=True)
class DiskUse:
    """What a model with weights on disk holds in memory, and what each step reads; all in bytes.

    budget: that was allowed for weights. kept: of weights that stay in memory; passing: of room for those that come and go.
    step: that are read from disk in each step. present: of weights in files that are in memory now. rate: at which they have
    been read so far, a second, or None.
    """

    budget: int
    kept: int
    passing: int
    step: int
    present: int
    rate: float | None

    def __str__(self) -> str:
        held = f"weights have {_mib(self.budget)} of memory: {_mib(self.kept)} stay"
        if not self.step:
            return f"{held}, nothing is read again"
        time = (
            ""
            if self.rate is None
            else f", so far at {self.rate / 1e9:.2f} GB/s: {self.step / self.rate:,.2f} s"
        )
        return (
            f"{held}, {_mib(self.passing)} for what comes and goes; "
            f"each step reads {_mib(self.step)} from disk{time}; {_mib(self.present)} are in memory now"
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def attach(model: Any, budget: int | None, n_processes: int = 1) -> None:
    """Let the layers and the head of a model come from the files that its weights are mapped from.

    budget: bytes of memory for weights; None for four fifths of what is available, shared out to the processes of this
    machine that load such a model. Raises `InvalidInput` if the largest
    layer does not fit, and `UnsupportedModel` for a model without a list of layers.
    """
    budget = int(_SHARE * available_memory() / n_processes) if budget is None else budget
    modules = _parts(model)
    owned = [_tensors(module) for module in modules.values()]
    counts = Counter(address for tensors in owned for address in tensors)
    everything = _tensors(model)
    parts = []
    for name, tensors in zip(modules, owned, strict=True):
        # what several layers share stays
        own = [each for address, each in tensors.items() if counts[address] == 1]
        found = pages.extents((each.data_ptr(), each.nbytes) for each in own)
        parts.append(Part(name, tuple(each for each in found if each.n_bytes >= _LEAST)))
    looked_up = _looked_up(model, owned)
    held = sum(each.nbytes for each in everything.values()) - sum(part.n_bytes for part in parts)
    held -= sum(each.nbytes for each in looked_up)
    sizes = [part.n_bytes for part in parts]
    chosen = split(sizes, budget - held)
    if chosen is None:
        raise InvalidInput(
            f"max_memory leaves {_mib(budget)} for weights: {_mib(max(sizes) + held)} are needed at least, for the largest "
            f"part ({parts[sizes.index(max(sizes))].name}) and {_mib(held)} that are always in memory"
        )
    for each in pages.extents((each.data_ptr(), each.nbytes) for each in looked_up):
        pages.read_alone(each)
    owners = [each.untyped_storage() for each in everything.values()]
    stream = LayerStream(parts, chosen, owners, budget, held)
    for module, turn in zip(modules.values(), stream.turns, strict=True):
        module.__dict__[_TURN] = turn
    model.__dict__[_STREAM] = stream


def _parts(model: Any) -> dict[str, nn.Module]:
    """The layers in order, and the head, by their paths."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (
        (path, each)
        for path, each in model.named_modules()
        if isinstance(each, nn.ModuleList) and len(each) == depth
    )
    path, layers = next(lists, (None, None))
    head = model.get_output_embeddings()
    if layers is None or head is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of layers, or no head, to be read from disk in turn"
        )
    found = {f"{path}.{number}": layer for number, layer in enumerate(layers)}
    return {**found, next(name for name, each in model.named_modules() if each is head): head}


def _tensors(module: nn.Module) -> dict[int, Tensor]:
    """Its parameters and buffers, by their addresses."""
    found = (
        local_part(each) if is_sharded(each) else each.detach()
        for each in (*module.parameters(), *module.buffers())
    )
    return {each.data_ptr(): each for each in found}


def _looked_up(model: nn.Module, owned: Iterable[dict[int, Tensor]]) -> list[Tensor]:
    """Tables of which steps read single rows."""
    known = {address for tensors in owned for address in tensors}
    tables = (_tensors(each) for each in model.modules() if isinstance(each, nn.Embedding))
    return [each for table in tables for address, each in table.items() if address not in known]


def settle(model: nn.Module) -> None:
    """Let go of what the proofs of a model have read outside the turns of its stream."""
    stream = stream_of(model)
    if stream is not None:
        stream.clear()


def detach(model: nn.Module) -> None:
    """Leave it to the system what is in memory."""
    model.__dict__.pop(_STREAM, None)
    for module in model.modules():
        module.__dict__.pop(_TURN, None)


def stream_of(model: nn.Module) -> LayerStream | None:
    """The stream of a model's layers; None if its weights are in memory."""
    found: LayerStream | None = model.__dict__.get(_STREAM)
    return found


def turn_of(module: nn.Module) -> Turn | None:
    """The block in which the weights of this module are in memory; None where there is nothing to wait for."""
    found: Turn | None = module.__dict__.get(_TURN)
    return found


def disk_use(model: nn.Module) -> DiskUse | None:
    """What a model with a stream reads; None without one."""
    stream = stream_of(model)
    if stream is None:
        return None
    extents = [each for part in stream.parts for each in part.extents]
    return DiskUse(
        budget=stream.budget,
        kept=stream.held + sum(part.n_bytes for part in stream.parts) - stream.step_bytes,
        passing=stream.split.window,
        step=stream.step_bytes,
        present=pages.bytes_in_memory(extents),
        rate=stream.rate,
    )
