"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: `quantization_config` with `quant_method` "gptq".

For each linear, b bits a code (2, 3, 4 or 8; in "gptq_p" 2 to 8), in groups of g channels:

    qweight  int32 [in·b/32, out]       codes packed along the input, without gaps; in planes in the format "gptq_p"
    qzeros   int32 [in/g, out·b/32]     zero points packed along the output: less one in the format "gptq", as they are
                                        in "gptq_v2" and "gptq_p"
    scales   float16 [in/g, out]        W[o, i] = (code − zero)·scale of the group g_idx[i]
    g_idx    int32 [in]                 i // g, or with desc_act any order

Symmetric weights have the zero point 2^(b−1) and no other, so that what is stored tells the format: files of GPTQModel
that say "gptq" and are "gptq_v2" exist. Of a weight whose channels are out of order, the columns are sorted by their
groups and the input's channels likewise, which changes nothing in the product but the order of its sum.
Source: GPTQ (Frantar et al., 2022) and the code of both packages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fuseline.models.coded import CodedLinear, Codes, StoredLinear, order_of
from fuseline.models.headers import Headers
from fuseline.models.packing import unpack_planes, unpack_unsigned
from fuseline.models.qweights import checked, dtype_of, refused, replace_linears

METHOD = "gptq"
WIDTHS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": (2, 3, 4, 5, 6, 7, 8)}
"""Bits of a code, by the format."""


def prepared(config: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """What `replace` needs: the options, and bits, group and the scales' dtype of each linear, from the headers.

    Raises:
        UserError: another layout, or a tensor that is missing or of another shape; each with its name.
    """
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in WIDTHS or config.get("is_marlin_format"):
        raise refused(METHOD, f"its codes are in the layout '{form}'", f"those of {', '.join(WIDTHS)} are read")
    if config.get("pack_dtype", "int32") != "int32":
        raise refused(METHOD, f"its codes are packed in {config['pack_dtype']}", "those in int32 are read")
    for pattern, changes in (config.get("dynamic") or {}).items():
        others = sorted({"sym", "desc_act", "pack_dtype"} & set(changes or {}))
        if others:
            raise refused(METHOD, f"'{pattern}' has another {others[0]} than the rest (dynamic)")
    ordered = bool(config.get("desc_act")) and not config.get("static_groups")
    linears = {}
    for name in sorted(n.removesuffix(".qweight") for n in headers if n.endswith(".qweight")):
        linears[name] = _linear(name, headers, config, WIDTHS[form], ordered)
    return {
        "zeros_as_they_are": form != "gptq",
        "planes": form == "gptq_p",
        "symmetric": bool(config.get("sym", True)),
        "ordered": ordered,
        "linears": linears,
    }


def _linear(
    name: str, headers: Headers, config: dict[str, Any], widths: tuple[int, ...], ordered: bool
) -> dict[str, Any]:
    needed = ("qweight", "qzeros", "scales") + (("g_idx",) if ordered else ())
    found = checked(METHOD, name, headers, needed)
    (words, out), (groups, _) = found["qweight"].shape, found["scales"].shape
    indices = headers.get(f"{name}.g_idx")
    bits = config.get("bits", 4)
    if indices is not None and indices.shape[0] and words * 32 % indices.shape[0] == 0:
        bits = words * 32 // indices.shape[0]  # GPTQModel's `dynamic` gives some linears others
    if bits not in widths:
        raise refused(METHOD, f"'{name}' has codes of {bits} bits", f"those of {', '.join(map(str, widths))} are read")
    channels = words * 32 // bits
    for part, shape in (
        ("qzeros", (groups, out * bits // 32)),
        ("scales", (groups, out)),
        ("qweight", (channels * bits // 32, out)),
    ):
        if found[part].shape != shape or (part == "scales" and channels % groups):
            raise refused(
                METHOD,
                f"'{name}.{part}' is {list(found[part].shape)}, not {list(shape)} as for a weight [{out}, {channels}] "
                f"of {bits} bits in {groups} groups",
            )
    return {
        "bits": bits,
        "channels": channels,
        "group": 0 if groups == 1 else channels // groups,
        "scales": found["scales"].dtype,
        "indices": indices is not None,
    }


def replace(model: nn.Module, read: dict[str, Any]) -> None:
    """Puts a `GptqLinear` in the place of each linear that the checkpoint has codes of; read: what `prepared` made."""
    replace_linears(METHOD, model, read["linears"], lambda linear, one: GptqLinear(linear, one, read))


class GptqLinear(StoredLinear):
    """The tensors above, under their names."""

    def __init__(self, like: nn.Linear, one: dict[str, Any], read: dict[str, Any]):
        super().__init__(like)
        self.bits, self.group, self.read = one["bits"], one["group"], read
        out, channels = self.out_features, self.in_features
        groups = channels // (self.group or channels)
        self.hold("qweight", (channels * self.bits // 32, out), torch.int32)
        self.hold("qzeros", (groups, out * self.bits // 32), torch.int32)
        self.hold("scales", (groups, out), dtype_of(one["scales"]))
        if one["indices"]:
            self.hold("g_idx", (channels,), torch.int32)

    def finished(self, name: str) -> CodedLinear:
        codes = self._unpacked(self.qweight.detach().t(), self.in_features)
        order = self._order(name)
        if order is not None:
            codes = codes[:, order].contiguous()
        made = Codes.integers(
            self.bits, self.group, codes, self.scales.detach().t().contiguous(), self._zero(name), order
        )
        return CodedLinear(made, self.bias, dtype=self.dtype)

    def _unpacked(self, words: torch.Tensor, count: int) -> torch.Tensor:
        return (unpack_planes if self.read["planes"] else unpack_unsigned)(words, self.bits, count)

    def _zero(self, name: str) -> torch.Tensor | None:
        """The zero points [out, in / g]; None of a symmetric weight, whose are checked."""
        stored = self._unpacked(self.qzeros.detach(), self.out_features).t().contiguous()
        if self.read["symmetric"]:
            middle = 1 << (self.bits - 1)
            if not stored.is_meta and not ((stored == middle).all() or (stored == middle - 1).all()):
                low, high = int(stored.min()), int(stored.max())
                raise refused(
                    METHOD, f"it says sym, and '{name}.qzeros' has zero points from {low} to {high}, not {middle} alone"
                )
            return None
        if self.read["zeros_as_they_are"]:
            return stored
        top = (1 << self.bits) - 1
        if not stored.is_meta and bool((stored == top).any()):
            raise refused(
                METHOD,
                f"'{name}.qzeros' has {int((stored == top).sum())} zero points that are stored as {top}",
                f"the format 'gptq' stores them less one, and readers take this as 0 or as {top + 1}; write 'gptq_v2'",
            )
        return stored + 1

    def _order(self, name: str) -> torch.Tensor | None:
        """The channels sorted by their groups; None where they are in order."""
        if not self.group or not hasattr(self, "g_idx"):
            return None
        groups = self.g_idx.detach().to(torch.int64)
        if groups.is_meta:
            return groups if self.read["ordered"] else None
        if self.read["ordered"]:
            return order_of(groups, self.group, f"{name}.g_idx")
        if not torch.equal(groups, torch.arange(self.in_features, device=groups.device) // self.group):
            raise refused(METHOD, f"it says that channels are in order (desc_act), and '{name}.g_idx' has another")
        return None
