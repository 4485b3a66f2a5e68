"""Quantization-aware training: `prepare_qat`, any training of PyTorch's, `convert`; and what goes with it."""

from ..runtime import fake_quantize as _kernels  # registers them for CUDA
from .confidence import ConfidenceAnnealing
from .convert import convert
from .data import generate
from .losses import distillation_loss
from .module import QuantizationAware
from .parq import PARQ
from .prepare import prepare_qat
from .winq import WinQ

__all__ = [
    "PARQ", "ConfidenceAnnealing", "QuantizationAware", "WinQ", "convert", "distillation_loss", "generate",
    "prepare_qat",
]  # fmt: skip
