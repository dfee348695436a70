"""How far the bfloat16 logits are from the float32 model's, before and after `hfopt.optimize`.

The reference is the stock model with the bfloat16 weights widened to float32. Texts are read in two ways:
whole, and token by token with a cache. The exit code is 1 if the optimised model is too far away.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import hfopt
from hfopt.cli import models, prompts
from hfopt.cli.output import say, show_table

# of the stock model's own error: both round at different places, so neither is always the smaller
_LIMIT = 1.5


@torch.no_grad()
def read_whole(model: PreTrainedModel, input_ids: torch.Tensor, optimized: bool) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] in float32, the texts read at once."""
    return model(input_ids).logits.float()


@torch.no_grad()
def read_by_token(model: PreTrainedModel, input_ids: torch.Tensor, optimized: bool) -> torch.Tensor:
    """The same, the texts read token by token."""
    cache = hfopt.IndirectCache(config=model.config) if optimized else DynamicCache(config=model.config)
    steps = [model(column, past_key_values=cache).logits for column in input_ids.split(1, dim=1)]
    return torch.cat(steps, dim=1).float()


def errors(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, float, float]:
    """(largest and root mean square error, mean KL divergence in nats, share of equal best tokens)."""
    difference = logits - reference
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    return (
        difference.abs().max().item(),
        difference.square().mean().sqrt().item(),
        divergence.item(),
        agreement.item(),
    )


def main() -> int:
    """Measure, print a table, compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model-id", help="a folder or hub id (default: the embedded model)")
    parser.add_argument("--random-weights", metavar="CONFIG", help="a named shape or a config.json")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="texts (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="tokens a text (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.random_weights is not None:
        model = models.random_model(models.named_config(args.random_weights), torch.bfloat16)
        input_ids = prompts.random_ids(model, args.tokens, args.rows)["input_ids"]
    else:
        model, tokenizer = models.load(args.model_id or hfopt.embedded_model(), torch.bfloat16)
        input_ids = prompts.of_length(tokenizer, args.tokens, args.rows)["input_ids"]

    readers: dict[str, Callable[..., torch.Tensor]] = {"whole": read_whole, "by token": read_by_token}
    lines, worst = [], 0.0
    stock = {name: read(model, input_ids, False) for name, read in readers.items()}
    hfopt.optimize(model)
    optimized = {name: read(model, input_ids, True) for name, read in readers.items()}
    hfopt.restore(model)
    model.float()
    reference = read_whole(model, input_ids, False)
    hfopt.optimize(model)
    for name, read in readers.items():
        stock_error, own_error = errors(stock[name], reference), errors(optimized[name], reference)
        worst = max(worst, own_error[1] / stock_error[1])
        lines += [
            _line(f"{name}: stock bfloat16", stock_error),
            _line(f"{name}: optimized bfloat16", own_error),
            _line(f"{name}: optimized float32", errors(read(model, input_ids, True), reference)),
        ]
    show_table(["against stock float32", "largest error", "rms error", "KL, nats", "same best token"], lines)
    say(f"\nOptimized / stock rms error in bfloat16: {worst:.2f}, allowed {_LIMIT}")
    return int(not worst <= _LIMIT)


def _line(name: str, figures: tuple[float, float, float, float]) -> list[str]:
    largest, rms, divergence, agreement = figures
    return [name, f"{largest:.2e}", f"{rms:.2e}", f"{divergence:.2e}", f"{agreement:.1%}"]


if __name__ == "__main__":
    sys.exit(main())
