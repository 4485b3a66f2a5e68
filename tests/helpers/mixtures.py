"""Tiny mixtures of transformers' families, and modules of plain PyTorch with experts of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {
        "n_routed_experts": 8, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
        **LATENT,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4, "layer_types": ["full_attention"]},
    "GraniteMoe": {"num_local_experts": 4},
}  # fmt: skip


def build(family: str, implementation: str | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model in evaluation, its weights large enough that experts matter."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **options})
    config.use_cache = False
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() > 1 or "correction" in name:
            nn.init.normal_(tensor, std=0.2)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


class Expert(nn.Module):
    """joint: gate and up in one linear."""

    def __init__(self, hidden: int, inner: int, joint: bool, bias: bool):
        super().__init__()
        self.joint = joint
        self.gate = nn.Linear(hidden, 2 * inner if joint else inner, bias)
        self.up = None if joint else nn.Linear(hidden, inner, bias)
        self.down = nn.Linear(inner, hidden, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.up is None else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Separate(nn.Module):
    """A mixture over a list of modules, written in one of several forms, beside a shared expert."""

    def __init__(self, form: str, joint: bool = False, bias: bool = False, shared: bool = False, experts: int = 3):
        super().__init__()
        self.form, self.router = form, nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(Expert(8, 6, joint, bias) for _ in range(experts))
        self.shared = Expert(8, 6, joint, bias) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odds = F.softmax(self.router(x), -1)
        weights, indices = odds.topk(2, -1)
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        table = torch.zeros_like(odds).scatter(-1, indices, weights)
        for e, expert in enumerate(self.experts):
            if self.form == "gathered":
                token, place = torch.where(indices == e)
                out = out.index_add(0, token, expert(x[token]) * weights[token, place, None])
            elif self.form == "scattered":
                out = out + table[..., e].unsqueeze(-1) * expert(x)
            elif self.form == "where":
                out = out + torch.where(indices == e, weights, 0).sum(-1, keepdim=True) * expert(x)
            else:
                out = out + expert(x) * (weights * (indices == e)).sum(-1, keepdim=True)
        return out
