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
