"""The criteria and the processor that our loops know by class. What a release calls otherwise is asked like a user's own."""

from typing import Any

import transformers


def _class(name: str) -> Any:
    """This class of transformers, or one that nothing is an instance of."""
    return getattr(transformers, name, None) or type(name, (), {})


EosTokenCriteria = _class("EosTokenCriteria")
MaxLengthCriteria = _class("MaxLengthCriteria")
MaxTimeCriteria = _class("MaxTimeCriteria")
PrefixConstrainedLogitsProcessor = _class("PrefixConstrainedLogitsProcessor")

# processors that keep nothing from call to call
_REPEATABLE = frozenset(
    _class(name)
    for name in (
        "EpsilonLogitsWarper", "EtaLogitsWarper", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper", "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper",
        "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
    )
)  # fmt: skip


def is_repeatable(processor: Any) -> bool:
    """Whether a processor is known to give the same for the same text and scores, and may be asked once more."""
    return type(processor) in _REPEATABLE
