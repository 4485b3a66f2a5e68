"""Checkpoints for other tools: `fuseline.export` writes a rotated or quantized model as a Hugging Face folder.

    unify        the rewritten graph is the model's own with other weights, or it is refused
    parameters   from what is read at each place to one value for each parameter
    rotations    what was folded where, read back from weights' expressions
    transforms   what is left at run time, as compressed-tensors' `transform_config`
    codes        what was quantized how, read back from graphs
    compressed   schemes and codes in the terms of compressed-tensors
    quantization what is quantized, as its `quantization_config`
    planning     the pipeline's passes, and the nearest pipeline where one cannot be exported
    huggingface  the folder: written by transformers, and loaded again to compare

A plain checkpoint holds values of the model's own parameters and nothing else, so all rests on the first of these.
"""

from .export import Exported, check_target, export, export_program

__all__ = ["Exported", "check_target", "export", "export_program"]
