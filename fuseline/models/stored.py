"""Checkpoints whose weights are codes: which method wrote them, and transformers told to load them into our modules.

transformers loads them through a quantizer of ours, registered under another name: it puts a `StoredLinear` in the
place of each linear that has codes, and a `CodedLinear` over the same codes when they are there. No package of the
method's is needed.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

from fuseline.compiler.errors import UserError, nearest
from fuseline.models import awq, compressed, gguf_codes, gptq
from fuseline.models.coded import StoredLinear
from fuseline.models.headers import Headers
from fuseline.models.left_over import refuse_shapes

READER = "fuseline-codes"

METHODS: dict[str, ModuleType] = {module.METHOD: module for module in (compressed, gptq, awq, gguf_codes)}
"""Modules with `prepared(config, headers)`, which refuses what is not read, and `replace(model, prepared)`."""


def redirected(config: dict[str, Any], headers: Headers) -> dict[str, Any] | None:
    """The `quantization_config` with which transformers calls the quantizer below; None for methods of its own.

    config: the checkpoint's `quantization_config`; headers: of its tensors.

    Raises:
        UserError: the method is unknown, or the checkpoint is not read.
    """
    method = str(config.get("quant_method"))
    if method in METHODS:
        read = METHODS[method].prepared(config, headers)
        _register()
        return {"quant_method": READER, "method": method, "stored": read}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    theirs = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
    if method not in theirs:
        raise UserError(
            f"unknown quantization method {method!r}{nearest(method, (*METHODS, *theirs))}",
            [f"codes of {', '.join(METHODS)} are read as they are; other methods are transformers'"],
        )
    return None


def replace(model: nn.Module, config: dict[str, Any]) -> None:
    """Puts a `StoredLinear` in the place of each linear that has codes; config: what `redirected` gave."""
    METHODS[config["method"]].replace(model, config["stored"])


def finish(model: nn.Module) -> None:
    """Puts a `CodedLinear` in the place of each `StoredLinear`, one after the other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredLinear):
            model.set_submodule(name, module.finished(name))


def rebuild(model: nn.Module, config: Any) -> None:
    """Gives a model that was built without its values the linears that it was loaded with.

    config: the model's `quantization_config`; one that is not of the quantizer below is none of ours.
    """
    if isinstance(config, dict) and is_ours(config):
        replace(model, config)
        finish(model)


def is_ours(config: Any) -> bool:
    """Whether a model's `quantization_config` is that of the quantizer below."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return method == READER


@cache
def _register() -> None:
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(READER)
    class Config(QuantizationConfigMixin):
        def __init__(self, method: str, stored: dict[str, Any], quant_method: str = READER):
            self.quant_method, self.method, self.stored = quant_method, method, stored

    @register_quantizer(READER)
    class Quantizer(HfQuantizer):
        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            replace(model, self.quantization_config.to_dict())
            self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            # transformers (5.17) checks shapes only where there is no quantizer.
            state, wanted = model.state_dict(), self.shapes
            both = [(name, state[name].shape, wanted[name]) for name in wanted.keys() & state.keys()]
            refuse_shapes(
                model, [one for one in both if one[1] != one[2] and (one[1].numel(), one[2].numel()) != (1, 1)]
            )
            finish(model)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False
