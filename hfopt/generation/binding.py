"""Functions bound to one model, as attributes of it."""

import copy
import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from transformers import PreTrainedModel


class Bound:
    """`function` with a model as its first argument, in place of the model's method `name`.

    The model is held weakly: an attribute that kept its model alive would keep gigabytes of a deleted model until the
    garbage collector comes by. A copy of the model gets a binding to the copy, and so does an unpickled one.
    """

    def __init__(self, function: Callable[..., Any], model: PreTrainedModel, name: str) -> None:
        self.function = function
        self._model = weakref.ref(model)
        self._name = name

    def _bound_to(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise ReferenceError(
                f"the model that this `{self._name}` belongs to is gone: keep it in a variable before you call it"
            )
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._bound_to(), *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        model = self._bound_to()
        return inspect.signature(MethodType(getattr(type(model), self._name), model))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bound":
        return Bound(self.function, copy.deepcopy(self._bound_to(), memo), self._name)

    def __reduce__(self) -> tuple[type["Bound"], tuple[Any, ...]]:
        return Bound, (self.function, self._bound_to(), self._name)
