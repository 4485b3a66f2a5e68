"""`gguf:FILE` and `gguf-codes:FILE`, through transformers' reader, with the result kept as safetensors.

Reading a GGUF file means dequantizing every tensor and rebuilding the tokenizer's merges: half a minute for a small
model. The converted folder (float32: the product of a scale and a code is exact there) is kept in the cache, and the
second load takes a second and needs neither the package gguf nor accelerate.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from fuseline.compiler.errors import UserError
from fuseline.models import gguf_codes
from fuseline.models.cache import cache_dir, new_folder
from fuseline.models.checks import check_weights, require
from fuseline.models.gguf_file import GgufHeader, read_header
from fuseline.models.huggingface import load_directory, quiet
from fuseline.models.loaded import LoadedModel

FINGERPRINT_BYTES = 1 << 20


def load_gguf(path: Path, name: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Loads a GGUF file in dtype (None: float32); a missing, truncated or corrupt file is a UserError."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return load_converted(cache_dir() / "gguf" / f"{path.stem}-{_fingerprint(path)}", path, name, dtype)


def load_gguf_codes(path: Path, name: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """The same, linears kept as codes where a number format holds them exactly; says on stderr which are not."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    folder = cache_dir() / "gguf" / f"{path.stem}-{_fingerprint(path)}-codes"
    loaded = load_converted(folder, path, name, dtype, codes=True)
    print(gguf_codes.summary(loaded.model.config.quantization_config.stored), file=sys.stderr)
    return loaded


def load_converted(
    folder: Path,
    gguf: Path | None,
    name: str,
    dtype: torch.dtype | None,
    header: GgufHeader | None = None,
    codes: bool = False,
) -> LoadedModel:
    """Loads `folder`; where it is absent or damaged, converts `gguf` into it first (None: there is no such file)."""
    if folder.is_dir():
        try:
            return load_directory(folder, name, dtype or torch.float32)
        except UserError:
            if gguf is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)  # a damaged cache entry is made again, not reported
    if gguf is None:
        raise UserError(f"no such folder: {folder}")
    convert(gguf, folder, header or read_header(gguf), name, codes)
    return load_directory(folder, name, dtype or torch.float32)


def convert(gguf: Path, folder: Path, header: GgufHeader, name: str, codes: bool = False) -> None:
    """Writes the model (float32 safetensors) and its tokenizer to `folder`, which appears whole or not at all.

    codes: with the codes of linears in the place of their weights, where they are the same (`gguf_codes.py`).
    """
    for package in ("transformers", "gguf", "accelerate"):
        require(package, f"reading {name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} to safetensors, once (about half a minute)", file=sys.stderr)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars know no other switch
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # transformers raises anything from KeyError to TypeError here
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[:4]
        raise UserError(f"{gguf} could not be read by transformers", reason) from error
    check_weights(model, str(gguf))
    forget_quantization(model)
    set_special_tokens(tokenizer, header)
    with new_folder(folder) as temporary, quiet(), contextlib.redirect_stderr(io.StringIO()):
        state, config = gguf_codes.replaced(model, gguf) if codes else (None, None)
        model.save_pretrained(temporary, state_dict=state)
        if config is not None:
            path = temporary / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}, indent=2))
        tokenizer.save_pretrained(temporary)


def forget_quantization(model: Any) -> None:
    """Removes what the GGUF reader leaves on a model with plain weights; save_pretrained would refuse with it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None


def set_special_tokens(tokenizer: Any, header: GgufHeader) -> None:
    """Sets them from the file's metadata: transformers 5.17 gives `eos` the token of `bos` for Llama-like files."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            setattr(tokenizer, f"{role}_token", tokens[index])


def _fingerprint(path: Path) -> str:
    """Of the size, the time of the last change and both ends: a file of many gigabytes is not read for it."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, stat.st_size - FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]
