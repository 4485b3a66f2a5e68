"""Models in the Hugging Face format: `hf:DIR`."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.models import stored
from fuseline.models.checks import check_safetensors, check_weights, require
from fuseline.models.headers import headers_of
from fuseline.models.left_over import refuse_left_over, refuse_shapes
from fuseline.models.loaded import LoadedModel, Tokenizer
from fuseline.models.tokens import ByteTokenizer

EXAMPLE_TOKENS = 32


def load_directory(path: Path, name: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Loads a folder written by `save_pretrained`. dtype: None keeps the checkpoint's.

    Weights that are stored as codes stay codes: see `stored.py`.

    Raises a UserError for a folder without config.json, a weight file that is missing, truncated or incomplete, for
    tensors that are missing, of another shape or left over, and for weights that are not finite.
    """
    require("transformers", f"the model {name!r}")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else "no such folder"
        raise UserError(f"{path} has no config.json", [f"found: {found}"], "a folder written by model.save_pretrained")
    check_files(path)
    with quiet():
        model = from_pretrained(path, dtype, _with_our_reader(path))
        tokenizer = load_tokenizer(path, model)
    check_weights(model, str(path))
    return as_loaded(name, model, tokenizer)


def _with_our_reader(path: Path) -> Any:
    """The folder's configuration, codes of the methods that Fuseline knows to be read by it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        config.quantization_config = stored.redirected(quantization, headers_of(path)) or quantization
    return config


def as_loaded(name: str, model: nn.Module, tokenizer: Tokenizer | None) -> LoadedModel:
    """Adds example inputs: for a model over a vocabulary, ids [1, 32] whose length stays symbolic."""
    model.eval()
    config = model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        args: tuple[Any, ...] = tuple(model.dummy_inputs.values())
        return LoadedModel(name, model, args, {}, tokenizer)
    ids = torch.arange(EXAMPLE_TOKENS).unsqueeze(0) % vocabulary
    kwargs = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
    return LoadedModel(name, model, (ids,), kwargs, tokenizer, {"input_ids": {1: "sequence"}})


def load_tokenizer(path: Path, model: nn.Module) -> Tokenizer | None:
    """The folder's tokenizer; without one, bytes as tokens if the vocabulary has room for them."""
    from transformers import AutoTokenizer

    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    return byte_tokenizer(model)


def byte_tokenizer(model: nn.Module) -> ByteTokenizer | None:
    """Bytes as tokens, if the model has a vocabulary of at least 256."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    return ByteTokenizer() if isinstance(vocabulary, int) and vocabulary >= ByteTokenizer.vocabulary else None


def check_files(path: Path) -> None:
    """Every safetensors file of the folder is whole, and every shard that its index names is there."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is corrupt: {error}", remedy="copy or download the file again") from error
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} of its {len(shards)} weight files", missing[:5])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} has no .safetensors file",
            ["other weight formats run code when they are read and are not loaded"],
            "model.save_pretrained(DIR, safe_serialization=True)",
        )
    for file in files:
        check_safetensors(file)


def from_pretrained(path: Path, dtype: torch.dtype | None = None, config: Any = None) -> nn.Module:
    """The model in a folder, read by transformers; config: in the place of the folder's own.

    Raises:
        UserError: transformers cannot load it, or would fill in weights that are missing or leave out some that a
            module of the model should have.
    """
    import transformers

    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        model_class = _model_class(transformers, config)
        model, info = model_class.from_pretrained(
            path, config=config, dtype=dtype or "auto", local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} could not be loaded", str(error).strip().splitlines()[:4]) from error
    refuse_shapes(model, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} weights that {type(model).__name__} needs: {missing[0]}",
            missing[1:5],
            "transformers would fill them with random numbers; save the whole model",
        )
    refuse_left_over(model, path, info["unexpected_keys"])
    return model


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names; without one, the causal language model of its kind, else the bare model."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    causal = transformers.AutoModelForCausalLM
    return causal if type(config) in causal._model_mapping else transformers.AutoModel


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load reports: what matters in them is raised as an error here."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
