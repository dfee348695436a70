"""What a request keeps of each step, for who asks for more than tokens."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ._types import Outputs

Parts = tuple[Any, ...] | None


class Collected:
    """One entry a step of each output that a configuration asks for; None in place of those that it does not."""

    def __init__(self, generation_config: GenerationConfig) -> None:
        #: whether the request returns more than tokens
        self.is_wanted = bool(generation_config.return_dict_in_generate)
        self.scores = self._begun(generation_config.output_scores)
        self.logits = self._begun(generation_config.output_logits)
        self._attentions = self._begun(generation_config.output_attentions)
        self._hidden_states = self._begun(generation_config.output_hidden_states)

    def _begun(self, is_asked_for: bool | None) -> Parts:
        return () if self.is_wanted and is_asked_for else None

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is kept of a step."""
        return all(each is None for each in self.fields().values())

    def fields(self) -> dict[str, Parts]:
        """All of it, by the names that outputs of `generate` have for it."""
        return {
            "scores": self.scores,
            "logits": self.logits,
            "attentions": self._attentions,
            "hidden_states": self._hidden_states,
        }

    def add_outputs(self, outputs: Outputs) -> None:
        """Keep what modules inside the model gave."""
        if self._attentions is not None:
            self._attentions += (outputs.attentions,)
        if self._hidden_states is not None:
            self._hidden_states += (outputs.hidden_states,)

    def add_logits(self, logits: Tensor) -> None:
        """Keep the logits of the last tokens, [n_rows, n_logits]."""
        if self.logits is not None:
            self.logits += (logits,)

    def add_scores(self, scores: Tensor) -> None:
        """Keep what processors made of them, [n_rows, n_logits]."""
        if self.scores is not None:
            self.scores += (scores,)
