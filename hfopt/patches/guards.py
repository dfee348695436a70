"""Whether an attention module is one that kernels may stand for, as far as only its own call can tell."""

from typing import Any, Literal

from torch import nn

from hfopt import host
from hfopt.host import captured_outputs
from hfopt.modules.guards import has_live_hooks
from hfopt.patches.facts import class_names_read, layer_index


def wants_attentions(attention: nn.Module) -> bool:
    """Whether somebody will read the attention weights, which our kernels never form."""
    captured = captured_outputs()
    if captured is not None and "attentions" in captured:
        return True
    hooks = attention._forward_hooks
    return bool(hooks) and not is_sdpa(attention) and has_live_hooks(hooks)


def is_sdpa(attention: nn.Module) -> bool:
    """Whether it runs torch's attention, which returns no weights and takes no mask as a causal one."""
    return attention_kind(attention) == "sdpa"


def is_causal(attention: nn.Module) -> bool:
    """Whether torch's attention is causal for this module where there is no mask."""
    return attention.__dict__.get("is_causal", True) is True


def attention_kind(attention: Any) -> Literal["sdpa", "eager"] | None:
    """`host.attention_kind` of this module."""
    kind: Any = type(attention)
    original = getattr(kind, "_hfopt_original", kind)
    config = vars(attention).get("config")
    if config is None:  # its attention is in its own code
        return "eager" if layer_index(attention) is not None else None
    return host.attention_kind(config, original, class_names_read(original))


def attention_obstacle(attention: Any) -> str | None:
    """In words, why kernels cannot stand for this module's attention, whatever the call; None if they can."""
    if attention_kind(attention) is not None:
        return None
    name = getattr(vars(attention).get("config"), "_attn_implementation", None)
    return f"its attention {name!r} is not transformers' own sdpa or eager function and mask"
