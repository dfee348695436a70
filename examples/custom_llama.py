"""A Llama of your own: the whole model, from the checkpoint to the text, in the blocks of `hfopt.modules`.

    python examples/custom_llama.py FOLDER --prompt "..." [--beams 4] [--dtype bfloat16]

FOLDER is a checkpoint of transformers' LlamaForCausalLM; without one it is the small model that comes with hfopt. The tokens
are those of LlamaForCausalLM.generate. Change what you like: each class below is a page long.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

import hfopt
from hfopt.modules import IndirectAccessKVCacheAttention, Linear2SiluMul, LinearAdd, RMSNorm, RotaryEmbedding

Weights = dict[str, Tensor]
LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]
NEVER = -1e9  # the score of what is not to be chosen

# ── Reading a checkpoint ────────────────────────────────────────────────────────────────────────────────────────────────


def read(folder: Path, dtype: torch.dtype) -> Weights:
    """All tensors of a checkpoint by their names; large ones lie in several files, which an index lists."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    return {
        name: tensor.to(dtype) for file in sorted(files) for name, tensor in load_file(folder / file).items()
    }


def linear(weights: Weights, *names: str) -> nn.Linear:
    """The projections `names` as one, whose outputs stand side by side."""
    first, *others = (weights[f"{name}.weight"] for name in names)
    weight = torch.cat([first, *others]) if others else first
    made = nn.Linear(weight.size(1), weight.size(0), bias=f"{names[0]}.bias" in weights, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if made.bias is not None:
        made.bias = nn.Parameter(torch.cat([weights[f"{name}.bias"] for name in names]), requires_grad=False)
    return made


# ── The model ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Past:
    """What has been read: the keys and values of each layer, and which tokens of each row are text and no padding.

    A layer's past is (length, keys, values, beams): the length is the last size but one of the first; the last says for each
    token and row which row has written it. All are empty until the prompt has been read.
    """

    def __init__(self, n_layers: int, is_text: Tensor, n_beams: int, dtype: torch.dtype) -> None:
        self.is_text = is_text.bool()
        length = torch.zeros(1, 0, 0, 1, dtype=torch.long)
        beams = torch.zeros(1, len(is_text) * n_beams, dtype=torch.long)
        self.layers = [(length, *torch.zeros(2, 1, 1, 1, 1, dtype=dtype), beams) for _ in range(n_layers)]

    def __len__(self) -> int:
        return self.layers[0][0].size(-2)

    def append(self, n_rows: int, n_new: int) -> None:
        """New tokens, all of them text; after the prompt, there is a row for each beam."""
        is_text = self.is_text.repeat_interleave(n_rows // len(self.is_text), dim=0)
        self.is_text = torch.cat([is_text, is_text.new_ones(n_rows, n_new)], dim=1)

    def reorder(self, beam_idx: Tensor) -> None:
        """Row i goes on from row `beam_idx[i]`: one line of a table, and no key or value moves."""
        for past in self.layers:
            past[3][len(self) - 1] = beam_idx


class Layer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: LlamaConfig, weights: Weights, name: str, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rotary = config.num_attention_heads, config.head_dim, rotary
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.norm = norm(weights[f"{name}.input_layernorm.weight"])
        self.mlp_norm = norm(weights[f"{name}.post_attention_layernorm.weight"])
        self.qkv = linear(weights, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        self.attention = IndirectAccessKVCacheAttention()
        self.output = LinearAdd(linear(weights, f"{name}.self_attn.o_proj"))
        self.gated = Linear2SiluMul(*(linear(weights, f"{name}.mlp.{part}_proj") for part in ("gate", "up")))
        self.down = LinearAdd(linear(weights, f"{name}.mlp.down_proj"))

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: LayerPast
    ) -> tuple[Tensor, LayerPast]:
        qkv, half = self.qkv(self.norm(x)), self.head_dim // 2
        length = past[0].size(-2) + x.size(1)
        query, key, value = self.rotary(
            qkv, positions, self.n_heads, self.head_dim, half, self.head_dim, seq_len=length, num_concats=3
        )
        attended, _, past = self.attention(
            query, key, value, math.sqrt(self.head_dim), layer_past=past, attention_mask=mask
        )
        x = self.output(attended.transpose(1, 2).flatten(2), x)
        return self.down(self.gated(self.mlp_norm(x)), x), past


class Llama(nn.Module):
    """Touvron et al., https://arxiv.org/abs/2302.13971: tokens [rows, new] → logits of the last one [rows, vocabulary]."""

    def __init__(self, config: LlamaConfig, weights: Weights) -> None:
        super().__init__()
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise ValueError(f"this is a Llama with silu, not {config.model_type} with {config.hidden_act}")
        self.config = config
        rope = getattr(config, "rope_parameters", None)
        if rope is None:  # transformers 4
            rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
        rotary = RotaryEmbedding(
            config.max_position_embeddings, config.head_dim, rope["rope_theta"], extra_rope_config=rope
        )
        names = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        self.embedding = nn.Embedding.from_pretrained(weights["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(Layer(config, weights, name, rotary) for name in names)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights["model.norm.weight"])
        self.head = linear(weights, "model.embed_tokens" if config.tie_word_embeddings else "lm_head")

    def read(self, is_text: Tensor, n_beams: int = 1) -> Past:
        """A past without tokens, for prompts of which `is_text` [prompts, tokens] tells padding."""
        return Past(len(self.layers), is_text, n_beams, self.embedding.weight.dtype)

    def forward(self, ids: Tensor, past: Past) -> Tensor:
        n_past = len(past)
        if n_past > 0:
            past.append(*ids.shape)
        n_all = n_past + ids.size(1)
        positions = (past.is_text.cumsum(dim=1) - 1).clamp(min=0)[:, n_past:]
        causal = torch.ones(ids.size(1), n_all, dtype=torch.bool).tril(n_past)
        x = self.embedding(ids)
        seen = causal & past.is_text[:, None, None, :]
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for i, layer in enumerate(self.layers):
            x, past.layers[i] = layer(x, positions, mask, past.layers[i])
        return self.head(self.norm(x[:, -1]))


def load(folder: str | Path, dtype: torch.dtype) -> Llama:
    return Llama(AutoConfig.from_pretrained(folder), read(Path(folder), dtype)).eval()


# ── Generation: prompts [rows, tokens], padded on the left → new tokens [rows, n_new], filled up with the end token ────────


@torch.inference_mode()
def greedy(model: Llama, ids: Tensor, is_text: Tensor, n_new: int, eos: Tensor) -> Tensor:
    """The most probable token, again and again."""
    past = model.read(is_text)
    tokens = ids.new_full((len(ids), n_new), int(eos[0]))
    has_ended = torch.zeros(len(ids), dtype=torch.bool)
    for i in range(n_new):
        token = model(ids, past).argmax(dim=-1).masked_fill(has_ended, int(eos[0]))
        tokens[:, i] = token
        has_ended |= torch.isin(token, eos)
        if has_ended.all():
            break
        ids = token[:, None]
    return tokens


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[row, index[row]] for each row."""
    return x.take_along_dim(index.view(*index.shape, *[1] * (x.dim() - 2)), dim=1)


@torch.inference_mode()
def beam_search(model: Llama, ids: Tensor, is_text: Tensor, n_new: int, eos: Tensor, n_beams: int) -> Tensor:
    """The text of the highest mean log-probability among those that `n_beams` beams for each prompt come upon.

    The rules are those of transformers' generate(num_beams=n_beams) with its defaults.
    """
    n_rows, first_beam = len(ids), torch.arange(len(ids))[:, None] * n_beams
    past = model.read(is_text, n_beams)
    logits = model(ids, past).repeat_interleave(n_beams, dim=0)  # a prompt is read once for all of its beams
    running = torch.full((n_rows, n_beams, n_new), int(eos[0]))
    ended, has_ended = running.clone(), torch.zeros(n_rows, n_beams, dtype=torch.bool)
    ended_scores = torch.full((n_rows, n_beams), NEVER)
    scores = ended_scores.clone()
    scores[:, 0] = 0.0  # all beams are the same text now: one of them goes on
    may_improve = torch.ones(n_rows, 1, dtype=torch.bool)
    for i in range(n_new):
        log_probs = logits.float().log_softmax(dim=-1).unflatten(0, (n_rows, n_beams)) + scores[..., None]
        # so many that enough go on, whichever end
        scores, index = log_probs.flatten(1).topk(max(2, 1 + len(eos)) * n_beams)
        parent, token = index // logits.size(-1), index % logits.size(-1)
        candidates = pick(running, parent)
        candidates[:, :, i] = token
        ends = torch.isin(token, eos) | (i == n_new - 1)
        # a text that has ended is kept by its mean
        counts = ends & (torch.arange(ends.size(1)) < n_beams)
        means = scores / (i + 1) + ~(counts & may_improve) * NEVER
        ended_scores, kept = torch.cat([ended_scores, means], dim=1).topk(n_beams)
        ended = pick(torch.cat([ended, candidates], dim=1), kept)
        has_ended = pick(torch.cat([has_ended, counts], dim=1), kept)
        # the best of the others go on
        scores, going_on = (scores + ends * NEVER).topk(n_beams)
        running, parent = pick(candidates, going_on), pick(parent, going_on)
        worst = torch.where(has_ended, ended_scores.min(dim=1, keepdim=True).values, NEVER)
        may_improve &= (scores[:, :1] / (i + 1) > worst).any(dim=1, keepdim=True)
        if ends.all() or not may_improve.any():
            break
        past.reorder((parent + first_beam).flatten())
        logits = model(running[:, :, i].reshape(-1, 1), past)
    return ended[:, 0]


# ── The command ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a Llama written in the blocks of hfopt.")
    parser.add_argument("folder", nargs="?", default=hfopt.embedded_model(), help="of a LlamaForCausalLM")
    parser.add_argument("--prompt", default="Read up to", help="text to go on from (default: %(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="1 is greedy search")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    model = load(arguments.folder, getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    request = model, prompt["input_ids"], prompt["attention_mask"], arguments.max_new_tokens
    eos = torch.tensor(model.config.eos_token_id).view(-1)
    tokens = greedy(*request, eos) if arguments.beams == 1 else beam_search(*request, eos, arguments.beams)
    print(arguments.prompt + tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
