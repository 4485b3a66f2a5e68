"""Tiny random models of the families that `raise` must handle, and what it must find in each, from the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from fuseline.compiler import capture as captures
from fuseline.compiler.observe.numerics import error, floats
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.report import PassReport

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BERT = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and how many norms one layer has."""

    config: str
    options: dict[str, Any]
    norm: str = "RMSNorm"
    norms_per_layer: int = 2
    gate: str | None = "SwiGLU"
    rotary: bool = True
    bidirectional: bool = False

    def build(self, attention: str = "sdpa", **changes: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **changes})
        kind = transformers.AutoModel if self.bidirectional else transformers.AutoModelForCausalLM
        return kind.from_config(config, attn_implementation=attention).eval()

    def rules(self, config: PreTrainedConfig) -> dict[str, int]:
        """Rule → how often it must apply."""
        layers = config.num_hidden_layers
        grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
        counts = {
            self.norm: self.norms_per_layer * layers + 1,
            "RotaryPair": layers if self.rotary else 0,
            self.gate or "": layers if self.gate else 0,
            "Attention": layers,
            "RepeatedHeads": layers if grouped else 0,
        }
        return {rule: count for rule, count in counts.items() if count}

    def kinds(self, config: PreTrainedConfig) -> list[tuple[str, int]]:
        """Kind and window of each layer's attention."""
        if self.bidirectional:
            return [("full", 0)] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:
            types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        return [("sliding", window) if t == "sliding_attention" else ("causal", 0) for t in types]


FAMILIES = {
    "llama": Family("LlamaConfig", LLAMA),
    "qwen2": Family("Qwen2Config", LLAMA),
    "qwen3": Family("Qwen3Config", {**LLAMA, "head_dim": 16}, norms_per_layer=4),
    "mistral": Family("MistralConfig", {**LLAMA, "sliding_window": 5}),
    "gemma2": Family(
        "Gemma2Config",
        {**LLAMA, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
        norms_per_layer=4,
        gate="GEGLU",
    ),
    "phi3": Family("Phi3Config", LLAMA),
    "gpt2": Family("GPT2Config", GPT2, norm="LayerNorm", gate=None, rotary=False),
    "bert": Family("BertConfig", BERT, norm="LayerNorm", gate=None, rotary=False, bidirectional=True),
}


def tokens(batch: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(length: int = 8) -> torch.Tensor:
    """Two rows, the first padded on the left by two."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :2] = 0
    return mask


def attentions(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is torch.ops.fuseline.attention.default]


def described(program: Program) -> list[tuple[str, int]]:
    """Kind and window of each attention."""
    return [(n.args[5], n.args[7]) for n in attentions(program)]


@dataclass
class Compiled:
    """One graph that reached the backend, and the largest error of its rewritten form over all calls."""

    before: Program
    after: Program
    report: PassReport
    error: float = 0.0


def through_dynamo(model: torch.nn.Module, use: Callable[[torch.nn.Module], Any]) -> list[Compiled]:
    """Compiles `model` with a backend that raises each graph, runs both forms at each call and compares them."""
    graphs: list[Compiled] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        before = captures.from_dynamo(module, inputs)
        after, report = Pipeline("raise").run(before, verification="full")
        compiled = Compiled(before, after, report["raise"])
        graphs.append(compiled)

        def call(*flat: Any) -> Any:
            copies = [f.clone() if isinstance(f, torch.Tensor) and not f.requires_grad else f for f in flat]
            expected = floats(before.run(copies))
            actual = after.run(flat)
            worst = [error(a, e) for a, e in zip(floats(actual), expected, strict=True)]
            compiled.error = max([compiled.error, *worst])
            return actual

        return call

    torch.compiler.reset()
    model.compile(backend=backend)
    use(model)
    torch.compiler.reset()
    return graphs
