"""A whole decoder as a program: from the record of its family and its swapped modules to a flat list of instructions."""

import contextlib
import functools
from typing import Any

from torch import nn

from hfopt import host
from hfopt.errors import HfoptError, InvalidInput, UnsupportedModel
from hfopt.modules.guards import DO_NOTHING, has_own_forward, is_bare
from hfopt.patches.attention import setting
from hfopt.patches.facts import helper_names_read, is_off, names_read, own_names
from hfopt.patches.families import decoders_for
from hfopt.patches.families.family import Decoder
from hfopt.patches.guards import is_causal
from hfopt.program.builder import Builder, Value
from hfopt.program.embeddings import position_table, scale_of, token_table
from hfopt.program.program import Program
from hfopt.program.recorder import Recorder, swapped
from hfopt.streaming import stream_of

# attributes and fields that change nothing in what a decoder computes, or what the rehearsal shows
_HARMLESS = frozenset(
    {
        "_output_capturing_hooks_installed", "bos_token_id", "config", "decoder_layers", "dropout", "dtype",
        "embedding_dropout", "eos_token_id", "first_kv_shared_layer_idx", "gradient_checkpointing",
        "has_sliding_layers", "hidden_size", "hidden_size_per_layer_input", "layer_types", "layerdrop", "loss_type",
        "multi_query", "num_heads", "num_hidden_layers", "output_attentions", "output_hidden_states", "pad_token_id",
        "prompt_length", "return_dict", "rope_parameters", "sliding_window", "unique_layer_types", "use_alibi",
        "use_cache", "use_learned_position_embeddings", "vocab_size",
    }
)  # fmt: skip


def build(model: nn.Module) -> Program:
    """The program of this model, as it is now; raises UnsupportedModel with what is in the way.

    Hooks on the model itself are for the caller to look at: they see a whole step, from outside.
    """
    program = _built(model)
    if program is None:
        raise UnsupportedModel(f"{type(model).__name__} gives no logits of its own")
    return program._replace(stream=stream_of(model))


def obstacle(model: nn.Module) -> str | None:
    """In words, why the decoder in this model is no program, whether or not the model makes logits of what it gives."""
    try:
        _built(model)
    except UnsupportedModel as error:
        return str(error)
    return None


def _built(model: nn.Module) -> Program | None:
    """The program; None for a decoder without a head."""
    decoders = decoders_for(model)
    if not decoders:
        raise UnsupportedModel(f"{type(model).__name__} is no decoder whose parts hfopt knows")
    adapted = [each for each in model.modules() if host.is_adapted(each)]
    # what adapters add is read in each request
    left_out = {id(part) for each in adapted for part in (each, *host.adapter_parts(each))}
    for path, module in model.named_modules():
        if id(module) in left_out:
            continue
        if has_own_forward(module) or vars(module).get("_compiled_call_impl") is not None:
            raise UnsupportedModel(f"{path or 'the model'} has a forward of its own")
        is_called = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if path and is_called and not is_bare(module):
            raise UnsupportedModel(f"{path} is in training mode or has hooks")
    first, *others = decoders
    try:
        return _read(model, first)
    except UnsupportedModel as error:
        for decoder in others:
            with contextlib.suppress(UnsupportedModel):
                return _read(model, decoder)
        raise error


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
    for module in (model, decoder):
        _check_settings(module, record)
    layers = _layers(decoder, record)
    embedding = decoder.get_submodule(record.tokens)
    tokens = token_table(record.tokens, embedding, record.embedding_scale)
    builder = Builder(tokens.rows.dtype)
    if record.max_keys in names_read(decoder):
        builder.max_keys = getattr(decoder.config, record.max_keys, builder.max_keys)
    ops = Recorder(builder, _rotaries(decoder, record), host.windows_of(model.config))

    x = builder.look_up(tokens, "tokens")
    is_scaled = record.multiplier in names_read(decoder)
    multiplier = vars(decoder).get(record.multiplier) if is_scaled else None
    for factor in (scale_of(embedding, record.embedding_scale), multiplier):
        if factor is not None:
            x = builder.scale(x, factor)
    x = _through(ops, decoder, record.tokens_norm, x)
    x = _through(ops, decoder, record.project_in, x)
    if record.positions is not None:
        positions = position_table(record.positions, decoder._modules[record.positions], tokens.rows.dtype)
        builder.add_looked_up(positions, "positions", x)
    x = _through(ops, decoder, record.sum_norm, x)
    if record.layer_inputs is not None and decoder._modules.get(record.layer_inputs.tokens) is not None:
        ops.layer_inputs = _layer_inputs(ops, builder, decoder, record, x)
    stores = [_attention(layer)._hfopt.spec.stores for layer in layers]
    for layer in layers:
        ops.angles(_attention(layer))
    for index, layer in enumerate(layers):
        builder.layer = index
        if not any(stores[index:]):  # nobody reads what other tokens make of it
            ops.take_last(x)
        x = layer.run(ops, x)
    builder.layer = None
    x = _through(ops, decoder, record.norm, x)
    x = _through(ops, decoder, record.project_out, x)
    head = next((name for name in record.heads if model._modules.get(name) is not None), None)
    if head is None:
        return None
    builder.take_last(x)
    x = _through(ops, model, record.transform, x)
    logits = ops.part(model, head, x)
    for name, operation in (
        (record.divisor, functools.partial(builder.scale, divide=True)),
        (record.factor, builder.scale),
        (record.softcap, builder.softcap),
    ):
        number = getattr(model.config, name, None) if name in names_read(model) else None
        if number is not None:
            logits = operation(logits, number)
    return builder.program(logits, sum(stores))


