"""Where models, text and metrics come from; nothing in the compiler knows of it."""

from fuseline.models.loaded import LoadedModel, logits_of
from fuseline.models.spec import load, parse_dtype

__all__ = ["LoadedModel", "load", "logits_of", "parse_dtype"]
