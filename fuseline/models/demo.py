"""Models that need no path: `demo:smollm2`, `demo:tiny-llama`, `demo:tiny-decoder`, `demo:tiny-moe`,
`demo:tiny-encoder`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fuseline.compiler.errors import UserError, nearest
from fuseline.models.cache import cache_dir
from fuseline.models.checks import require
from fuseline.models.decoder import TinyDecoder
from fuseline.models.encoder import TinyEncoder
from fuseline.models.fetch import VERSION, smollm2_gguf
from fuseline.models.gguf import load_converted
from fuseline.models.huggingface import as_loaded, load_directory
from fuseline.models.loaded import LoadedModel
from fuseline.models.mixture import TinyMixture
from fuseline.models.tokens import ByteTokenizer

SEED = 0


def load_demo(which: str, name: str, dtype: torch.dtype | None) -> LoadedModel:
    """Loads a demonstration model; an unknown name is a UserError with the nearest one."""
    if which not in DEMOS:
        raise UserError(f"unknown demonstration model {which!r}{nearest(which, DEMOS)}")
    return DEMOS[which](name, dtype)


def smollm2(name: str, dtype: torch.dtype | None) -> LoadedModel:
    """SmolLM2-135M-Instruct (Allal et al., 2025), the real weights; float32 unless another dtype is asked for.

    They were quantized to Q4_1: they lie on a 4-bit asymmetric grid in groups of 32 along the inputs, so rounding to
    that very grid again loses nothing. Measure quantization at other settings.
    """
    require("transformers", name)
    folder = cache_dir() / f"smollm2-135m-instruct-{VERSION}"
    if folder.is_dir():
        try:
            return load_directory(folder, name, dtype or torch.float32)
        except UserError:
            pass  # a damaged cache entry: load_converted makes it again
    for package in ("gguf", "accelerate"):
        require(package, f"reading {name} for the first time")
    return load_converted(folder, smollm2_gguf(), name, dtype)


def tiny_llama(name: str, dtype: torch.dtype | None) -> LoadedModel:
    """A random Llama of two layers with grouped-query attention; the same weights every time, bytes as tokens."""
    require("transformers", name)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    return as_loaded(name, model.to(dtype or torch.float32), ByteTokenizer())


def tiny_decoder(name: str, dtype: torch.dtype | None) -> LoadedModel:
    """A random decoder of two layers in plain PyTorch, for a machine without transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = TinyDecoder().to(dtype or torch.float32).eval()
    ids = torch.arange(32).unsqueeze(0)
    return LoadedModel(name, model, (ids,), {}, ByteTokenizer(), {"ids": {1: "sequence"}})


def tiny_moe(name: str, dtype: torch.dtype | None) -> LoadedModel:
    """A decoder of three layers with 16 experts each, of which two are chosen, trained on Python's standard library by
    examples/train_tiny_moe.py; bytes as tokens."""
    from safetensors.torch import load_file

    model = TinyMixture(hidden=96, layers=3, heads=4, kv_heads=2, experts=16, chosen=2, inner=64)
    model.load_state_dict(load_file(Path(__file__).parent / "tiny_moe.safetensors"))
    ids = torch.arange(32).unsqueeze(0)
    model = model.to(dtype or torch.float32).eval()
    return LoadedModel(name, model, (ids,), {}, ByteTokenizer(), {"ids": {1: "sequence"}})


def tiny_encoder(name: str, dtype: torch.dtype | None) -> LoadedModel:
    """A random encoder of two layers over patches of an image, in plain PyTorch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = TinyEncoder().to(dtype or torch.float32).eval()
        patches = torch.randn(2, 64, 48, dtype=dtype or torch.float32)
    return LoadedModel(name, model, (patches,), {}, None, {})


DEMOS: dict[str, Callable[[str, torch.dtype | None], LoadedModel]] = {
    "smollm2": smollm2,
    "tiny-llama": tiny_llama,
    "tiny-decoder": tiny_decoder,
    "tiny-moe": tiny_moe,
    "tiny-encoder": tiny_encoder,
}
