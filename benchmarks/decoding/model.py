"""An unmodified transformers model with random weights, and the state after a prompt that every candidate starts from.

Weights are drawn on the device, the same for the same seed: a unit-variance stream through every linear, and logits
with a standard deviation of 4, so that the distribution over the vocabulary is about as peaked as a trained model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
LOGITS = 4.0  # standard deviation
SEED = 0


def build(shape: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A causal language model of that shape (shortened to `layers`), in eval mode, weights drawn from SEED."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,  # a random model must not stop early
        pad_token_id=None,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw(model, device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def fitting(shape: str, memory: float, itemsize: int = 2) -> int:
    """How many of a shape's layers fit in half of `memory` bytes, beside its embedding and head; one at the least.

    The other half is for what is derived of the weights, the cache and the workspaces of compilers.
    """
    s = SHAPES[shape]
    hidden, inner, ends = s["hidden_size"], s["intermediate_size"], 1 if s["tie_word_embeddings"] else 2
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = itemsize * hidden * (2 * hidden + 2 * keys + 3 * inner + 2)
    left = memory / 2 - itemsize * hidden * (ends * s["vocab_size"] + 1)
    return max(1, min(s["num_hidden_layers"], int(left // layer)))


@torch.no_grad()
def draw(model: torch.nn.Module, device: torch.device) -> None:
    """Fills every weight matrix: rows of an embedding with variance 1, of a linear with 1 over its inputs."""
    generator = torch.Generator(device).manual_seed(SEED)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not table.weight:
            scale = LOGITS if module is head else 1.0
            module.weight.normal_(0, scale * module.in_features**-0.5, generator=generator)
        elif isinstance(module, torch.nn.Embedding):
            scale = LOGITS * module.embedding_dim**-0.5 if head.weight is module.weight else 1.0
            module.weight.normal_(0, scale, generator=generator)


@dataclass
class State:
    """After a prompt: each layer's keys and values [batch, KV heads, positions, head dim], and the next token.

    prompt: int64 [batch, length]; token: int64 [batch, 1].
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    prompt: torch.Tensor
    token: torch.Tensor

    @property
    def length(self) -> int:
        return self.prompt.shape[1]

    def fill(self, cache: StaticCache) -> None:
        """Brings a cache to this state in place: addresses stay, so captures of earlier steps hold."""
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            layer.keys[:, :, : self.length].copy_(keys)
            layer.values[:, :, : self.length].copy_(values)
            layer.keys[:, :, self.length :].zero_()
            layer.values[:, :, self.length :].zero_()
            layer.cumulative_length.fill_(self.length)


def static_cache(model: torch.nn.Module, batch: int, length: int, device: torch.device) -> StaticCache:
    """A static cache, initialised ahead of any compiled code: its tensors are then at addresses known to be static."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, head, model.dtype, device)
    return cache


def random_ids(model: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Token ids [batch, length], the same for the same sizes."""
    generator = torch.Generator(device).manual_seed(SEED + 1)
    return torch.randint(model.config.vocab_size, (batch, length), device=device, generator=generator)


def prompted(model: torch.nn.Module, batch: int, length: int, capacity: int, device: torch.device) -> State:
    """The state after a random prompt of `length` tokens, computed in eager."""
    return after(model, random_ids(model, batch, length, device), capacity)


@torch.no_grad()
def after(model: torch.nn.Module, prompt: torch.Tensor, capacity: int) -> State:
    """The state after a prompt [batch, length], computed in eager."""
    batch, length = prompt.shape
    cache = static_cache(model, batch, capacity, prompt.device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cut = lambda x: x[:, :, :length].clone()
    return State(
        [cut(layer.keys) for layer in cache.layers],
        [cut(layer.values) for layer in cache.layers],
        prompt,
        logits[:, -1].argmax(-1, keepdim=True),
    )


def drawn(model: Any, batch: int, length: int, device: torch.device) -> State:
    """A state after `length` tokens that nobody computed: keys and values are drawn, as the prompt is.

    A random model's keys and values have variance 1 too, and a step takes as long over these. The prompt of a long
    cache would take eager longer than all that is measured.
    """
    prompt = random_ids(model, batch, length + 1, device)
    generator = torch.Generator(device).manual_seed(SEED + 2)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, length, head)
    draw = lambda: torch.randn(shape, device=device, dtype=model.dtype, generator=generator)
    keys, values = ([draw() for _ in range(config.num_hidden_layers)] for _ in range(2))
    return State(keys, values, prompt[:, :-1], prompt[:, -1:].clone())


def cache_bytes(model: torch.nn.Module, batch: int, length: float) -> float:
    """Bytes of the keys and values of `length` positions."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = config.num_key_value_heads * head * model.dtype.itemsize
    return 2 * config.num_hidden_layers * batch * length * each


def stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight lies in: itself, or what a quantized tensor subclass holds."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor


def size(tensor: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in stored(tensor))


def weight_bytes(model: torch.nn.Module, batch: int) -> int:
    """Bytes that one step must read of the weights as they are stored; of a table that is only looked up, its rows."""
    table = model.get_input_embeddings().weight
    used = {id(p): p for m in model.modules() if not isinstance(m, torch.nn.Embedding) for p in m._parameters.values()}
    used.pop(id(None), None)
    return sum(size(p) for p in used.values()) + batch * table.shape[1] * table.element_size()
