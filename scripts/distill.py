"""Train a larger model of the embedded family, and make the embedded one its draft.

    python scripts/distill.py FOLDER            writes FOLDER/model and FOLDER/draft; five minutes of one core
    python scripts/draft.py FOLDER              measures what the draft is worth

The model has 12 layers of hidden size 512. It is the embedded model, 4 layers of 256, grown in both directions so that it
says the same at first (https://arxiv.org/abs/1511.05641), and trained further on the text of `train_tiny.py`. The draft is
the embedded model, which learns the grown one's probabilities on that text (https://arxiv.org/abs/1503.02531).
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from scripts import train_tiny

STEPS = 70, 60  # of 4 x 512 tokens: of the model, and of the draft
LEARNING_RATES = 1e-3, 5e-4
WARMUP = 10
N_LAYERS, HIDDEN, INTERMEDIATE, N_HEADS, N_KV_HEADS = 12, 512, 1536, 16, 4


def grown(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """A deeper and wider model with the logits of `small`.

    New channels of the residual stream hold zeros at first; new layers, heads and neurons are random, and add nothing until
    the weights behind them have been trained.
    """
    settings = {
        **small.config.to_dict(),
        "num_hidden_layers": N_LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "dtype": "float32",
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    stride, scale = N_LAYERS // len(small.model.layers), math.sqrt(small.config.hidden_size / HIDDEN)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        of = dict(model.named_parameters())
        for name, parameter in small.named_parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(stride * int(parts[2]))
            # a norm divides by the mean of more channels
            factor = scale if parameter.dim() == 1 else 1.0
            of[".".join(parts)][tuple(slice(size) for size in parameter.shape)] = factor * parameter
    return model


def learner() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, list[list[int]]]:
    """The embedded model, its tokenizer, and the tokens of each text that it was trained on; torch gets one thread and the
    seed, as in `train_tiny.py`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(train_tiny.SEED)
    training, _ = train_tiny.corpus()
    model, tokenizer = train_tiny.load(train_tiny.EMBEDDED)
    return model, tokenizer, [tokenizer(text)["input_ids"] for text in training]


def train(
    model: LlamaForCausalLM,
    loss_of: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    steps: int,
    rate: float,
) -> None:
    """AdamW over so many batches, in bfloat16 where that is safe; loss_of: a batch, int64 [n_rows, length], to a number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    progress = tqdm(batches, total=steps, unit="step")
    for step, input_ids in enumerate(progress):
        for group in optimizer.param_groups:
            warm, rest = min(1.0, (step + 1) / WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = rate * warm * rest
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, metavar=("MODEL", "DRAFT"))
    arguments = parser.parse_args()
    draft, tokenizer, texts = learner()
    heldout = train_tiny.read_heldout(train_tiny.EMBEDDED / train_tiny.HELDOUT)
    model = grown(draft)

    def next_token(input_ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss

    def imitation(input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = log_softmax(model(input_ids=input_ids, use_cache=False).logits.float(), -1)
        said = log_softmax(draft(input_ids=input_ids, use_cache=False).logits.float(), -1)
        return kl_div(said.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")

    learners = (model, next_token), (draft, imitation)
    for (one, loss_of), steps, rate in zip(learners, arguments.steps, LEARNING_RATES, strict=True):
        train(one, loss_of, train_tiny.batches(texts, steps), steps, rate)
    for name, each in (("model", model), ("draft", draft)):
        result = train_tiny.evaluate(each, tokenizer, heldout)
        print(
            f"{name}: {each.num_parameters():,} parameters, perplexity {result.perplexity:.2f} on held-out text"
        )
        each.save_pretrained(arguments.folder / name)
        tokenizer.save_pretrained(arguments.folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