def _layer_inputs(ops: Recorder, builder: Builder, decoder: Any, record: Decoder, x: Value) -> Value:
    """What layers are given of their own, for what goes into the first one."""
    parts, state = record.layer_inputs, vars(decoder)
    assert parts is not None
    embedding = decoder._modules[parts.tokens]
    table = builder.look_up(token_table(parts.tokens, embedding, record.embedding_scale), "tokens")
    factor = scale_of(embedding, record.embedding_scale)
    if factor is not None:
        table = builder.scale(table, factor)
    made = builder.scale(ops.part(decoder, parts.projection, x), state[parts.projection_scale])
    norm = swapped(decoder, parts.norm).norm
    size = norm.weight.shape[0]
    builder.norm_heads(made, norm, 0, made.size // size, size)
    return builder.scale(builder.scale(table, 1.0, made), state[parts.scale])


def _check_children(decoder: Any, record: Decoder) -> None:
    """Raises UnsupportedModel if the `forward` of the decoder uses a child that the record does not name."""
    around = {""} | {path.rpartition(".")[0] for path in record.children}
    for path in around:
        module, prefix = decoder.get_submodule(path), f"{path}." if path else ""
        below = (name.removeprefix(prefix) for name in record.children if name.startswith(prefix))
        known = {name.partition(".")[0] for name in below}
        read = names_read(module) - known
        for name, child in module._modules.items():
            if name in read and child is not None and type(child) not in DO_NOTHING:
                raise UnsupportedModel(f"{name} is a {type(child).__name__}, which no record names")


def _check_settings(module: Any, record: Decoder) -> None:
    """Raises UnsupportedModel if what `forward` reads of the module and its config may change more than the record says."""
    read = names_read(module) | helper_names_read(module)
    fields = module.config.__dict__.keys() | getattr(module.config, "attribute_map", {}).keys()
    for name in sorted(read & (fields | set(own_names(vars(module)))) - _HARMLESS - record.settings):
        if not is_off(setting(module, name)):  # what says that something is not there
            raise UnsupportedModel(f"its forward reads {name}, which no record knows")


def _through(ops: Recorder, decoder: Any, path: str | None, x: Value) -> Value:
    """What a part makes of x; x itself if the model has no such part."""
    if path is None:
        return x
    around, _, name = path.rpartition(".")
    module = decoder.get_submodule(around)
    return x if module._modules.get(name) is None else ops.part(module, name, x)


def _rotaries(decoder: Any, record: Decoder) -> list[Any]:
    """Of each layer, the module that computes its angles; None where models have none."""
    n_layers = len(decoder._modules[record.layers])
    if record.rotaries not in names_read(decoder):
        return [decoder._modules.get(record.rotary)] * n_layers
    bases = getattr(decoder.config, record.bases)
    if not all(bases):
        raise UnsupportedModel(f"some of its layers have no angles ({record.bases} of 0)")
    return [host.rotary.of_base(decoder._modules[record.rotaries], base) for base in bases]


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
    configs = (vars(each).get("config", config) for each in map(_attention, layers))
    other = next((each._attn_implementation for each in configs if each._attn_implementation != kind), None)
    if other is not None:
        raise UnsupportedModel(f"masks are for {kind!r}, attention is {other!r}")
    if kind == "sdpa" and not all(map(is_causal, map(_attention, layers))):
        raise UnsupportedModel("its attention is not causal where there is no mask")
    return layers


def _attention(layer: Any) -> Any:
    path, _, name = layer._hfopt.spec.attention.rpartition(".")
    return swapped(layer.get_submodule(path), name)
