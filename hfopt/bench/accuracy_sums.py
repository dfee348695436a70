"""How far predictions are from a reference, summed up token by token so that no logits have to be kept."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Tokens that are compared at once: in float64, a vocabulary of 128 k takes 1 MB for each of several arrays.
_ROWS = 32


class Figures(NamedTuple):
    """Figures of a model against its reference.

    perplexity: exp(mean negative log-likelihood of a token), and the reference's. change: of it, by the ratio of both.
    divergence: mean KL(reference | model) of a token, in nats. agreement: share of tokens at which both hold the same
    one for the most likely. error: root mean square difference of the logits.
    """

    perplexity: float
    reference_perplexity: float
    change: float
    divergence: float
    agreement: float
    error: float


@dataclass
class Sums:
    """Sums over tokens, in float64."""

    n_tokens: int = 0
    n_logits: int = 0
    nats: float = 0.0  # negative log-likelihood of the text
    reference_nats: float = 0.0
    divergence: float = 0.0
    agreements: int = 0
    squares: float = 0.0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Count tokens: logits of the model and of the reference [tokens, vocabulary], the ids that came [tokens]."""
        for part, exact, ids in zip(
            logits.split(_ROWS), reference.split(_ROWS), targets.split(_ROWS), strict=True
        ):
            part, exact = part.double(), exact.double()
            log_q, log_p = part.log_softmax(-1), exact.log_softmax(-1)
            self.n_tokens += len(ids)
            self.n_logits += part.numel()
            self.nats -= log_q.gather(-1, ids[:, None]).sum().item()
            self.reference_nats -= log_p.gather(-1, ids[:, None]).sum().item()
            self.divergence += (log_p.exp() * (log_p - log_q)).sum().item()
            self.agreements += int((part.argmax(-1) == exact.argmax(-1)).sum())
            self.squares += (part - exact).square_().sum().item()

    def figures(self) -> Figures:
        """Figures of everything that was added."""
        return Figures(
            perplexity=math.exp(self.nats / self.n_tokens),
            reference_perplexity=math.exp(self.reference_nats / self.n_tokens),
            change=math.expm1((self.nats - self.reference_nats) / self.n_tokens),
            divergence=self.divergence / self.n_tokens,
            agreement=self.agreements / self.n_tokens,
            error=math.sqrt(self.squares / self.n_logits),
        )
