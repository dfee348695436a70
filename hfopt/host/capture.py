"""The outputs of inner modules that transformers collects during a forward (`output_attentions`, `output_hidden_states`)."""

from collections.abc import Mapping
from typing import Any

_active_collector: Any
_HOOKS = "transformers.utils.output_capturing"
try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers 4.57 captures outputs through an instance `forward`
    _active_collector = None


def captured_outputs() -> Mapping[str, Any] | None:
    """What is collected now by name, or None if nothing is."""
    return (_active_collector.get() or None) if _active_collector is not None else None


def is_capture(hook: Any) -> bool:
    """Whether a forward hook is one that transformers leaves behind, and that does something only while it captures."""
    return getattr(hook, "__module__", None) == _HOOKS
