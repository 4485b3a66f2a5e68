"""The rows of `kv.py --part quality`: KIVI, MiniKV and TaDA on one model, at the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import Run

from fuseline.cache_bits import search_bits
from fuseline.compiler.cached import CacheScheme
from fuseline.models import metrics, text
from fuseline.models.spec import load

from .bytes_model import train
from .quality import Attention, Setting, heads_of, seeing, size

BITS = (2, 4, 8)
BAR = 0.30  # of bfloat16's bytes, for TaDA on a multi-head model


def quality(run: Run) -> None:
    for name in run.options.models:
        one = Model(name, run)
        for label, setting in one.settings():
            run.measure(f"{name} {label}", lambda row, s=setting, one=one: one.fill(row, s))  # type: ignore[misc]
        for budget in one.budgets:
            for label, keys, block in (("tada", "token", 64), ("tada keys by channel", "channel:g128", 128)):
                run.measure(
                    f"{name} {label} {budget:g}",
                    lambda row, b=budget, k=keys, n=block, one=one: one.searched(row, b, k, n),  # type: ignore[misc]
                )


class Model:
    """A model, its held-out and calibration windows, and its losses with a cache of bfloat16."""

    def __init__(self, name: str, run: Run):
        self.options, device = run.options, run.device
        self.notes: dict[str, Any] = {}
        if name == "multi-head":
            with torch.enable_grad():
                self.model, self.notes = train(device, self.options.train, self.options.length)
            encode = lambda source: list(source.encode())
        else:
            loaded = load(name)
            self.model, encode = loaded.model.eval().to(device), loaded.encode
        cut = lambda source, count: [ids.to(device) for ids in text.windows(source, encode, self.options.length, count)]
        self.held_out = cut(text.evaluation_text(), self.options.windows)
        self.calibration = cut(text.calibration_text(), 1)
        self.layers, self.heads, self.head = heads_of(self.model.config)
        self.multi_head = self.heads == self.model.config.num_attention_heads
        self.budgets = (BAR, 0.35) if self.multi_head else (0.55, 0.62)  # the mean of three heads costs a third
        self._plain: dict[int, list[torch.Tensor]] = {}

    def settings(self) -> Iterator[tuple[str, Setting]]:
        """KIVI's with the authors' groups and with longer ones, MiniKV's, and 8 bits; one window and block for all."""
        yield "bf16", Setting()
        for bits, group in ((4, 32), (4, 64), (4, 128), (2, 16), (2, 32), (2, 64)):
            of_keys, of_values = f"int{bits}:channel:g{group}", f"int{bits}:token:g{min(group, self.head)}"
            label = f"minikv g{group}" if (bits, group) == (2, 16) else f"kivi{bits} g{group}"
            yield label, Setting.same(self.layers, of_keys, of_values, block=max(64, group))
        yield "kivi K4 V2 g32", Setting.same(self.layers, "int4:channel:g32", "int2:token:g32")
        yield "int4 by token", Setting.same(self.layers, "int4:token", "int4:token")
        yield "tada4", Setting.same(self.layers, "int4:token", "int4:token", centred=True)
        if self.head == 128:
            of_keys = "int4:channel:g128"
            yield "tada4 keys by channel", Setting.same(self.layers, of_keys, "int4:token", block=128, centred=True)
        yield "int8", Setting.same(self.layers, "int8:channel:g64", "int8:token")
        yield "fp8", Setting.same(self.layers, "fp8:token", "fp8:token")

    def fill(self, row: dict[str, Any], setting: Setting) -> None:
        """Bytes, loss and divergence on the held-out text."""
        began = time.monotonic()
        row |= self.notes | {
            "layers": self.layers,
            "heads": self.heads,
            "head": self.head,
            "length": self.options.length,
        }
        row |= {"window": setting.window, "block": setting.block}
        row["ratio"] = setting.bytes_per_token(self.heads, self.head)
        row["held"] = setting.held(self.options.length, self.heads, self.head)
        found = self.compared(setting, self.held_out)
        row["loss"] = math.log(found.perplexity_after)
        row["cost"] = row["loss"] - math.log(found.perplexity_before)
        row |= {"kl": found.kl, "top1": found.top1, "tokens": found.tokens, "seconds": time.monotonic() - began}

    def compared(self, setting: Setting, windows: list[torch.Tensor]) -> metrics.Metrics:
        """The model with this cache beside the model with a cache of bfloat16."""
        run = lambda ids: self.model(ids, use_cache=False).logits
        if id(windows) not in self._plain:
            with seeing(self.model, Attention()):
                self._plain[id(windows)] = [run(ids) for ids in windows]
        plain = iter(self._plain[id(windows)])
        with seeing(self.model, Attention(setting)):
            return metrics.compare(lambda _: next(plain), run, windows)

    def searched(self, row: dict[str, Any], budget: float, of_keys: str, block: int) -> None:
        """TaDA: bits of each layer's keys and values under a budget, measured on calibration text."""
        began = time.monotonic()
        tried = {bits: (f"int{bits}:{of_keys}", f"int{bits}:token") for bits in BITS}
        probe = Attention(Setting(block=block, centred=True), tried)
        with seeing(self.model, probe):
            self.model(self.calibration[0], use_cache=False)
        errors = [probe.errors[i] for i in range(2 * self.layers)]
        shape = (self.heads, self.head, block, False, True)
        one = {b: max(size(CacheScheme.parse(text), *shape) for text in tried[b]) for b in BITS}

        def setting(bits: tuple[int, ...]) -> Setting:
            keys = tuple(tried[b][0] for b in bits[0::2])
            return Setting(keys, tuple(tried[b][1] for b in bits[1::2]), block=block, centred=True)

        loss = lambda bits: self.compared(setting(bits), self.calibration).kl
        chosen = search_bits(errors, one.__getitem__, budget * 2 * self.layers, loss, self.options.trials)
        row["bits"] = list(chosen)
        row["search_s"] = time.monotonic() - began
        self.fill(row, setting(chosen))
