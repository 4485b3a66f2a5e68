"""A model with new values as a folder that transformers loads: `config.json`, safetensors, the tokenizer's files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..artifact import construct
from ..compiler.errors import UserError
from ..models.checks import require
from ..models.huggingface import from_pretrained, quiet
from ..models.stored import is_ours
from ..optimize import is_optimized
from .loaded_codes import stored
from .parameters import Assignment, check_split
from .quantization import METHOD, Quantization, without_rounding
from .transforms import MissingPackage, Transforms, apply

Progress = Callable[[int, int, str], None]
"""Told of each step: how many are done, how many there are (0: unknown), what is done now."""


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody sees."""


CARRIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
"""Files of the source's folder that belong to the model and say nothing of its weights."""


def refuse_other_models(model: torch.nn.Module) -> None:
    """Holds an export to models of transformers.

    Raises:
        UserError: transformers is missing, the model's class is not one of its own, or it was loaded quantized and has
            other modules than `CodedLinear`.
    """
    require("transformers", "a Hugging Face checkpoint")
    if construct.describe(model)["library"] != "transformers":
        raise UserError(
            f"{type(model).__name__} is no class of transformers, which could not load a checkpoint of it",
            remedy="fuseline.save(model, path) keeps any optimized model",
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None and not is_ours(quantization):
        raise UserError(
            f"{type(model).__name__} was loaded with quantized weights, and a plain checkpoint has no place for them",
            remedy="load the original model and export that",
        )


def write(
    model: torch.nn.Module,
    folder: Path,
    assignment: Assignment,
    found: Transforms,
    codes: Quantization,
    progress: Progress,
) -> list[str]:
    """Writes the checkpoint into an empty folder; the names of the files that came from the model's source.

    The new values are made in memory beside the old ones, and written by transformers' own `save_pretrained`.

    Raises:
        UserError: the class ties two parameters that get different values.
    """
    shell = _shell(model, assignment)
    originals, state = model.state_dict(keep_vars=True), model.state_dict()
    made: dict[Any, torch.Tensor] = {}  # tied parameters stay one tensor
    total = len(assignment.values) + 1
    for done, (name, value) in enumerate(assignment.values.items()):
        progress(done, total, name)
        linear = name.removesuffix(".weight")
        if linear in codes.linears:
            del state[name]
            state |= codes.tensors(assignment, linear)
            continue
        key = id(originals[name]), value
        if key not in made:
            made[key] = assignment.evaluate(name, state[name])
        state[name] = made[key]
    for name, linear in codes.loaded.items():
        for part, _ in linear.named_buffers():
            del state[f"{name}.{part}"]
        parts = stored(linear, codes.linears[name].format, model.dtype)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    if assignment.untied:  # one of them may keep the value that it had
        state |= {name: state[name].clone() for name in assignment.untied - assignment.values.keys()}
    state |= {name: found.tensor(name, model.dtype) for name in found.matrices}
    progress(total - 1, total, "writing")
    with quiet():
        shell.save_pretrained(folder, state_dict=state)
    if found.config is not None or codes.config is not None:
        rotated = {} if found.config is None else {"transform_config": found.config}
        _add_to_config(folder, {"quant_method": METHOD, **(codes.config or {}), **rotated})
    return _carry(model, folder)


def _shell(model: torch.nn.Module, assignment: Assignment) -> Any:
    """A model of the same class and configuration without values, its tables untied where they have to be."""
    record = construct.describe(model)
    if assignment.untied:
        record["config"]["tie_word_embeddings"] = False
    record["config"] |= assignment.config
    shell: Any = construct.build(record, None)
    if record["config"].get("quantization_config") is not None:
        del shell.config.quantization_config  # what is written has its own
    else:
        shell.to(model.dtype)
    check_split(shell, assignment.untied)
    generation: Any = getattr(shell, "generation_config", None)
    if generation is not None and is_optimized(model):
        generation.disable_compile = None
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        shell._weight_conversions = conversions  # how its checkpoint names and stacks its tensors
    return shell


def _add_to_config(folder: Path, quantization_config: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _carry(model: torch.nn.Module, folder: Path) -> list[str]:
    source = Path(getattr(model, "name_or_path", "") or "/nonexistent")
    carried = [name for name in CARRIED if (source / name).is_file() and not (folder / name).exists()]
    for name in carried:
        shutil.copyfile(source / name, folder / name)
    return carried


def reload(folder: Path, like: torch.nn.Module) -> torch.nn.Module:
    """The model in the folder, by transformers; without the rounding of activations, keys and values.

    transformers (5.17) reads quantized weights by way of compressed-tensors. It takes no notice of `transform_config`,
    and fails where there is nothing else; so transforms are attached here, as compressed-tensors does it.

    Raises:
        UserError: it cannot be loaded; MissingPackage: it needs compressed-tensors, which is not installed.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", None) or {}
    weights = without_rounding(quantization)
    if weights is not None:
        MissingPackage.check("quantized weights are read")
        config.quantization_config = weights
    elif quantization:
        del config.quantization_config
    for choice in ("_attn_implementation", "_experts_implementation"):
        if getattr(like.config, choice, None) is not None:
            setattr(config, choice, getattr(like.config, choice))
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        model = from_pretrained(folder, like.dtype, config).eval()
        if "transform_config" in quantization:
            apply(model, quantization["transform_config"], _stored(folder, quantization["transform_config"]))
    return model.to(like.device)


def _stored(folder: Path, transform_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The matrices in the checkpoint that the transforms have stored beside a module's parameters."""
    from safetensors import safe_open

    wanted = {
        f"{target}.{name}_{place['location']}.weight"
        for name, group in transform_config["config_groups"].items()
        for place in group["apply"]
        for target in place["targets"]
    }
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return found
