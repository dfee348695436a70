"""What has to hold around a call before kernels may run in place of torch's own operations.

All of this is asked on every call, so each question is a few attribute reads.
"""

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hfopt import host
from hfopt.host import captured_outputs, is_capture
from hfopt.patches.facts import class_names_read, layer_index
from hfopt.words import DTYPES

DO_NOTHING = (nn.Dropout, nn.Identity)  # in evaluation mode


def is_plain_inference(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether nothing around a call needs torch's operations (training, gradients, autocast, traces)."""
    if module.training or "_hf_hook" in module.__dict__ or torch.is_autocast_enabled("cpu"):
        return False
    if torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    # hooks on every module of the process would miss the children whose work our kernels do
    if _global_forward_hooks or _global_forward_pre_hooks:
        return False
    return not torch.is_grad_enabled() or not _needs_grad(module, args, kwargs)


def _needs_grad(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return any(value.requires_grad for value in inputs) or any(
        weight.requires_grad for weight in module.parameters()
    )


def is_bare(module: nn.Module) -> bool:
    """Whether a call is nothing but the class's `forward` in evaluation mode, so that it may be bypassed."""
    return not module.__dict__["_forward_pre_hooks"] and is_bare_inside(module)


def is_bare_inside(module: nn.Module) -> bool:
    """The same, whatever may change the arguments of the call."""
    state = module.__dict__
    if state["training"] or "_hf_hook" in state:
        return False
    if "forward" in state and has_own_forward(module):
        return False
    return not state["_forward_hooks"] or not _has_live_hooks(state["_forward_hooks"])


def has_own_forward(module: nn.Module) -> bool:
    """Whether an attribute stands for the class's `forward`, and is not just that, which accelerate leaves behind."""
    state = module.__dict__
    if "forward" not in state:
        return False
    forward = state["forward"]
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return True
    return forward.__func__ is not type(module).forward


def _has_live_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether a hook does something; those that transformers leaves behind do so only while it captures."""
    if captured_outputs() is not None:
        return True
    return not all(is_capture(hook) for hook in hooks.values())


def wants_attentions(attention: nn.Module) -> bool:
    """Whether somebody will read the attention weights, which our kernels never form."""
    captured = captured_outputs()
    if captured is not None and "attentions" in captured:
        return True
    hooks = attention._forward_hooks
    return bool(hooks) and not is_sdpa(attention) and _has_live_hooks(hooks)


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


def are_readable(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether `is_readable` holds for each."""
    return all(is_readable(tensor, dtype) for tensor in tensors)


def is_readable(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read this input beside weights of `dtype`: a real CPU tensor of the same dtype."""
    if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or dtype not in DTYPES:
        return False
    return tensor.is_cpu and tensor.numel() > 0
