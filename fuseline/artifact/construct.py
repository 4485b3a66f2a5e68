"""How an artifact's model is built again, without weights: a transformers class by its name, or the caller's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..compiler.errors import UserError
from ..models import stored
from ..models.checks import require
from ..models.experts import NAME as EXPERTS, register

Builder: TypeAlias = Callable[[], torch.nn.Module] | torch.nn.Module | None


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What `build` needs: for a model of transformers its class and configuration; for others the class, to be read."""
    kind = type(model)
    record: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}", "library": None}
    if kind.__module__.split(".")[0] != "transformers":
        return record
    import transformers

    if getattr(transformers, kind.__name__, None) is not kind or not hasattr(model, "config"):
        return record
    config = model.config
    record |= {
        "library": "transformers",
        "class": kind.__name__,
        "config": {**json.loads(config.to_json_string(use_diff=False)), "architectures": [kind.__name__]},
        "attention": _per_part(config, "_attn_implementation"),
        "experts": _per_part(config, "_experts_implementation"),
    }
    if getattr(model, "generation_config", None) is not None:
        record["generation_config"] = json.loads(model.generation_config.to_json_string())
    return record


def _per_part(config: Any, name: str) -> dict[str, str | None]:
    """A choice of the model ("") and of its parts, such as a vision tower; it is not in the configuration's JSON."""
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}
    return {"": getattr(config, name, None), **{k: getattr(c, name, None) for k, c in parts.items() if c is not None}}


def build(record: dict[str, Any], model: Builder) -> torch.nn.Module:
    """The module, its tensors on the meta device; an instance that the caller gave is returned as it is.

    Raises:
        UserError: nothing says how to build the module, or building it failed.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if model is not None and not callable(model):
        raise UserError(f"model= is a function without arguments or a module, not {type(model).__name__}")
    name = record.get("class")
    try:
        with torch.device("meta"):
            built = model() if model is not None else _from_transformers(record)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} could not be built without its weights: {type(error).__name__}: {str(error).strip()[:300]}",
            ["it was built under torch.device('meta'), where tensors have no values"],
            "give load an instance instead: fuseline.load(path, model=Net())",
        ) from error
    if not isinstance(built, torch.nn.Module):
        raise UserError(f"model= gave a {type(built).__name__}, not a torch.nn.Module")
    return built


def _from_transformers(record: dict[str, Any]) -> torch.nn.Module:
    name = record.get("class")
    if record.get("library") != "transformers":
        raise UserError(
            f"the artifact's model is {name}, which is no class of transformers",
            ["nothing is imported because a file names it"],
            "say how to build it: fuseline.load(path, model=lambda: Net(…))",
        )
    require("transformers", f"the model {name}")
    import transformers

    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        raise UserError(
            f"the installed transformers ({transformers.__version__}) has no model class {name!r}",
            remedy="install the release that the artifact was saved with, or pass model=",
        )
    if EXPERTS in record["experts"].values():
        register()
    config = kind.config_class.from_dict(dict(record["config"]))
    built = kind._from_config(
        config, attn_implementation=_choices(record["attention"]), experts_implementation=_choices(record["experts"])
    )
    stored.rebuild(built, getattr(config, "quantization_config", None))
    if "generation_config" in record:
        built.generation_config = transformers.GenerationConfig.from_dict(dict(record["generation_config"]))
    return built


def _choices(record: Any) -> dict[str, str | None]:
    """Names of implementations. One that holds a slash is a repository, whose code transformers would fetch and run."""
    for name in record.values():
        if name is not None and not (isinstance(name, str) and name.replace("_", "").replace("|", "").isalnum()):
            raise UserError(
                f"the artifact wants the attention or experts implementation {name!r}, which is fetched from a hub",
                ["an artifact never has code fetched"],
                "build the model yourself: fuseline.load(path, model=lambda: …)",
            )
    return dict(record)
