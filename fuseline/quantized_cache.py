"""`QuantizedCache`: a cache for transformers' models that holds keys and values as codes.

A model's own cache belongs to its caller, who may read it between calls, so no pass may change what lies in it. This
cache holds codes from the start. In eager its `update` gives back the keys and values that the codes stand for; in a
compiled graph `fuse` has attention read the codes themselves (`fuseline::cache_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .compiler.cached import BLOCKS, CacheScheme, Side
from .compiler.errors import UserError
from .compiler.ops import cache_read, cache_write

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise UserError(
        "QuantizedCache is a cache of transformers, which is not installed", remedy="pip install transformers"
    ) from error

PARTS = ("codes", "scale", "low", "mean", "recent")


class QuantizedLayer(CacheLayerMixin):
    """One layer's keys and values: two `compiler.cached.Side`s of `capacity` tokens, and how many there are."""

    is_compileable = True
    is_sliding = False

    def __init__(self, capacity: int, keys: str, values: str, window: int, block: int, centred: bool):
        super().__init__()
        self.max_cache_len = capacity
        self.schemes = tuple(CacheScheme.parse(text) for text in (keys, values))
        self.window, self.block, self.centred = window, block, centred
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.sides: tuple[list[torch.Tensor | None], ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates for [B, H, S, D], of these heads, dtype and device.

        Raises:
            UserError: the scheme does not fit the heads.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sides = tuple(self._empty(x, self.schemes[i], bool(i)) for i, x in enumerate((key_states, value_states)))
        self.keys, self.values = (side[0] for side in self.sides)  # that something is there
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _empty(self, x: torch.Tensor, scheme: CacheScheme, values: bool) -> list[torch.Tensor | None]:
        batch, heads, _, head = x.shape
        reason = scheme.refuse(head, self.block, values)
        if reason:
            raise UserError(f"{'values' if values else 'keys'}={scheme} does not fit this model: {reason}")
        zeros = lambda *shape, dtype=x.dtype: torch.zeros(batch, *shape, dtype=dtype, device=x.device)
        shapes = scheme.shapes(heads, self.max_cache_len, head, self.block, values)
        parts = {
            name: zeros(*shape, dtype=torch.uint8 if name == "codes" else x.dtype) for name, shape in shapes.items()
        }
        parts["mean"] = zeros(1, self.max_cache_len, head) if self.centred else None
        parts["recent"] = zeros(heads, self.window + self.block, head)
        return [parts.get(name) for name in PARTS]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [B, H, S, D] and gives all keys and values, [B, H, capacity, D], zeros where there are none yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.cumulative_length.clone()
        after = before + key_states.shape[-2]
        self.cumulative_length.copy_(after)
        states = (key_states, value_states)
        for i in range(2):
            cache_write(*self.sides[i], states[i], before, str(self.schemes[i]), self.block, bool(i))
        keys, values = (cache_read(*self.sides[i], after, str(self.schemes[i]), self.block, bool(i)) for i in range(2))
        return keys, values

    def tensors(self) -> list[torch.Tensor]:
        """All that the layer holds of keys and values."""
        return [tensor for side in self.sides for tensor in side if tensor is not None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        for tensor in (*self.tensors(), self.cumulative_length):
            tensor.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def offload(self) -> None:
        raise UserError("a QuantizedCache stays on its device", remedy="DynamicCache(offloading=True)")

    def prefetch(self) -> None:
        self.offload()


class QuantizedCache(Cache):
    """Keys and values as codes, behind a window of full precision, for `generate(past_key_values=…)` and plain calls.

    Args:
        config: the model's; every layer must attend to all tokens.
        max_cache_len: tokens it can hold, rounded up to whole blocks.
        keys, values: schemes as in `int4:channel:g64` and `int4:token:g64` (`compiler.cached.CacheScheme`), or one for
            each layer.
        window: newest tokens that stay as they came, at least.
        block: tokens that are coded together, 32, 64 or 128; the ring of full precision holds window + block.
        centred: take the mean over heads from each token before it is coded (TaDA), and keep it beside the codes.

    Raises:
        UserError: a scheme, a number of layers or a kind of layer that it does not take.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        keys: str | Sequence[str] = "int4:channel:g64",
        values: str | Sequence[str] = "int4:token:g64",
        window: int = 64,
        block: int = 128,
        centred: bool = False,
    ):
        config = config.get_text_config(decoder=True)
        count = config.num_hidden_layers
        others = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
        if others:
            raise UserError(
                f"the model has layers of {', '.join(sorted(others))}: a QuantizedCache is for full attention",
                remedy="generate(cache_implementation='static')",
            )
        if block not in BLOCKS:
            raise UserError(f"block={block}: there are {', '.join(map(str, BLOCKS))}")
        chosen = [[scheme] * count if isinstance(scheme, str) else list(scheme) for scheme in (keys, values)]
        for name, schemes in zip(("keys", "values"), chosen):
            if len(schemes) != count:
                raise UserError(f"{name} has {len(schemes)} schemes, the model {count} layers")
            for scheme in schemes:
                CacheScheme.parse(scheme)
        capacity = -(-max_cache_len // block) * block
        layers = [QuantizedLayer(capacity, k, v, window, block, centred) for k, v in zip(*chosen)]
        super().__init__(layers=layers)

    @classmethod
    def kivi(cls, config: Any, max_cache_len: int, bits: int = 4, group: int = 32) -> QuantizedCache:
        """KIVI's setting (Liu et al., 2024): keys by channel, values by token, groups of 32, a ring of 128 tokens."""
        return cls(config, max_cache_len, f"int{bits}:channel:g{group}", f"int{bits}:token:g{group}", 0, 128)

    @classmethod
    def minikv(cls, config: Any, max_cache_len: int) -> QuantizedCache:
        """MiniKV's quantizer (Sharma et al., 2025): 2 bits in groups of 16; what it evicts is not part of it."""
        return cls(config, max_cache_len, "int2:channel:g16", "int2:token:g16", 0, 128)

    @classmethod
    def tada(
        cls, config: Any, max_cache_len: int, keys: Sequence[str] | str, values: Sequence[str] | str, window: int = 64
    ) -> QuantizedCache:
        """TaDA's (Joshi et al., 2025): deviations from the mean over heads, bits by layer: `cache_bits.search_bits`."""
        return cls(config, max_cache_len, keys, values, window, centred=True)

    def nbytes(self) -> int:
        """Bytes of all that is allocated for keys and values."""
        held = (tensor for layer in self.layers for tensor in layer.tensors())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def side(layer: QuantizedLayer, values: bool) -> Side:
    """The keys or the values of a layer, for who wants to look at them."""
    made: tuple[Any, ...] = (*layer.sides[values], layer.schemes[values], layer.block, values)
    return Side(*made)
