"""The installed transformers, as far as hfopt depends on it: what it calls things, and what a name's role is.

Nothing outside this package spells a name of the host that releases have changed. Classes are asked (signatures,
annotations, fields, code), not version numbers; what cannot be told is None, and then transformers' own code runs.
"""

from hfopt.host.release import OLDEST, check_release, installed

check_release()

from hfopt.host.activation import xielu_numbers  # noqa: E402
from hfopt.host.attention import attention_kind, registered_attention  # noqa: E402
from hfopt.host.cache_layer import DynamicLayer, WindowedLayer, holding, layer_kinds, window_of, windows_of  # noqa: E402
from hfopt.host.cache_names import (  # noqa: E402  (an older release would fail here with less of a message)
    REQUEST_CACHE,
    beam_output,
    cache_argument,
    cache_field,
    cache_given,
    cache_in,
    cached_length,
    causal_output,
    knows_causal_output,
    sample_output,
)
from hfopt.host.capture import captured_outputs, is_capture  # noqa: E402
from hfopt.host.config import Config  # noqa: E402
from hfopt.host.criteria import (  # noqa: E402
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
)
from hfopt.host.linear import LINEARS, Conv1D, Features, by_outputs, is_linear_class  # noqa: E402
from hfopt.host.loops import (  # noqa: E402
    GENERATE_ORDER,
    MODES,
    PREFILL,
    PREPARE_CACHE,
    PREPARE_CONFIG,
    PREPARING,
    REORDER,
    UPDATE,
    fingerprint,
    generate_arguments,
    loop_of,
    methods,
    missing,
    names_read,
    overridden,
    settings_in,
    sorts_samples,
    unknown_option,
)
from hfopt.host.roles import ROLES, Arguments, takes_positions  # noqa: E402
from hfopt.host.rotary import begin_anew, frequencies, rewritten  # noqa: E402

__all__ = [
    "GENERATE_ORDER",
    "LINEARS",
    "MODES",
    "OLDEST",
    "PREFILL",
    "PREPARE_CACHE",
    "PREPARE_CONFIG",
    "PREPARING",
    "REORDER",
    "REQUEST_CACHE",
    "ROLES",
    "UPDATE",
    "Arguments",
    "Config",
    "Conv1D",
    "DynamicLayer",
    "EosTokenCriteria",
    "Features",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "PrefixConstrainedLogitsProcessor",
    "WindowedLayer",
    "attention_kind",
    "beam_output",
    "begin_anew",
    "by_outputs",
    "cache_argument",
    "cache_field",
    "cache_given",
    "cache_in",
    "cached_length",
    "captured_outputs",
    "causal_output",
    "check_release",
    "fingerprint",
    "frequencies",
    "generate_arguments",
    "holding",
    "installed",
    "is_capture",
    "is_linear_class",
    "knows_causal_output",
    "layer_kinds",
    "loop_of",
    "methods",
    "missing",
    "names_read",
    "overridden",
    "registered_attention",
    "rewritten",
    "sample_output",
    "settings_in",
    "sorts_samples",
    "takes_positions",
    "unknown_option",
    "window_of",
    "windows_of",
    "xielu_numbers",
]
