"""The rows of the table: which schemes, at which granularity, by which method; and who else has them."""

from __future__ import annotations

from dataclasses import dataclass

from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.recipes import recipes
from fuseline.compiler.schemes import Scheme
from fuseline.passes import Quantize
from fuseline.passes.calibrated import Method


@dataclass(frozen=True)
class Setting:
    """name: of the row; part: of the table; pipeline: without `raise` and `fuse`."""

    name: str
    part: str
    pipeline: str

    @property
    def step(self) -> Quantize:
        """The pass that rounds; where there are several, the last."""
        return [step for step in Pipeline(self.pipeline).passes if isinstance(step, Quantize)][-1]

    @property
    def rotated(self) -> bool:
        return "rotate" in self.pipeline

    @property
    def weights(self) -> Scheme | None:
        return self.step.schemes()["weights"]

    @property
    def activations(self) -> Scheme | None:
        return self.step.schemes()["activations"]

    @property
    def caches(self) -> bool:
        """Whether keys or values are rounded."""
        return bool(self.step.keys or self.step.values)

    @property
    def method(self) -> Method:
        return self.step.method

    @property
    def plain(self) -> bool:
        """Whether another library could have it: one scheme for all sites, and nothing but weights and activations."""
        step = self.step
        return not (self.rotated or self.caches or step.bits or step.overrides or step.only or step.skip)


ORDER = "method=gptq,static,order"
WEIGHTS = (
    "int8", "int8:asym", "int6", "int5:g64:asym", "int4", "int4:g192", "int4:g64", "int4:g64:sym", "int4:g64:mse",
    "int4:g64:sym:mse", "int3:g64", "int2:g64", "fp8", "fp8:b64", "e5m2", "fp6", "fp4:g64", "fp4:g64:mse",
    "mxfp8", "mxfp6", "mxfp4", "mxfp4:mse", "nvfp4", "ternary:g64", "binary:g64",
)  # fmt: skip
FITTED = {
    "int4:g64 hqq": "weights=int4:g64,method=hqq",
    "int3:g64 hqq": "weights=int3:g64,method=hqq",
    "int4:g64 awq": "weights=int4:g64,method=awq",
    "int4:g64 gptq": "weights=int4:g64,method=gptq",
    "int4:g64:sym gptq order": f"weights=int4:g64:sym,{ORDER}",
    "int3:g64 gptq order": f"weights=int3:g64,{ORDER}",
    "int2:g64 gptq order": f"weights=int2:g64,{ORDER}",
    "fp4:g64 fpq": "weights=fp4:g64,method=fpq",
    "fp4 fpq": "weights=fp4,method=fpq",
}
BOTH = {
    "W8A8": "weights=int8,activations=int8:token",
    "W8A8 smooth": "weights=int8,activations=int8:token,method=smooth",
    "W8A8 static smooth": "weights=int8,activations=int8:static,method=smooth,alpha=0.8",
    "FP8 token": "weights=fp8,activations=fp8:token",
    "FP8 static": "weights=fp8,activations=fp8:static",
    "W4A8": "weights=int4:g64:sym,activations=int8:token",
    "MXFP8": "weights=mxfp8,activations=mxfp8",
    "MXFP4": "weights=mxfp4,activations=mxfp4",
    "NVFP4": "weights=nvfp4,activations=nvfp4",
    "W4A4 e2m1": "weights=fp4,activations=fp4:static",
    "W4A4 fpq": "weights=fp4,activations=fp4:static,method=fpq",
    "W4A8 e2m1, e4m3": "weights=fp4,activations=fp8:static",
    "W4A8 fpq": "weights=fp4,activations=fp8:static,method=fpq",
}
CACHES = {
    "KV8": "keys=int8,values=int8",
    "KV8 fp8": "keys=fp8,values=fp8",
    "KV4": "keys=int4:asym,values=int4:asym",
    "K8V4": "keys=int8,values=int4:asym",
    "KV2": "keys=int2:asym,values=int2:asym",
}
W4A4KV4 = "weights=int4:sym,activations=int4:token,keys=int4:asym,values=int4:asym"
ROTATED = {
    "KV4 rotated": ("rotate{r2,r3}", CACHES["KV4"]),
    "W4A4KV4": ("", W4A4KV4),
    "W4A4KV4 rotated": ("rotate{r1,r2,r3,r4}", W4A4KV4),
}


def settings() -> dict[str, Setting]:
    """All rows by name."""
    rows = [Setting(text, "weights, to nearest", f"quantize{{weights={text}}}") for text in WEIGHTS]
    for part, some in (("weights, fitted", FITTED), ("weights and activations", BOTH), ("keys and values", CACHES)):
        rows += [Setting(name, part, f"quantize{{{options}}}") for name, options in some.items()]
    for name, (rotation, options) in ROTATED.items():
        rows.append(Setting(name, "rotated", ",".join(filter(None, (rotation, f"quantize{{{options}}}")))))
    return {row.name: row for row in [*from_recipes(), *rows]}


def from_recipes() -> list[Setting]:
    """Those recipes that quantize without training."""
    found = []
    for recipe in recipes().values():
        passes = Pipeline(recipe.name).passes
        steps = [str(step) for step in passes if step.name not in ("raise", "fuse")]
        trained = any(step.is_trained for step in passes)
        if not trained and all(text.partition("{")[0] in ("rotate", "quantize") for text in steps):
            found.append(Setting(f"recipe {recipe.name}", "recipes", ",".join(steps)))
    return found
