"""A whole decoder as a program: from the record of its family and its swapped modules to a flat list of instructions."""

from typing import Any

from torch import nn

from hfopt import host
from hfopt.errors import HfoptError, InvalidInput, UnsupportedModel
from hfopt.patches.facts import names_read
from hfopt.patches.families import FAMILIES, families_of
from hfopt.patches.families.family import Decoder
from hfopt.patches.guards import DO_NOTHING, DTYPES, has_own_forward, is_bare
from hfopt.program.builder import Builder, Value
from hfopt.program.program import Program, Table
from hfopt.program.recorder import Recorder, swapped
from hfopt.words import dtype_name


def build(model: nn.Module) -> Program:
    """The program of this model, as it is now; raises UnsupportedModel with what is in the way.

    Hooks on the model itself are for the caller to look at: they see a whole step, from outside.
    """
    program = _built(model)
    if program is None:
        raise UnsupportedModel(f"{type(model).__name__} gives no logits of its own")
    return program


def obstacle(model: nn.Module) -> str | None:
    """In words, why the decoder in this model is no program, whether or not the model makes logits of what it gives."""
    try:
        _built(model)
    except UnsupportedModel as error:
        return str(error)
    return None


def _built(model: nn.Module) -> Program | None:
    """The program; None for a decoder without a head."""
    decoders = list(dict.fromkeys(family.decoder for family in families_of(model)))
    if not decoders:
        known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
        raise UnsupportedModel(f"{type(model).__name__} is no decoder that hfopt knows whole ({known})")
    for path, module in model.named_modules():
        if has_own_forward(module) or vars(module).get("_compiled_call_impl") is not None:
            raise UnsupportedModel(f"{path or 'the model'} has a forward of its own")
        is_called = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if path and is_called and not is_bare(module):
            raise UnsupportedModel(f"{path} is in training mode or has hooks")
    for decoder in decoders[:-1]:
        try:
            return _read(model, decoder)
        except UnsupportedModel:
            pass
    return _read(model, decoders[-1])


def _read(model: Any, record: Decoder) -> Program | None:
    try:
        return _recorded(model, record)
    except InvalidInput as error:  # weights of several dtypes, say
        raise UnsupportedModel(str(error)) from error
    except HfoptError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"it cannot be read ({type(error).__name__}: {error})") from error


def _recorded(model: Any, record: Decoder) -> Program | None:
    decoder: Any = model.get_submodule(record.path)
    _check_children(decoder, record)
    layers = _layers(decoder, record)
    tokens = _embedding(decoder, record.tokens)
    builder = Builder(tokens.rows.dtype)
    rotary = None if record.rotary is None else decoder._modules.get(record.rotary)
    ops = Recorder(builder, rotary, host.windows_of(model.config))

    x = builder.look_up(tokens, "tokens")
    if record.multiplier is not None:
        x = builder.scale(x, getattr(decoder, record.multiplier))
    x = _through(ops, decoder, record.project_in, x)
    if record.positions is not None:
        builder.add_looked_up(_embedding(decoder, record.positions, record.position_class), "positions", x)
    for layer in layers:
        ops.angles(_attention(layer))
    for index, layer in enumerate(layers):
        builder.layer = index
        x = layer.run(ops, x)
    builder.layer = None
    x = _through(ops, decoder, record.norm, x)
    x = _through(ops, decoder, record.project_out, x)
    if record.head not in model._modules:
        return None
    builder.take_last(x)
    logits = ops.part(model, record.head, x)
    if record.divisor is not None:
        logits = builder.scale(logits, getattr(model.config, record.divisor), divide=True)
    return builder.program(logits, len(layers))


def _check_children(decoder: Any, record: Decoder) -> None:
    """Raises UnsupportedModel if the `forward` of the decoder uses a child that the record does not name."""
    read = names_read(decoder) - record.children
    for name, child in decoder._modules.items():
        if name in read and child is not None and type(child) not in DO_NOTHING:
            raise UnsupportedModel(f"{name} is a {type(child).__name__}, which no record names")


def _embedding(decoder: Any, name: str, class_name: str | None = None) -> Table:
    """What `decoder.name` looks up, which is torch's own module or of exactly this class."""
    module = decoder._modules[name]
    is_known = type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and type(module).__name__ == class_name
    )
    if not is_known or module.max_norm is not None:
        raise UnsupportedModel(f"{name} is a {type(module).__name__} that does more than look up")
    if module.weight.dtype not in DTYPES:
        raise UnsupportedModel(f"its weights are {dtype_name(module.weight.dtype)}")
    # tables of positions may begin with rows for other purposes
    return Table(module.weight.detach()[getattr(module, "offset", 0) :])


def _through(ops: Recorder, decoder: Any, name: str | None, x: Value) -> Value:
    """What a part makes of x; x itself if the model has no such part."""
    return x if name is None or decoder._modules.get(name) is None else ops.part(decoder, name, x)


def _layers(decoder: Any, record: Decoder) -> list[Any]:
    """The layers that its `forward` goes through now, of which the first ones may have to do."""
    modules, config = decoder._modules[record.layers], decoder.config
    n_layers = config.num_hidden_layers if "num_hidden_layers" in names_read(decoder) else None
    layers = [swapped(modules, name) for name in list(modules._modules)[:n_layers]]
    if not layers:
        raise UnsupportedModel("it has no layers")
    if None in host.windows_of(config):
        raise UnsupportedModel("not all of its layers have full attention or that of a window")
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
