"""What each process runs for test_sequence_training.py: how training uses `sequence-parallel`.

Batches that arrive cut, hybrids of heads and rings, torch's gradient scaler, gradients that are accumulated, wrappers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import sequence_cases
from tests.distributed.sequence_cases import PIPELINE, compare, compiled, decoder, family_of, loss_of
from tests.distributed.sequence_models import VOCABULARY, batch

SHARDED = "sequence-parallel{inputs=sharded}"
HYBRID = "raise,sequence-parallel{kind=hybrid,ring=2}"


class Parts:
    """A model that is given its own part of each tensor [batch, length, …]."""

    def __init__(self, model: nn.Module, pipeline: str = SHARDED):
        self.run = compiled(model, pipeline)

    def __call__(self, **inputs: Any) -> Any:
        rank, world = dist.get_rank(), dist.get_world_size()
        return self.run(**{n: v.chunk(world, 1)[rank].contiguous() for n, v in inputs.items()})


def parts() -> dict[str, Any]:
    """Labels are shifted over the ranks' borders; two lengths, another batch, a rank without a valid label."""
    model, world = decoder(), dist.get_world_size()
    batches = [batch(3, 4 * world, prompt=5), batch(3, 6 * world), batch(1, 6 * world)]
    return compare(model, batches, run=Parts(model))


def parts_around_a_ring() -> dict[str, Any]:
    model, world = decoder(), dist.get_world_size()
    return compare(model, [batch(2, 4 * world), batch(2, 5 * world)],
                   run=Parts(model, "raise,sequence-parallel{inputs=sharded,kind=ring}"))  # fmt: skip


def parts_of_a_library_model(name: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        model, inputs = family_of(name)
        return compare(model, [inputs(2, 4 * dist.get_world_size())], run=Parts(model))

    run.__name__ = f"parts_{name.replace('-', '_')}"
    return run


class Embedded(nn.Module):
    """Attention over embedded tokens whose gradient the caller wants."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.inner(x)[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


def parts_of_embedded_tokens() -> dict[str, Any]:
    """The gradient of a part of an input is that part of the whole input's gradient."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Embedded().double()
    reference, x = copy.deepcopy(model), torch.randn(2, 3 * world, 8).double()
    whole = x.clone().requires_grad_()
    mine = x.chunk(world, 1)[rank].clone().requires_grad_()
    loss, expected = compiled(model, SHARDED)(mine), reference(whole)
    loss.backward()
    expected.backward()
    wanted = [whole.grad.chunk(world, 1)[rank], *(p.grad for p in reference.parameters())]
    found = [mine.grad, *(p.grad for p in model.parameters())]
    off = max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))
    return {"loss": float((loss - expected).detach().abs()), "gradient": off}


def part_of_a_square_mask() -> dict[str, Any]:
    """A block of rows of a mask does not tell which columns it has."""
    part = batch(2, 6)
    compiled(decoder(), SHARDED)(**part, mask=torch.ones(2, 1, 6, 6, dtype=torch.bool).tril())
    return {}


def hybrid() -> dict[str, Any]:
    """Two rings of neighbours that exchange heads; even and odd lengths, ranks without valid labels."""
    return compare(decoder(), [batch(2, 24, prompt=13), batch(2, 23, prompt=13)], HYBRID)


def hybrid_heads_that_do_not_divide() -> dict[str, Any]:
    return compare(decoder(heads=9, keys=3), [batch(1, 22)], HYBRID)


def hybrid_one_key_head() -> dict[str, Any]:
    return compare(decoder(heads=4, keys=1), [batch(1, 21)], HYBRID)


def hybrid_of_parts() -> dict[str, Any]:
    model = decoder()
    return compare(model, [batch(2, 20)], run=Parts(model, "raise,sequence-parallel{kind=hybrid,inputs=sharded}"))


