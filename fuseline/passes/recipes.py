"""The recipes of this package: a line each, chosen by what they cost on a real model (docs/schemes.md).

A recipe is added here, by its name, its pipeline and what it is for; `benchmarks/schemes.py` measures it.
"""

from __future__ import annotations

from ..compiler.recipes import Recipe, register_recipe

RECIPES = (
    Recipe(
        "w8a8",
        "raise,rotate{r1,r2,r4},quantize{weights=int8,activations=int8:token},fuse",
        "8-bit weights and activations, rotated: no data",
    ),
    Recipe(
        "w4a16",
        "raise,quantize{weights=int4:g64:mse,method=gptq,static,order,damp=0.1},fuse",
        "4-bit weights in groups of 64, by GPTQ: needs data",
    ),
    Recipe(
        "w4a8",
        "raise,quantize{weights=int4:g64:sym:mse,activations=int8:token,method=gptq,static,order,damp=0.1},fuse",
        "4-bit weights by GPTQ, 8-bit activations: needs data",
    ),
    Recipe(
        "w4a4kv4-rotated",
        "raise,rotate{r1,r2,r3,r4},quantize{weights=int4:sym:mse,activations=int4:token,keys=int4:asym,values=int4:asym,"
        "method=gptq,static,order,damp=0.1},fuse",
        "everything in 4 bits, rotated, weights by GPTQ: needs data",
    ),
    Recipe(
        "fp8",
        "raise,quantize{weights=fp8,activations=fp8:token,method=gptq,static,order,damp=0.1},fuse",
        "E4M3 weights by GPTQ, E4M3 activations: needs data",
    ),
    Recipe("mxfp4", "raise,quantize{weights=mxfp4},fuse", "MXFP4 weights: no data"),
    Recipe(
        "ternary-qat",
        "raise,quantize{weights=ternary,method=paretoq},fuse",
        "weights of -1, 0 and 1 by ParetoQ: needs training, prepare_qat and convert",
    ),
)

for recipe in RECIPES:
    register_recipe(recipe)
