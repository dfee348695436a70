"""A whole decoder as a program: from the record of its family and its swapped modules to a flat list of instructions."""

from typing import Any

from torch import nn

from hfopt.errors import InvalidInput, UnsupportedModel
from hfopt.functional import Builder, Program, Slot, Table
from hfopt.patches.families import family_of
from hfopt.patches.families.family import Decoder
from hfopt.patches.guards import has_own_forward, is_bare
from hfopt.patches.layer import swapped


def build(model: nn.Module) -> Program:
    """The program of this model, as it is now; raises UnsupportedModel with what is in the way.

    Hooks on the model itself are for the caller to look at: they see a whole step, from outside.
    """
    family = family_of(model)
    if family is None:
        raise UnsupportedModel(f"{type(model).__name__} is no decoder that hfopt knows whole")
    for path, module in model.named_modules():
        if has_own_forward(module) or vars(module).get("_compiled_call_impl") is not None:
            raise UnsupportedModel(f"{path or 'the model'} has a forward of its own")
        is_called = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if path and is_called and not is_bare(module):
            raise UnsupportedModel(f"{path} is in training mode or has hooks")
    try:
        return _build(model, family.decoder)
    except InvalidInput as error:  # weights of several dtypes, say
        raise UnsupportedModel(str(error)) from error


def _build(model: Any, record: Decoder) -> Program:
    decoder: Any = model.get_submodule(record.path)
    tokens = _embedding(decoder, record.tokens)
    builder = Builder(tokens.rows.dtype)
    x = _through(builder, decoder, record.project_in, builder.look_up(tokens, "tokens"))
    if record.positions is not None:
        builder.add_looked_up(_embedding(decoder, record.positions), "positions", x)
    layers = decoder._modules[record.layers]
    angles = _angles(builder, decoder, record)
    for index in range(len(layers)):
        builder.layer = index
        x = swapped(layers, str(index)).emit(builder, x, angles)
    builder.layer = None
    x = _through(builder, decoder, record.norm, x)
    x = _through(builder, decoder, record.project_out, x)
    logits = swapped(model, record.head).emit(builder, x, is_last=True)
    return builder.program(len(layers), logits.size)


def _embedding(decoder: Any, name: str) -> Table:
    """What `decoder.name` looks up."""
    module = decoder._modules[name]
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise UnsupportedModel(f"{name} is a {type(module).__name__} that does more than look up")
    # tables of positions may begin with rows for other purposes
    return Table(module.weight.detach()[getattr(module, "offset", 0) :])


def _through(builder: Builder, decoder: Any, name: str | None, x: Slot) -> Slot:
    """What a part makes of x; x itself if the model has no such part."""
    if name is None or decoder._modules.get(name) is None:
        return x
    out: Slot = swapped(decoder, name).emit(builder, x)
    builder.release(x)
    return out


def _angles(builder: Builder, decoder: Any, record: Decoder) -> tuple[Slot, Slot] | None:
    """Slots of cos and sin of the positions, for all layers."""
    layers = decoder._modules[record.layers]
    if not len(layers):
        raise UnsupportedModel("it has no layers")
    first = swapped(layers, "0")
    rotary = None if record.rotary is None else decoder._modules.get(record.rotary)
    tables = swapped(first, first._hfopt.spec.attention).angle_tables(rotary, builder.dtype)
    if tables is None:
        return None
    cos, sin = (builder.look_up(table, "positions") for table in tables)
    return cos, sin
