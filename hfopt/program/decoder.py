"""A whole decoder as a program: from the record of its family and its swapped modules to a flat list of instructions."""

from typing import Any

from torch import nn

from hfopt.errors import HfoptError, InvalidInput, UnsupportedModel
from hfopt.patches.facts import names_read
from hfopt.patches.families import family_of
from hfopt.patches.families.family import Decoder
from hfopt.patches.guards import DO_NOTHING, DTYPES, has_own_forward, is_bare
from hfopt.patches.layer import swapped
from hfopt.program.builder import Builder
from hfopt.program.program import Program, Table
from hfopt.program.writer import Slot


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
    except HfoptError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"it cannot be read ({type(error).__name__}: {error})") from error


def _build(model: Any, record: Decoder) -> Program:
    decoder: Any = model.get_submodule(record.path)
    _check_children(decoder, record)
    tokens = _embedding(decoder, record.tokens)
    builder = Builder(tokens.rows.dtype)
    x = _through(builder, decoder, record.project_in, builder.look_up(tokens, "tokens"))
    if record.positions is not None:
        builder.add_looked_up(_embedding(decoder, record.positions), "positions", x)
    layers = _layers(decoder, record)
    angles = _angles(builder, decoder, layers, record)
    for index, layer in enumerate(layers):
        builder.layer = index
        x = layer.emit(builder, x, angles)
    builder.layer = None
    x = _through(builder, decoder, record.norm, x)
    x = _through(builder, decoder, record.project_out, x)
    logits = swapped(model, record.head).emit(builder, x, is_last=True)
    return builder.program(len(layers), logits.size)


def _check_children(decoder: Any, record: Decoder) -> None:
    """Raises UnsupportedModel if the `forward` of the decoder uses a child that the record does not name."""
    read = names_read(decoder) - set(vars(record).values())
    for name, child in decoder._modules.items():
        if name in read and child is not None and type(child) not in DO_NOTHING:
            raise UnsupportedModel(f"{name} is a {type(child).__name__}, which no record names")


def _embedding(decoder: Any, name: str) -> Table:
    """What `decoder.name` looks up."""
    module = decoder._modules[name]
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise UnsupportedModel(f"{name} is a {type(module).__name__} that does more than look up")
    if module.weight.dtype not in DTYPES:
        raise UnsupportedModel(f"its weights are {str(module.weight.dtype).removeprefix('torch.')}")
    # tables of positions may begin with rows for other purposes
    return Table(module.weight.detach()[getattr(module, "offset", 0) :])


def _through(builder: Builder, decoder: Any, name: str | None, x: Slot) -> Slot:
    """What a part makes of x; x itself if the model has no such part."""
    if name is None or decoder._modules.get(name) is None:
        return x
    out: Slot = swapped(decoder, name).emit(builder, x)
    builder.release(x)
    return out


def _layers(decoder: Any, record: Decoder) -> list[Any]:
    """The layers that its `forward` goes through now, of which the first ones may have to do."""
    modules, config = decoder._modules[record.layers], decoder.config
    n_layers = config.num_hidden_layers if "num_hidden_layers" in names_read(decoder) else None
    layers = [swapped(modules, name) for name in list(modules._modules)[:n_layers]]
    if not layers:
        raise UnsupportedModel("it has no layers")
    # the decoder makes the masks
    if not getattr(config, "is_causal", True):
        raise UnsupportedModel("its configuration has is_causal=False")
    kind = config._attn_implementation
    other = next((each for each in map(_attention, layers) if each.config._attn_implementation != kind), None)
    if other is not None:
        raise UnsupportedModel(f"masks are for {kind!r}, attention is {other.config._attn_implementation!r}")
    return layers


def _attention(layer: Any) -> Any:
    return swapped(layer, layer._hfopt.spec.attention)


def _angles(builder: Builder, decoder: Any, layers: list[Any], record: Decoder) -> tuple[Slot, Slot] | None:
    """Slots of cos and sin of the positions, for all layers."""
    rotary = None if record.rotary is None else decoder._modules.get(record.rotary)
    first, *others = map(_attention, layers)
    if any(other.table != first.table for other in others):
        raise UnsupportedModel("its layers have different tables of angles")
    tables = first.angle_tables(rotary, builder.dtype)
    if tables is None:
        return None
    cos, sin = (builder.look_up(table, "positions") for table in tables)
    return cos, sin
