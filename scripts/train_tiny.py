"""Train the embedded model: a small Llama on the documentation that every Python installation carries.

    python scripts/train_tiny.py                      write hfopt/embedded; half an hour on one core
    python scripts/train_tiny.py --evaluate FOLDER    a saved model's perplexity on hfopt/embedded/heldout.txt

The text is the docstrings of the standard library, read from its sources, and the chapters of the language
reference that `help()` shows. One docstring in twenty, chosen by a hash of its words, is held out: the same
docstring is on the same side under every version of Python, so heldout.txt is never trained on.
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import platform
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

EMBEDDED = Path(__file__).resolve().parents[1] / "hfopt" / "embedded"
HELDOUT = "heldout.txt"
HELDOUT_BYTES = 40_000
SEPARATOR = "<|endoftext|>"  # stands before and after every text: bos, eos and padding
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

VOCAB_SIZE = 1792
CONTEXT = 512
BATCH = 4  # windows of CONTEXT tokens
STEPS = 3000
WARMUP = 100
LEARNING_RATE = 2.5e-3
DROPOUT = 0.1  # two million parameters see each docstring more than ten times
SEED = 0

DEMO_PROMPT = "Read up to"
PROMPTS = (  # beginnings that the model ends well, and in few words: see MODEL.md
    DEMO_PROMPT,
    "Return a list of",
    "Return True if",
    "Raise an exception if",
    "Remove and return",
    "A handler class",
)
NEW_TOKENS = 64


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of the .py files under `root`, in the order of their paths, without its indentation."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield (ast.get_docstring(node) or "").strip()


def chapters(root: Path) -> list[str]:
    """The chapters of the language reference behind `help("if")`; none where an installation lacks them."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    statements = ast.parse(path.read_bytes()).body
    topics = ast.literal_eval(next(node.value for node in statements if isinstance(node, ast.Assign)))
    return [inspect.cleandoc(topics[name]) for name in sorted(topics)]


def words(text: str) -> str:
    """What identifies a text: its letters. Copies that differ in layout or numbers count as one."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def split(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts, each once; the held-out ones in the order of their hashes."""
    unique = {words(text): text for text in texts}
    unique.pop("", None)
    digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in unique}
    training = [text for key, text in unique.items() if int(digests[key][:8], 16) % 20]
    heldout = sorted((key for key in unique if not int(digests[key][:8], 16) % 20), key=digests.__getitem__)
    return training, [unique[key] for key in heldout]


def corpus() -> tuple[list[str], list[str]]:
    """(training, held-out) texts of this Python."""
    library = Path(sysconfig.get_path("stdlib"))
    training, heldout = split(docstrings(library))
    return training + chapters(library), heldout


def write_heldout(path: Path, texts: list[str]) -> None:
    """Keep `HELDOUT_BYTES` of the held-out texts, whole ones only, with lines of `SEPARATOR` between them."""
    kept: list[str] = []
    for text in texts:
        if len(f"\n{SEPARATOR}\n".join([*kept, text]).encode()) < HELDOUT_BYTES:
            kept.append(text)
    path.write_text(f"\n{SEPARATOR}\n".join(kept) + "\n", encoding="utf-8", newline="\n")


def read_heldout(path: Path) -> list[str]:
    """The texts that `write_heldout` wrote."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split(f"\n{SEPARATOR}\n")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no text is unknown to it) that puts `SEPARATOR` before each text."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B",
        special_tokens=[(SEPARATOR, core.token_to_id(SEPARATOR))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that both transformers 4 and 5 know; 5 would write one that 4 cannot load."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def new_model(separator_id: int) -> LlamaForCausalLM:
    """The untrained model; every matrix has a multiple of 128 columns, which quantisation in groups likes."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=separator_id,
        eos_token_id=separator_id,
        pad_token_id=separator_id,
    )
    return LlamaForCausalLM(config)


