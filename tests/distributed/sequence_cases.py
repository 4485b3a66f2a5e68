"""What each process runs for test_sequence_parallel.py: a model cut among the ranks, and the same model whole.

A case returns what its test reads, as JSON; what it raises comes back as text. All ranks run the same cases.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.sequence_models import VOCABULARY, Decoder, batch, families

PIPELINE = "sequence-parallel"


def compiled(model: nn.Module, pipeline: str = PIPELINE, record: Callable[..., Any] | None = None) -> Any:
    options: dict[str, Any] = {"pipeline": pipeline}
    if record is not None:
        options["record"] = record
    return torch.compile(model, backend="fuseline", options=options)


def loss_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.loss


def compare(
    model: nn.Module, batches: list[dict[str, Any]], pipeline: str = PIPELINE, run: Any = None, reference: Any = None
) -> dict[str, Any]:
    """Errors of the loss and of the worst parameter's gradient against one process, over several calls.

    A gradient's error is max|Δ| / max|reference|, the latter at least 1e-6 of the model's largest: some gradients are
    zero but for rounding (that of a key's bias).
    """
    reference = copy.deepcopy(model) if reference is None else reference
    run = compiled(model, pipeline) if run is None else run
    worst = {"loss": 0.0, "gradient": 0.0, "where": ""}
    for inputs in batches:
        model.zero_grad()
        reference.zero_grad()
        loss, expected = loss_of(run(**inputs)), loss_of(reference(**inputs))
        loss.backward()
        expected.backward()
        worst["loss"] = max(worst["loss"], float((loss - expected).detach().abs() / expected.detach().abs()))
        wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        largest = max(float(g.abs().max()) for g in wanted.values())
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if found.keys() != wanted.keys():
            return {"raised": f"gradients of {sorted(found.keys() ^ wanted.keys())} are on one side only"}
        for name, grad in wanted.items():
            error = float((found[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-6 * largest)
            if not error <= worst["gradient"]:  # NaN counts as the worst
                worst.update(gradient=error, where=name)
    return worst


def decoder(**settings: Any) -> nn.Module:
    return Decoder(**settings).double()


def grouped_queries() -> dict[str, Any]:
    """An even length, an odd one and a longer one; the first ranks hold no valid label; the batch changes too."""
    return compare(decoder(), [batch(3, 12, prompt=7), batch(3, 13, prompt=8), batch(3, 18)])


def one_length() -> dict[str, Any]:
    return compare(decoder(), [batch(3, 13, prompt=8)])


class Attends(nn.Module):
    """Little besides attention, so that a graph of symbolic lengths is compiled in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, ids, labels):
        x = self.embedding(ids).unflatten(-1, (4, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())


def other_lengths() -> dict[str, Any]:
    """As `grouped_queries`, of a smaller model."""
    return compare(Attends().double(), [batch(3, 12, prompt=7), batch(3, 15, prompt=8), batch(3, 19)])


def one_sequence() -> dict[str, Any]:
    return compare(decoder(), [batch(1, 11)])


def one_key_head() -> dict[str, Any]:
    return compare(decoder(keys=1), [batch(2, 9)])


def many_key_heads() -> dict[str, Any]:
    return compare(decoder(heads=4, keys=4), [batch(1, 9)])


def heads_that_do_not_divide() -> dict[str, Any]:
    return compare(decoder(heads=9, keys=3), [batch(1, 10)])


def key_heads_across_ranks() -> dict[str, Any]:
    return compare(decoder(heads=10, keys=5), [batch(1, 10)])


def attention_written_out() -> dict[str, Any]:
    return compare(decoder(written_out=True), [batch(2, 9)])


def written_out_odd_heads() -> dict[str, Any]:
    return compare(decoder(heads=5, keys=5, written_out=True), [batch(2, 8)])


def sliding_window() -> dict[str, Any]:
    return compare(decoder(window=4), [batch(2, 11)])


def packed_documents() -> dict[str, Any]:
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    i = torch.arange(11)
    mask = (documents[:, None] == documents[None, :]) & (i[None, :] <= i[:, None])
    return compare(decoder(), [{**batch(2, 11), "mask": mask}])


def masks_by_head() -> dict[str, Any]:
    i = torch.arange(10)
    distance = (i[None, :] - i[:, None]).double()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).double()[None, :, None, None]
    mask = (distance * slopes).masked_fill(distance > 0, float("-inf"))
    return compare(decoder(), [{**batch(2, 10), "mask": mask}])


def tied_embeddings() -> dict[str, Any]:
    return compare(decoder(tied=True), [batch(2, 10)])


