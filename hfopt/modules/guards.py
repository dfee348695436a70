"""What has to hold around a call before kernels may run in place of torch's own operations.

All of this is asked on every call, so each question is a few attribute reads.
"""

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hfopt.host import captured_outputs, is_capture
from hfopt.words import DTYPES

DO_NOTHING = (nn.Dropout, nn.Identity)  # in evaluation mode


def is_plain_inference(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether nothing around a call needs torch's operations (training, gradients, autocast, traces)."""
    return not module.training and is_plain_call(module, args, kwargs)


def is_plain_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """The same of a module that does in training what it does in evaluation."""
    if "_hf_hook" in module.__dict__ or torch.is_autocast_enabled("cpu"):
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
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return True
    return _learns(module)


def _learns(module: nn.Module) -> bool:
    """Whether one of `module.parameters()`, whose iterator takes longer than a small kernel, needs a gradient."""
    for weight in module._parameters.values():
        if weight is not None and weight.requires_grad:
            return True
    children = module._modules
    return bool(children) and any(child is not None and _learns(child) for child in children.values())


def is_bare(module: nn.Module) -> bool:
    """Whether a call is nothing but the class's `forward` in evaluation mode, so that it may be bypassed."""
    return not module.__dict__["training"] and is_unhooked(module)


def is_bare_inside(module: nn.Module) -> bool:
    """The same, whatever may change the arguments of the call."""
    return not module.__dict__["training"] and _is_unhooked_inside(module)


def is_unhooked(module: nn.Module) -> bool:
    """The same of a module that does in training what it does in evaluation."""
    return not module.__dict__["_forward_pre_hooks"] and _is_unhooked_inside(module)


def _is_unhooked_inside(module: nn.Module) -> bool:
    state = module.__dict__
    if "_hf_hook" in state or ("forward" in state and has_own_forward(module)):
        return False
    return not state["_forward_hooks"] or not has_live_hooks(state["_forward_hooks"])


def has_own_forward(module: nn.Module) -> bool:
    """Whether an attribute stands for the class's `forward`, and is not just that, which accelerate leaves behind."""
    state = module.__dict__
    if "forward" not in state:
        return False
    forward = state["forward"]
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return True
    return forward.__func__ is not type(module).forward


def has_live_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether a hook does something; those that transformers leaves behind do so only while it captures."""
    if captured_outputs() is not None:
        return True
    return not all(is_capture(hook) for hook in hooks.values())


def are_readable(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether `is_readable` holds for each."""
    return all(is_readable(tensor, dtype) for tensor in tensors)


def is_readable(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read this input beside weights of `dtype`: a real CPU tensor of the same dtype."""
    if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or dtype not in DTYPES:
        return False
    return tensor.is_cpu and tensor.numel() > 0
