"""Checkpoints as their readers see them: transformers alone, and rotations at run time as plain hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from tests.families.registry import ROWS
from tests.families.rows import tokens

IDS = tokens(2, 12, seed=3)


def model_of(name: str) -> torch.nn.Module:
    """A tiny random model of the family table."""
    return ROWS[name].model()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def loaded(folder: Path) -> torch.nn.Module:
    """By transformers, rotations at run time left out."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


def with_input_rotations(folder: Path) -> torch.nn.Module:
    """`loaded`, with what `transform_config` says of the inputs of linears done by hooks, from the text alone."""
    model, stored = loaded(folder), tensors_of(folder)
    for name, group in config_of(folder)["quantization_config"]["transform_config"]["config_groups"].items():
        n, (apply,) = group["head_dim"], group["apply"]
        assert apply["location"] == "input" and not apply["inverse"]
        matrix = stored.get(f"{apply['targets'][0]}.{name}_input.weight")
        if matrix is None:
            assert group["type"] == "hadamard" and n & (n - 1) == 0
            matrix = sylvester(n)

        def rotate(_: torch.nn.Module, args: Any, m: torch.Tensor = matrix, n: int = n) -> tuple[torch.Tensor]:
            return ((args[0].unflatten(-1, (-1, n)) @ m.to(args[0].dtype) / n**0.5).flatten(-2),)

        for target in apply["targets"]:
            model.get_submodule(target).register_forward_pre_hook(rotate)
    return model


def sylvester(n: int) -> torch.Tensor:
    """The ±1 matrix of order 2^k: H_2 ⊗ … ⊗ H_2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