def batches(texts: list[list[int]], steps: int) -> Iterator[torch.Tensor]:
    """`steps` tensors [BATCH, CONTEXT] of token ids: all texts in a row, each time round in a new order."""
    order = random.Random(SEED)
    texts = list(texts)
    stream: list[int] = []
    for _ in range(steps):
        while len(stream) < BATCH * CONTEXT:
            order.shuffle(texts)
            stream.extend(token for text in texts for token in text)
        yield torch.tensor(stream[: BATCH * CONTEXT]).view(BATCH, CONTEXT)
        del stream[: BATCH * CONTEXT]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero, as a fraction of `LEARNING_RATE`."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, texts: list[list[int]], steps: int) -> None:
    """AdamW over `batches`, with dropout (Llama has none) on what attention and MLP add to the residual."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    dropout = torch.nn.Dropout(DROPOUT)
    adding = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [part.register_forward_hook(lambda part, inputs, output: dropout(output)) for part in adding]
    model.train()
    average = math.log(VOCAB_SIZE)
    progress = tqdm(batches(texts, steps), total=steps, desc="training", unit="step")
    for input_ids in progress:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average += 0.02 * (loss.item() - average)
        progress.set_postfix(loss=f"{average:.3f}")
    for hook in hooks:
        hook.remove()
    model.eval()


class Evaluation(NamedTuple):
    """How well a model predicts some texts."""

    tokens: int
    bytes: int  # of UTF-8, without the separators
    nats: float  # negative log-likelihood of all tokens

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood of a token)."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Evaluation:
    """Predict every token of every text and the separator that ends it, each text on its own.

    A text that does not fit into the model's context is cut; each piece is read after a separator.
    """
    separator = tokenizer.bos_token_id
    nats, tokens = 0.0, 0
    for text in texts:
        targets = [*tokenizer(text, add_special_tokens=False)["input_ids"], separator]
        for start in range(0, len(targets), CONTEXT):
            piece = torch.tensor([targets[start : start + CONTEXT]])
            before = torch.cat([torch.tensor([[separator]]), piece[:, :-1]], dim=1)
            logits = model(input_ids=before, use_cache=False).logits.float()
            nats += torch.nn.functional.cross_entropy(logits[0], piece[0], reduction="sum").item()
        tokens += len(targets)
    return Evaluation(tokens, sum(len(text.encode()) for text in texts), nats)


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and what greedy search makes of it: up to the model's own end, or `NEW_TOKENS`."""
    inputs = tokenizer(prompt, return_tensors="pt")
    generation: Any = model  # the stubs of `generate` know no concrete model
    output = generation.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The saved model, in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


CARD = """\
# The embedded model

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} query and
{kv_heads} key/value heads, tied embeddings, context {context}) with a byte-level BPE tokenizer of
{vocabulary} tokens, stored in bfloat16. It was trained from scratch on the docstrings of Python's standard
library and the language reference of `help()`, and writes in their manner. It is here so that everything
can be shown and tested without a download; it knows nothing else. It was not trained to chat:
`chat_template.jinja` makes a document of each question, which it continues.

`python scripts/train_tiny.py` reproduces it: {steps} steps of {batch} × {context} tokens, from {texts:,}
texts of {text_tokens:,} tokens. Written by Python {python}, torch {torch}, transformers {transformers}.
The figures hold for float32 arithmetic on the stored weights.

The texts belong to the Python Software Foundation and its contributors (PSF licence).

## Held-out text

`python scripts/train_tiny.py --evaluate hfopt/embedded` measures `heldout.txt`: docstrings that were not
trained on.

| text | tokens | bytes | perplexity per token | bits per byte |
|---|---|---|---|---|
| heldout.txt | {small.tokens} | {small.bytes} | {small.perplexity:.3f} | {small.bits_per_byte:.4f} |
| all held-out docstrings | {full.tokens} | {full.bytes} | {full.perplexity:.3f} | {full.bits_per_byte:.4f} |

## Greedy continuations, at most {new_tokens} new tokens

The prompts were chosen among common beginnings of docstrings. The sentences are English and their content is
not to be trusted. Other prompts, and more than some forty tokens, often make greedy text repeat itself.

{samples}
"""


def write_card(folder: Path, steps: int, training: list[str], heldout: list[str]) -> None:
    """Measure the model that was saved in `folder` and write MODEL.md beside it."""
    model, tokenizer = load(folder)
    config = model.config
    samples = [f"`{prompt}`\n\n```text\n{continuation(model, tokenizer, prompt)}\n```" for prompt in PROMPTS]
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        context=CONTEXT,
        vocabulary=len(tokenizer),
        steps=steps,
        batch=BATCH,
        texts=len(training),
        text_tokens=sum(len(tokenizer(text)["input_ids"]) for text in training),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        small=evaluate(model, tokenizer, read_heldout(folder / HELDOUT)),
        full=evaluate(model, tokenizer, heldout),
        new_tokens=NEW_TOKENS,
        samples="\n\n".join(samples),
    )
    (folder / "MODEL.md").write_text(card, encoding="utf-8", newline="\n")
    print(card)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure the model in FOLDER")
    parser.add_argument("--output", type=Path, default=EMBEDDED, help="default: the package")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the same sums in the same order on any number of cores
    if arguments.evaluate:
        result = evaluate(*load(arguments.evaluate), read_heldout(EMBEDDED / HELDOUT))
        print(f"perplexity {result.perplexity:.3f} per token, {result.bits_per_byte:.4f} bits per byte")
        return

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    training, heldout = corpus()
    tokenizer = train_tokenizer(training)
    tokens = [tokenizer(text)["input_ids"] for text in training]
    model = new_model(tokenizer.bos_token_id)
    train(model, tokens, arguments.steps)

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.bfloat16()
    model.save_pretrained(arguments.output)
    save_tokenizer(tokenizer, arguments.output)
    if not (arguments.output / HELDOUT).exists():  # fixed once, so that figures of different versions compare
        write_heldout(arguments.output / HELDOUT, heldout)
    write_card(arguments.output, arguments.steps, training, heldout)


if __name__ == "__main__":
    main()