class Plain(nn.Module):
    """Attention without a mask, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 48)

    def forward(self, ids):
        x = self.embedding(ids)
        heads = self.inner(x).unflatten(-1, (2, 24)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(*heads.chunk(3, -1)).square().mean()


def hybrid_without_mask() -> dict[str, Any]:
    ids = torch.randint(0, VOCABULARY, (2, 13))
    return compare(Plain().double(), [{"ids": ids}], "sequence-parallel{kind=hybrid,ring=2}")


def hybrid_that_does_not_fit() -> dict[str, Any]:
    compiled(decoder(), "raise,sequence-parallel{kind=hybrid,ring=3}")(**batch(1, 16))
    return {}


def gradient_scaler() -> dict[str, Any]:
    """Three steps under torch's scaler: the second overflows, is skipped on every rank, and halves the scale."""
    model = decoder()
    reference = copy.deepcopy(model)
    run, scales, loss, expected = compiled(model), [], None, None
    pairs = []
    for m in (model, reference):
        pairs.append((torch.optim.SGD(m.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)))
    for step in range(3):
        inputs = batch(2, 11, prompt=6)
        loss, expected = run(**inputs), reference(**inputs)
        for value, (optimizer, scaler) in zip((loss, expected), pairs):
            scaler.scale(value * (float("inf") if step == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append(pairs[0][1].get_scale())
    assert scales == [1024.0, 512.0, 512.0], scales
    return _apart(model, reference, loss, expected)


def accumulated() -> dict[str, Any]:
    """Gradients of three batches of several lengths, added up before a step."""
    model = decoder()
    reference = copy.deepcopy(model)
    run = compiled(model)
    for inputs in (batch(2, 11, prompt=6), batch(2, 14), batch(2, 9)):
        loss, expected = run(**inputs) / 3, reference(**inputs) / 3
        loss.backward()
        expected.backward()
    return _of_gradients(model, reference)


def accumulated_under_ddp() -> dict[str, Any]:
    model = decoder()
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(compiled(model))
    first, last = batch(2, 11, prompt=6), batch(2, 11)
    with torch._dynamo.config.patch(optimize_ddp=False):
        with wrapped.no_sync():
            wrapped(**first).backward()
        wrapped(**last).backward()
    for inputs in (first, last):
        reference(**inputs).backward()
    return _of_gradients(model, reference)


def accumulated_under_fsdp() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = decoder()
    reference = copy.deepcopy(model)
    model.compile(backend="fuseline", options={"pipeline": PIPELINE})
    fully_shard(model)
    for last in (False, True):
        inputs = batch(2, 11, prompt=6)
        model.set_requires_gradient_sync(last)
        model(**inputs).backward()
        reference(**inputs).backward()
    return _of_gradients(model, reference)


def scaler_under_fsdp() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = decoder()
    reference = copy.deepcopy(model)
    model.compile(backend="fuseline", options={"pipeline": PIPELINE})
    fully_shard(model)
    loss = expected = None
    pairs = [(torch.optim.SGD(m.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0))
             for m in (model, reference)]  # fmt: skip
    for _ in range(2):
        inputs = batch(2, 11, prompt=6)
        loss, expected = model(**inputs), reference(**inputs)
        for value, (optimizer, scaler) in zip((loss, expected), pairs):
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return _apart(model, reference, loss, expected)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _worst(pairs: Any) -> float:
    return max(float((_whole(p) - q).detach().abs().max() / q.detach().abs().max()) for p, q in pairs)


def _apart(model: nn.Module, reference: nn.Module, loss: Any, expected: Any) -> dict[str, Any]:
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return {"loss": float((loss - expected).detach().abs()), "gradient": _worst(pairs)}


def _of_gradients(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return {"loss": 0.0, "gradient": _worst((p.grad, q.grad) for p, q in pairs)}


class Block(nn.Module):
    """Attention and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """Two blocks between an embedding and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids, labels):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        target = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), target)


def fsdp_by_block() -> dict[str, Any]:
    """Each block sharded by itself, then the model: two steps."""
    return _by_block(Blocks().double(), "blocks", [batch(2, 11, prompt=6), batch(2, 11)])


def fsdp_by_block_of_a_library_model() -> dict[str, Any]:
    """Norms and rotary tables are graphs of their own there, without attention."""
    model, inputs = family_of("llama")
    return _by_block(model, "model.layers", [inputs(2, 11), inputs(2, 11)])


def _by_block(model: nn.Module, blocks: str, batches: list[dict[str, Any]]) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    reference, seen = copy.deepcopy(model), []
    model.compile(backend="fuseline", options={"pipeline": PIPELINE, "record": seen.append})
    for block in model.get_submodule(blocks):
        fully_shard(block)
    fully_shard(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
    loss = expected = None
    for inputs in batches:
        loss, expected = loss_of(model(**inputs)), loss_of(reference(**inputs))
        loss.backward()
        expected.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert sum(c.report["sequence-parallel"].matched for c in seen) >= 1, "no attention was cut"
    return _apart(model, reference, loss, expected)


TRAINING: list[Callable[[], dict[str, Any]]] = [
    parts, parts_around_a_ring, parts_of_embedded_tokens, part_of_a_square_mask, gradient_scaler, accumulated,
    accumulated_under_ddp, accumulated_under_fsdp, scaler_under_fsdp, fsdp_by_block,
]  # fmt: skip
HYBRIDS: list[Callable[[], dict[str, Any]]] = [
    hybrid, hybrid_heads_that_do_not_divide, hybrid_one_key_head, hybrid_of_parts, hybrid_without_mask,
    hybrid_that_does_not_fit,
]  # fmt: skip


def grouped_experts_raised_before() -> dict[str, Any]:
    model, inputs = family_of("mixtral")
    reference = copy.deepcopy(model)
    reference.set_experts_implementation("batched_mm")  # PyTorch's grouped products take no float64
    return compare(model, [inputs(2, 12), inputs(1, 13)], "raise,sequence-parallel", reference=reference)


LIBRARY = [parts_of_a_library_model("llama")]
LIBRARY += [fsdp_by_block_of_a_library_model, grouped_experts_raised_before]
CASES = {"training": TRAINING, "hybrids": HYBRIDS, "library": LIBRARY}


def run(rank: int, world: int, folder: str, which: str) -> None:
    """Runs every case of a list; rank 0 writes `results.json`."""
    sequence_cases.run(rank, world, folder, which, CASES)
