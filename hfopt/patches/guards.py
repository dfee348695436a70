"""What has to hold around a call before kernels may run in place of torch's own operations.

All of this is asked on every call, so each question is a few attribute reads.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hfopt.patches.facts import class_names_read

_active_collector: Any
try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers 4.57 captures outputs through an instance `forward`, which `is_bare` sees
    _active_collector = None

DTYPES = (torch.float32, torch.bfloat16)
DO_NOTHING = (nn.Dropout, nn.Identity)  # in evaluation mode

# Arguments that transformers hands down to every module and that change nothing in what our modules compute.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


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
    state = module.__dict__
    if state["training"] or "_hf_hook" in state or state["_forward_pre_hooks"]:
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
    return any(
        getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks.values()
    )


def captured_outputs() -> Mapping[str, Any] | None:
    """The outputs that transformers collects during this forward by name, or None if it collects nothing."""
    return (_active_collector.get() or None) if _active_collector is not None else None


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


def attention_kind(attention: Any) -> Literal["sdpa", "eager"] | None:
    """Which of transformers' own functions, with masks of transformers' own for it, this module's attention goes through
    now; None for all others, which only they can compute.

    A class whose attention is in its own code counts as "eager".
    """
    name = attention.config._attn_implementation
    function, mask = _OWN_ATTENTION.get(name, (None, None))
    if mask is None or ALL_MASK_ATTENTION_FUNCTIONS.get(name) is not mask:
        return None
    kind: Any = type(attention)
    table = _attention_functions(getattr(kind, "_hfopt_original", kind))
    found = None if table is None else table.get(name)
    return name if found is function else None


# name -> the function that models look up ("eager": none, each file has its own), and the one that makes masks for it
_OWN_ATTENTION: dict[Any, tuple[Any, Any]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (None, eager_mask),
}


@functools.cache
def _attention_functions(kind: Any) -> AttentionInterface | None:
    """Where modules of this class look their attention function up; None if they do not."""
    read = class_names_read(kind)
    if "_attn_implementation" not in read:
        return None
    known = inspect.unwrap(kind.forward).__globals__
    tables = (known[name] for name in read & known.keys())
    return next((each for each in tables if isinstance(each, AttentionInterface)), ALL_ATTENTION_FUNCTIONS)


def registered_attention(config: Any) -> tuple[Any, Any]:
    """The functions that the name of this config's attention stands for: one that computes it, one that makes masks."""
    name = getattr(config, "_attn_implementation", None)
    return ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)


def attention_obstacle(attention: Any) -> str | None:
    """In words, why kernels cannot stand for this module's attention, whatever the call; None if they can."""
    if attention_kind(attention) is not None:
        return None
    name = attention.config._attn_implementation
    return f"its attention {name!r} is not transformers' own sdpa or eager function and mask"


def are_without_effect(kwargs: Mapping[str, Any]) -> bool:
    """Whether none of these further arguments of an attention module changes its result."""
    for name, value in kwargs.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        # False means "no" for every argument but this one
        if value is not (name == "is_causal"):
            return False
    return True


def are_readable(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether `is_readable` holds for each."""
    return all(is_readable(tensor, dtype) for tensor in tensors)


def is_readable(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read this input beside weights of `dtype`: a real CPU tensor of the same dtype."""
    if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or dtype not in DTYPES:
        return False
    return tensor.is_cpu and tensor.numel() > 0