def keys_are_values() -> dict[str, Any]:
    return compare(decoder(shared=True), [batch(2, 10)])


def weighted_loss() -> dict[str, Any]:
    weight = torch.rand(VOCABULARY).double() + 0.1
    return compare(decoder(smoothing=0.1), [{**batch(2, 11, prompt=7), "weight": weight}])


def raised_first() -> dict[str, Any]:
    return compare(decoder(), [batch(2, 11)], "raise,sequence-parallel")


def fused_loss() -> dict[str, Any]:
    """Logits that are never stored: ranks without valid labels, tied embeddings, smoothing, an odd length."""
    pipeline = "raise,fuse-loss,sequence-parallel"
    batches = [batch(3, 12, prompt=7), batch(2, 11)]
    return compare(decoder(vocabulary=4096, tied=True, smoothing=0.1), batches, pipeline)


def fused_loss_of_one_length() -> dict[str, Any]:
    pipeline = "raise,fuse-loss,sequence-parallel"
    return compare(decoder(vocabulary=4096, tied=True, smoothing=0.1), [batch(3, 13, prompt=7)], pipeline)


def tiled() -> dict[str, Any]:
    """Each rank's own positions, some at a time."""
    pipeline = "raise,sequence-parallel,tile{tiles=2},checkpoint{policy=full}"
    return compare(decoder(heads=2, keys=1), [batch(3, 13, prompt=8)], pipeline)


class Outside(nn.Module):
    """A model whose loss its caller computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, ids, labels):
        logits = self.inner(ids)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


RING = "raise,sequence-parallel{kind=ring}"


def ring_causal() -> dict[str, Any]:
    """Even and odd numbers of positions, grouped queries, ranks without valid labels."""
    return compare(decoder(), [batch(2, 24, prompt=13), batch(2, 23, prompt=13)], RING)


def ring_one_head() -> dict[str, Any]:
    return compare(decoder(heads=1, keys=1), [batch(1, 19)], RING)


def ring_without_mask() -> dict[str, Any]:
    model = Scan().double()
    model.forward = model.plain  # type: ignore[method-assign]
    return compare(model, [{"ids": torch.randint(0, VOCABULARY, (2, 13))}], "sequence-parallel{kind=ring}")


def ring_with_a_window() -> dict[str, Any]:
    compiled(decoder(window=4), RING)(**batch(1, 12))
    return {}


def loss_outside() -> dict[str, Any]:
    """Logits come back whole, and the gradient of a loss that every caller computes reaches the parameters once."""
    model = Outside().double()
    reference = copy.deepcopy(model)
    model.inner.compile(backend="fuseline", options={"pipeline": PIPELINE})
    inputs = batch(2, 11)
    model(**inputs).backward()
    reference(**inputs).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    wanted = [(p.grad, q.grad) for p, q in pairs if q.grad is not None]
    return {"loss": 0.0, "gradient": max(float((p - q).abs().max() / q.abs().max()) for p, q in wanted)}


def sharded_logits() -> dict[str, Any]:
    model = decoder()
    logits = compiled(model, "sequence-parallel{outputs=sharded}")(batch(2, 12)["ids"])
    return {"shape": list(logits.shape)}


def without_gradients() -> dict[str, Any]:
    model, inputs = decoder(), batch(2, 11)
    with torch.no_grad():
        found, expected = compiled(model)(inputs["ids"]), model(inputs["ids"])
    return {"loss": float((found - expected).abs().max() / expected.abs().max()), "gradient": 0.0}


def under_ddp() -> dict[str, Any]:
    """DistributedDataParallel averages what the pass has scaled for it."""
    model = decoder()
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(compiled(model))
    inputs = batch(2, 11, prompt=6)
    with torch._dynamo.config.patch(optimize_ddp=False):
        wrapped(**inputs).backward()
    reference(**inputs).backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return {"loss": 0.0, "gradient": max(float((p.grad - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)}


def under_fsdp() -> dict[str, Any]:
    """fully_shard (FSDP2) reduces and scatters what the pass has scaled for it; two steps of training."""
    from torch.distributed.fsdp import fully_shard

    model = decoder()
    reference = copy.deepcopy(model)
    model.compile(backend="fuseline", options={"pipeline": PIPELINE})
    fully_shard(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
    for _ in range(2):
        inputs = batch(2, 11, prompt=6)
        loss, expected = model(**inputs), reference(**inputs)
        loss.backward()
        expected.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    whole = [p.full_tensor() for p in model.parameters()]
    pairs = zip(whole, reference.parameters(), strict=True)
    return {
        "loss": float((loss - expected).detach().abs()),
        "gradient": max(float((p - q).detach().abs().max() / q.abs().max()) for p, q in pairs),
    }


class Scan(nn.Module):
    """A model with an op along the sequence that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)

    def forward(self, ids):
        x = self.embedding(ids)[:, None]
        y = nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]
        return torch.sort(y, dim=1).values.sum()

    def plain(self, ids):
        x = self.embedding(ids)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x * x).square().mean()


