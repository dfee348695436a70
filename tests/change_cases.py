"""Changes of a model that its user may make between two requests: drawn at random, and made to several models alike."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from tests.generation_cases import Doubled, Model, gptj, llama, opt


def _llama_with_leaky_relu() -> Model:
    """What its activations compute follows from an attribute."""
    model = llama(num_hidden_layers=3)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.LeakyReLU(0.0).eval()
    return model


PATTERNS: dict[str, Callable[[], Model]] = {
    "llama": lambda: llama(num_hidden_layers=3),
    "llama, leaky relu": _llama_with_leaky_relu,
    "gptj": lambda: gptj(n_layer=3),
    "opt": lambda: opt(num_hidden_layers=3, dropout=0.0),
    "opt, norms before": lambda: opt(num_hidden_layers=3, dropout=0.0, do_layer_norm_before=True),
}
_NO_ATTRIBUTES = set(vars(nn.Module()))
_OTHER_STRINGS = {
    "rope_type": ("dynamic", "linear", "default"),
    "_attn_implementation": ("sdpa", "eager", "damped"),
}
# fields that stand behind others, or say what kind of model it is
_FIXED = ("_attn_implementation_internal", "transformers_version", "is_encoder_decoder")
_ASKED = ("output_attentions", "output_hidden_states", "use_cache", "is_causal")


@dataclass(frozen=True)
class Change:
    """kind: of `_KINDS`; path: of the module; name: of what is changed in it; value: how."""

    kind: str
    path: str = ""
    name: str = ""
    value: Any = None

    def make(self, model: Model) -> None:
        """To this model; what is registered is so for all models."""
        _KINDS[self.kind](model.get_submodule(self.path), self.name, self.value)


# ---- what is registered --------------------------------------------------------------------------------------------


def damped(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention of the user."""
    return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)


def _forgetful(make: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        """Hides the first token from all that are not alone with it."""
        found = make(*args, **{**kwargs, "allow_is_causal_skip": False})
        if found is not None and found.shape[-1] > 1:
            found = found.clone()
            found[..., 1:, 0] = False if found.dtype is torch.bool else torch.finfo(found.dtype).min
        return found

    return mask


_REGISTERED: dict[str, Callable[[], None]] = {
    "attention sdpa": lambda: AttentionInterface.register("sdpa", damped),
    "attention eager": lambda: AttentionInterface.register("eager", damped),
    "mask sdpa": lambda: AttentionMaskInterface.register("sdpa", _forgetful(sdpa_mask)),
    "mask eager": lambda: AttentionMaskInterface.register("eager", _forgetful(eager_mask)),
}


def register(name: str) -> None:
    """One of `_REGISTERED`, within `registered`."""
    _REGISTERED[name]()


@contextmanager
def registered() -> Iterator[None]:
    """Within, there is an attention named "damped"; afterwards all names stand for what they did before."""
    tables = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(table) for table in tables]
    AttentionInterface.register("damped", damped)
    AttentionMaskInterface.register("damped", sdpa_mask)
    try:
        yield
    finally:
        for table, then in zip(tables, before, strict=True):
            table.clear()
            table.update(then)


# ---- how each change is made ---------------------------------------------------------------------------------------


def _scaled(value: Any) -> Any:
    """The same with its floats 1.25 times as large, in tuples and outputs too."""
    if isinstance(value, Tensor):
        return value * 1.25 if value.is_floating_point() else value
    if type(value) is tuple:
        return tuple(map(_scaled, value))
    return value


def _hook(module: Any, name: str, value: Any) -> None:
    def change(module: Any, args: Any, kwargs: Any, output: Any = None) -> Any:
        if output is None:
            first = {key: _scaled(each) if key == "hidden_states" else each for key, each in kwargs.items()}
            return _scaled(args[:1]) + args[1:], first
        if isinstance(output, dict):
            key = "logits" if "logits" in output else "last_hidden_state"
            output[key] = _scaled(output[key])
            return output
        return (_scaled(output[0]), *output[1:]) if type(output) is tuple else _scaled(output)

    if name == "pre":
        module.register_forward_pre_hook(change, with_kwargs=True)
    else:
        module.register_forward_hook(change, with_kwargs=True)


def _own_forward(module: Any, name: str, value: Any) -> None:
    inner = type(module).forward
    module.forward = lambda *args, **kwargs: _scaled(inner(module, *args, **kwargs))


def _child(module: Any, name: str, value: str) -> None:
    own = module._modules[name]
    other: Any
    if value == "new":
        torch.manual_seed(3)
        other = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
        with torch.no_grad():
            other.weight.mul_(own.weight.std() / other.weight.std())
    else:
        make: dict[str, Callable[[], nn.Module]] = {
            "wrapped": lambda: Doubled(own),
            "identity": nn.Identity,
            "relu": nn.ReLU,
            "gelu": nn.GELU,
            "softsign": nn.Softsign,
        }
        other = make[value]()
    module._modules[name] = other.eval()


