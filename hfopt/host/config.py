"""The base class of configurations, which releases of transformers have two names for, and what their fields say."""

from typing import TYPE_CHECKING, Any

from transformers import configuration_utils

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    _NAMES = ("PreTrainedConfig", "PretrainedConfig")
    Config = next(getattr(configuration_utils, name) for name in _NAMES if hasattr(configuration_utils, name))

_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")


def key_heads(config: Any) -> int:
    """Heads of keys and values that a layer of this configuration caches."""
    if getattr(config, "new_decoder_architecture", False):  # Falcon's, with a copy for each query
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False):
        return 1
    named = (getattr(config, name, None) for name in _KEY_HEADS)
    return next((n for n in named if n), config.num_attention_heads)
