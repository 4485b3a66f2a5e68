"""On a GPU: the peak that is predicted is that of the allocator, and offloaded values come back whole."""

import pytest
import torch

from fuseline.models.shapes import Decoder, Shape

pytestmark = pytest.mark.gpu
# Of bytes: of what is allocated, a block may be up to 1 MB more than what it was asked for, a tenth of these tensors.
ASKED = "requested_bytes.all"
SHAPE = Shape(512, 1376, 8, 8, 4, 1024)


def step(pipeline, length=4096, target="eager"):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder(SHAPE, loss=False).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 1024, (1, length), device="cuda")
    record = []
    options = {"pipeline": pipeline, "target": target, "record": record.append}
    run = torch.compile(model, backend="fuseline", options=options, dynamic=False)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()[f"{ASKED}.current"]
        run(ids).float().square().mean().backward()
        torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()[f"{ASKED}.peak"] - before
    said = record[-1].joint.module.meta["checkpoint"] if record[-1].joint is not None else None
    return [p.grad.clone() for p in model.parameters()], peak, said


@pytest.mark.parametrize("policy", ["none", "long-context", "full"])
def test_the_predicted_peak_is_the_allocators(policy):
    _, peak, said = step(f"raise{{allow_empty}},checkpoint{{policy={policy}}}")
    assert abs(said["peak"] / peak - 1) < 0.08, (said, peak)


@pytest.fixture
def deterministic(monkeypatch):
    """The backwards of attention add in no fixed order unless they must."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch asks for
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_offloaded_values_come_back_whole():
    plain, _, _ = step("raise{allow_empty},checkpoint{policy=none}")
    moved, _, said = step("raise{allow_empty},checkpoint{policy=long-context,offload=cpu}")
    assert said["host"] > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, moved))