def unknown_op() -> dict[str, Any]:
    compiled(Scan().double())(torch.randint(0, VOCABULARY, (2, 12)))
    return {}


def unknown_op_gathered() -> dict[str, Any]:
    model, ids = Scan().double(), torch.randint(0, VOCABULARY, (2, 11))
    return compare(model, [{"ids": ids}], "sequence-parallel{gather=sort}")


class Broken(nn.Module):
    """A graph break between the projections and the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        q = self.q(x)[:, None]
        torch._dynamo.graph_break()
        return nn.functional.scaled_dot_product_attention(q, q, q).sum()


def break_inside_attention() -> dict[str, Any]:
    compiled(Broken().double())(torch.randn(2, 12, 8).double())
    return {}


def too_short() -> dict[str, Any]:
    compiled(decoder())(**batch(1, dist.get_world_size() - 1))
    return {}


def degree_that_does_not_fit() -> dict[str, Any]:
    compiled(decoder(), f"sequence-parallel{{degree={dist.get_world_size() + 1}}}")(**batch(1, 12))
    return {}


def different_lengths() -> dict[str, Any]:
    compiled(decoder())(**batch(1, 12 + dist.get_rank()))
    return {}


def unknown_mesh() -> dict[str, Any]:
    compiled(decoder(), "sequence-parallel{mesh=nowhere}")(**batch(1, 12))
    return {}


def named_mesh() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "sequence"))
    assert mesh.size(0) == 1
    return compare(decoder(), [batch(1, 11)], "sequence-parallel{mesh=sequence}")


def family_of(name: str) -> tuple[nn.Module, Callable[[int, int], dict[str, Any]]]:
    make, inputs = next((m, i) for n, m, i in families() if n == name)
    return make().double().train(), inputs


def family(name: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        model, inputs = family_of(name)
        reference = copy.deepcopy(model)
        if name == "mixtral":  # PyTorch's grouped products take no float64
            reference.set_experts_implementation("batched_mm")
        return compare(model, [inputs(3, 12), inputs(1, 13)] if name != "vit" else [inputs(3, 0)], reference=reference)

    run.__name__ = name
    return run


SHORT: list[Callable[[], dict[str, Any]]] = [
    one_length, other_lengths, heads_that_do_not_divide, fused_loss_of_one_length, under_ddp,
    unknown_op, break_inside_attention, too_short, degree_that_does_not_fit, unknown_mesh, different_lengths,
]  # fmt: skip
REFUSED = [unknown_op, break_inside_attention, too_short, degree_that_does_not_fit, unknown_mesh, different_lengths]
LONG: list[Callable[[], dict[str, Any]]] = [
    grouped_queries, one_sequence, one_key_head, many_key_heads, heads_that_do_not_divide, key_heads_across_ranks,
    attention_written_out, written_out_odd_heads, sliding_window, packed_documents, masks_by_head, tied_embeddings,
    keys_are_values, weighted_loss, raised_first, fused_loss, tiled, ring_causal, ring_one_head, ring_without_mask,
    ring_with_a_window, loss_outside, sharded_logits, without_gradients, under_ddp,
    under_fsdp, unknown_op_gathered, named_mesh,
]  # fmt: skip
FAMILIES = ["llama", "llama-padded", "llama-packed", "llama-tied", "qwen3", "mistral", "gemma2", "mixtral",
            "mixtral-batched", "gpt2", "bert", "vit"]  # fmt: skip
CASES: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "short": SHORT,
    "long": LONG,
    "families": [family(name) for name in FAMILIES],
}


def run(rank: int, world: int, folder: str, which: str, cases: dict[str, Any] = CASES) -> None:
    """Runs every case of a list; rank 0 writes `results.json`. `which`: a list's name, or names of cases."""
    torch.set_num_threads(1)
    logging.getLogger("fuseline").setLevel(logging.ERROR)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    chosen = [c for group in cases.values() for c in group if c.__name__ in which.split(",")] or cases[which]
    results: dict[str, Any] = {}
    for case in chosen:
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            results[case.__name__] = case()
        except Exception as problem:
            results[case.__name__] = {"raised": str(problem)}
        if rank == 0:
            (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
