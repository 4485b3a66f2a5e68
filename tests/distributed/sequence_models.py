"""Models and batches for the tests of sequence-parallel: decoders without casts, and tiny Hugging Face families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 48


class Decoder(nn.Module):
    """A decoder without casts: RMSNorm, rotary positions, grouped queries, SwiGLU, a shifted loss; all in one dtype.

    written_out: attention as two products and a softmax; window: keys that a query sees; tied: one embedding.
    """

    def __init__(self, heads=4, keys=2, written_out=False, window=None, tied=False, shared=False, smoothing=0.0,
                 vocabulary=VOCABULARY):  # fmt: skip
        super().__init__()
        self.heads, self.keys, self.written_out, self.window = heads, keys, written_out, window
        self.shared, self.smoothing = shared, smoothing
        width = 8 * heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Linear(width, 8 * keys, bias=False)
        self.v = nn.Linear(width, 8 * keys)
        self.gate, self.up, self.down = nn.Linear(width, 40), nn.Linear(width, 40), nn.Linear(40, width)
        self.norm = nn.Parameter(torch.rand(width) + 0.5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm

    def attend(self, q, k, v, mask):
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        k, v = (x.repeat_interleave(self.heads // self.keys, 1) for x in (k, v))
        scores = 5.0 * torch.tanh(q @ k.transpose(-1, -2) / 40)
        i = torch.arange(q.shape[2])
        visible = i[None, :] <= i[:, None] if mask is None else mask
        return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ v

    def forward(self, ids, labels=None, mask=None, weight=None):
        batch, length = ids.shape
        x = self.embedding(ids)
        angle = torch.arange(length)[:, None] / 7 * torch.arange(1, 5)
        angle = torch.cat((angle, angle), -1).to(x.dtype)
        turn = lambda t: t * angle.cos() + torch.cat((-t[..., 4:], t[..., :4]), -1) * angle.sin()
        h = self.normed(x)
        q = turn(self.q(h).view(batch, length, self.heads, 8).transpose(1, 2))
        k = turn(self.k(h).view(batch, length, self.keys, 8).transpose(1, 2))
        v = k if self.shared else self.v(h).view(batch, length, self.keys, 8).transpose(1, 2)
        if self.window is not None:
            i = torch.arange(length)
            near = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - self.window)
            mask = near if mask is None else near & mask
        x = x + self.o(self.attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, -1))
        h = self.normed(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        logits = self.head(self.normed(x))
        if labels is None:
            return logits
        target = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        return F.cross_entropy(logits.flatten(0, 1), target, weight, label_smoothing=self.smoothing)


def batch(size: int, length: int, prompt: int = 0) -> dict[str, Any]:
    """Token ids, and labels of which the first `prompt` do not count."""
    ids = torch.randint(0, VOCABULARY, (size, length))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"ids": ids, "labels": labels}


def families() -> Iterator[tuple[str, Callable[[], nn.Module], Callable[[int, int], dict[str, Any]]]]:
    """Name, how to build the model (float64), how to make a batch of a size and a length."""
    import transformers as hf

    common: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    }  # fmt: skip
    grouped = {**common, "num_key_value_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def tokens(size: int, length: int) -> dict[str, Any]:
        found = batch(size, length, prompt=length // 2 + 1)
        return {"input_ids": found["ids"], "labels": found["labels"]}

    def padded(size: int, length: int) -> dict[str, Any]:
        mask = torch.ones(size, length, dtype=torch.long)
        mask[-1, length - 3 :] = 0
        return {**tokens(size, length), "attention_mask": mask}

    def packed(size: int, length: int) -> dict[str, Any]:
        first = length // 3
        positions = torch.cat((torch.arange(first), torch.arange(length - first)))
        return {**tokens(size, length), "position_ids": positions.expand(size, length).contiguous()}

    def images(size: int, length: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(size, 3, 16, 16).double(), "labels": torch.arange(size) % 2}

    def mixtral(experts: str) -> nn.Module:
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2))
        model.set_experts_implementation(experts)
        return model

    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    gpt2.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    image = {k: v for k, v in common.items() if k not in ("vocab_size", "max_position_embeddings")}
    eager = {"attn_implementation": "eager"}
    yield "llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)), tokens
    yield "llama-padded", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)), padded
    yield "llama-packed", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)), packed
    yield "llama-tied", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped, tie_word_embeddings=True)), tokens
    yield "qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**grouped, head_dim=8)), tokens
    yield "mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**grouped, sliding_window=4)), tokens
    yield (
        "gemma2",
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**grouped, **eager, head_dim=8, sliding_window=4)),
        padded,
    )
    yield "mixtral", lambda: mixtral("grouped_mm"), tokens
    yield "mixtral-batched", lambda: mixtral("batched_mm"), tokens
    yield "gpt2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)), tokens
    yield "bert", lambda: hf.BertForMaskedLM(hf.BertConfig(**common, **quiet)), padded
    yield (
        "vit",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**image, **quiet, image_size=16, patch_size=4)),
        images,
    )
