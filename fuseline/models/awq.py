"""AWQ checkpoints, as AutoAWQ writes them for its GEMM kernel: `quantization_config` with `quant_method` "awq".

For each linear, 4 bits a code, in groups of g channels:

    qweight  int32 [in, out/8]         word w has outputs 8w + (0, 2, 4, 6, 1, 3, 5, 7), low bits first
    qzeros   int32 [in/g, out/8]       zero points, in the same way
    scales   float16 [in/g, out]       W[o, i] = (code − zero)·scale

Source: AWQ (Lin et al., 2023) and AutoAWQ's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fuseline.models.coded import CodedLinear, Codes, StoredLinear
from fuseline.models.headers import Headers
from fuseline.models.packing import unpack_unsigned
from fuseline.models.qweights import checked, dtype_of, refused, replace_linears

METHOD = "awq"
BITS, PER_WORD = 4, 8
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight outputs is."""


def prepared(config: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """What `replace` needs: the group and the scales' dtype of each linear, from its tensors' shapes.

    Raises:
        UserError: another layout, or a tensor that is missing or of another shape; each with its name.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise refused(METHOD, f"its codes are in the layout '{version}'", "that of 'gemm' is read")
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise refused(METHOD, f"it has codes of {bits} bits", f"those of {BITS} are read")
    names = sorted(n.removesuffix(".qweight") for n in headers if n.endswith(".qweight"))
    return {"linears": {name: _linear(name, headers) for name in names}}


def _linear(name: str, headers: Headers) -> dict[str, Any]:
    found = checked(METHOD, name, headers, ("qweight", "qzeros", "scales"))
    (channels, words), (groups, out) = found["qweight"].shape, found["scales"].shape
    for part, shape in (("qweight", (channels, out // PER_WORD)), ("qzeros", (groups, words))):
        if found[part].shape != shape or channels % groups:
            raise refused(
                METHOD,
                f"'{name}.{part}' is {list(found[part].shape)}, not {list(shape)} as for a weight [{out}, {channels}] "
                f"in {groups} groups",
            )
    group = 0 if groups == 1 else channels // groups
    return {"channels": channels, "group": group, "scales": found["scales"].dtype}


def replace(model: nn.Module, read: dict[str, Any]) -> None:
    """Puts an `AwqLinear` in the place of each linear that the checkpoint has codes of; read: what `prepared` made."""
    replace_linears(METHOD, model, read["linears"], AwqLinear)


class AwqLinear(StoredLinear):
    """The tensors above, under their names."""

    def __init__(self, like: nn.Linear, one: dict[str, Any]):
        super().__init__(like)
        self.group = one["group"]
        out, channels = self.out_features, self.in_features
        groups = channels // (self.group or channels)
        self.hold("qweight", (channels, out // PER_WORD), torch.int32)
        self.hold("qzeros", (groups, out // PER_WORD), torch.int32)
        self.hold("scales", (groups, out), dtype_of(one["scales"]))

    def finished(self, name: str) -> CodedLinear:
        codes, zero = (self._outputs(words.detach()) for words in (self.qweight, self.qzeros))
        made = Codes.integers(BITS, self.group, codes, self.scales.detach().t().contiguous(), zero)
        return CodedLinear(made, self.bias, dtype=self.dtype)

    def _outputs(self, words: torch.Tensor) -> torch.Tensor:
        """int32 [n, out/8] → uint8 [out, n]."""
        places = unpack_unsigned(words, BITS, self.out_features).unflatten(-1, (-1, PER_WORD))
        return places[..., list(PLACE)].flatten(-2).t().contiguous()