def _parameter(module: Any, name: str, value: str) -> None:
    own = getattr(module, name)
    with torch.no_grad():
        if value == "in place":
            own.mul_(1.25)
        elif value == "data":
            own.data = own.data * 1.25
        elif value == "turned":
            own.data = own.data.t() if own.dim() == 2 and len(own) == own.shape[1] else own.data.flip(0)
        else:
            setattr(module, name, nn.Parameter(own * 1.25, requires_grad=False))


def _buffer(module: Any, name: str, value: str) -> None:
    own = getattr(module, name)
    if value == "in place":
        own.mul_(0.5)
    elif value == "end":
        own[9 if own.dim() == 2 else len(own) // 2 :] *= 0.5  # of a table the positions of the last tokens
    else:
        setattr(module, name, own * 0.5)


def _layers(module: Any, name: str, value: str) -> None:
    if value == "turned":
        own = list(module)
        for index, layer in enumerate(reversed(own)):
            module[index] = layer
    elif value == "less":
        del module[len(module) - 1]
    else:
        module[1] = module[0]


def _config(module: Any, name: str, value: Any) -> None:
    setattr(module.config, name, value)


def _rope(module: Any, name: str, value: Any) -> None:
    module.config.rope_parameters["rope_theta"] = value


_KINDS: dict[str, Callable[[Any, str, Any], Any]] = {
    "attribute": setattr,
    "no attribute": lambda module, name, value: delattr(module, name),
    "config": _config,
    "config in place": _rope,
    "another config": lambda module, name, value: setattr(
        module, "config", _other_config(module, name, value)
    ),
    "hook": _hook,
    "own forward": _own_forward,
    "child": _child,
    "parameter": _parameter,
    "buffer": _buffer,
    "layers": _layers,
    "training": lambda module, name, value: module.train(),
    "registered": lambda module, name, value: register(name),
}


def _other_config(module: Any, name: str, value: Any) -> Any:
    other = copy.deepcopy(module.config)
    setattr(other, name, value)
    return other


# ---- which ones there are ------------------------------------------------------------------------------------------


def _others(name: str, value: Any) -> list[Any]:
    """Other values of the same sense."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value, float(value)]
    if isinstance(value, float):
        return [value * 0.5, value * 1.5, value + 0.125, np.float64(value * 1.5), torch.tensor(value * 1.5)]
    if isinstance(value, str):
        return [each for each in _OTHER_STRINGS.get(name, ("other",)) if each != value]
    return [1, True] if value is None else []


def changes(model: Model) -> st.SearchStrategy[Change]:
    """Every change of this model, each kind as likely as the others."""
    found: dict[str, list[Change]] = {}

    def add(kind: str, path: str = "", name: str = "", *values: Any) -> None:
        found.setdefault(kind, []).extend(Change(kind, path, name, value) for value in values or (None,))

    for name, value in vars(model.config).items():
        if name not in _FIXED and _others(name, value):
            add("config", "", name, *_others(name, value))
    for name in ("_attn_implementation", "num_hidden_layers", *_ASKED):
        value = getattr(model.config, name, True)
        add("config that is read", "", name, *_others(name, value))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # a dropout does nothing in evaluation mode, but complain of what it would do
            if name not in _NO_ATTRIBUTES and _others(name, value) and not isinstance(module, nn.Dropout):
                add("attribute", path, name, *_others(name, value))
                add("no attribute", path, name)
        for name in module._parameters:
            if module._parameters[name] is not None:
                add("parameter", path, name, "in place", "data", "turned", "new")
        for name in module._buffers:
            add("buffer", path, name, "in place", "end", "new")
        for name, child in module._modules.items():
            if isinstance(child, nn.Linear):
                add("child", path, name, "new", "wrapped")
            elif "norm" in type(child).__name__.lower():
                add("child", path, name, "identity", "wrapped")
            elif "act" in name:
                add("child", path, name, "relu", "gelu", "softsign")
            elif isinstance(child, nn.Dropout) or type(child).__name__.endswith("MLP"):
                add("child", path, name, "wrapped")
        if isinstance(module, nn.ModuleList):
            add("layers", path, "", "turned", "less", "twice")
        else:
            add("hook", path, "pre")
            add("hook", path, "post")
            add("training", path)
        if not list(module.children()):
            add("own forward", path)
        if "config" in vars(module):
            add("another config", path, "_attn_implementation", "eager", "sdpa")
            add("another config", path, "num_hidden_layers", 2)
    for name in _REGISTERED:
        add("registered", "", name)
    if getattr(model.config, "rope_parameters", None):
        add("config in place", "", "", 5000.0)
    read = [Change("config", each.path, each.name, each.value) for each in found.pop("config that is read")]
    return st.one_of(st.sampled_from(read), *(st.sampled_from(each) for each in found.values()))
