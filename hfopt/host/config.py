"""The base class of configurations, which releases of transformers have two names for."""

from typing import TYPE_CHECKING

from transformers import configuration_utils

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    _NAMES = ("PreTrainedConfig", "PretrainedConfig")
    Config = next(getattr(configuration_utils, name) for name in _NAMES if hasattr(configuration_utils, name))
