"""The launcher on a GPU: right results whatever the arguments, the cache in fresh processes, what a launch costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseline
from fuseline.codegen.lower import lower
from fuseline.codegen.module_file import load_module
from fuseline.runtime.cache import Cache
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.kernels import KernelLauncher, wrap
from tests.helpers.models import Mlp, error
from tests.runtime.launches import OPTIONS, Compiling, module

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
N = 100  # elements that ADD reads and writes for each row


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(Cache(tmp_path / "cache"))


@pytest.fixture
def add(tmp_path: Path, store: KernelStore) -> KernelLauncher:
    launcher = wrap(module(tmp_path / "ours"), store).add
    assert isinstance(launcher, KernelLauncher), "this Triton is one that the launcher knows"
    return launcher


def launch(
    add: Any, x: torch.Tensor, stride: int, rows: int, offset: int = 0, dtype: torch.dtype | None = None
) -> None:
    """y[k] = x[k·stride] + 1, and nothing else of y is written."""
    count = N * rows
    whole = torch.full((count + 2 * offset + 8,), -7.0, device=x.device).to(dtype or x.dtype)
    y = whole[offset:]
    add[(-(-count // 128),)](x, y, stride, rows, **OPTIONS)
    expected = (x[: (count - 1) * stride + 1 : stride] if stride else x[:1].expand(count)).float() + 1
    assert torch.equal(y[:count].float(), expected.to(y.dtype).float())
    assert (y[count:] == -7).all() and (whole[:offset] == -7).all()


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("stride", [0, 1, 3, 16])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_pointers_and_sizes(add: KernelLauncher, rows: int, stride: int, offset: int) -> None:
    base = torch.arange(N * 16 * 16 + 8, device="cuda", dtype=torch.float32)
    for x_offset in (0, 1, 4):
        for _ in range(2):
            launch(add, base[x_offset:], stride, rows, offset)
    assert None not in add.known.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64])
def test_dtypes(add: KernelLauncher, dtype: torch.dtype) -> None:
    x = (torch.arange(N * 4, device="cuda") % 50).to(dtype)
    launch(add, x, 1, 3, dtype=torch.int32 if dtype is torch.uint8 else dtype)
    launch(add, x[1:], 1, 2, 1, torch.float32)
    assert None not in add.known.values()


def test_the_same_bits_as_triton_s_own_launches(add: KernelLauncher, tmp_path: Path) -> None:
    plain = module(tmp_path / "plain").add
    x = torch.randn(N * 64, device="cuda")
    for stride, offset in ((1, 0), (1, 1), (16, 0), (7, 3)):
        ours, theirs = torch.zeros(2, N * 3 + 8, device="cuda")[:, offset:]
        add[(3,)](x, ours, stride, 3, **OPTIONS)
        plain[(3,)](x, theirs, stride, 3, **OPTIONS)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pipeline", ["raise,fuse", "raise,quantize{weights=int8},fuse"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_a_model_against_its_naive_twin(tmp_path: Path, monkeypatch, pipeline: str, dtype: torch.dtype, bound) -> None:
    """The same rewritten graph in kernels and in eager: one row and many, tensors that are aligned and not."""
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = Mlp(64, 96).cuda().to(dtype).eval()
    given = []
    for rows in (1, 3, 16, 40):
        whole = torch.randn(rows * 64 + 1, device="cuda").to(dtype)
        given += [whole[:-1].view(rows, 64), whole[1:].view(rows, 64)]
    results: dict[str, list[torch.Tensor]] = {}
    for target in ("triton", "eager"):
        torch.compiler.reset()
        options = {"pipeline": pipeline, "target": target, "cuda_graphs": False}
        run = torch.compile(model, backend="fuseline", options=options)
        with torch.no_grad():
            results[target] = [run(x) for x in given]
    for ours, twin in zip(results["triton"], results["eager"], strict=True):
        assert error(ours.double(), twin.double()) < bound
    stored = list(Cache(tmp_path / "compiled").entries())
    pointers = [[t for t in e.fields["signature"].values() if t.startswith("*")] for e in stored]
    assert len(stored) >= 4 and not all(t.endswith(":16") for types in pointers for t in types)


def test_on_another_stream(add: KernelLauncher) -> None:
    """The kernel runs after what its stream has queued."""
    stream = torch.cuda.Stream()
    x, y = torch.zeros(N, device="cuda"), torch.zeros(N, device="cuda")
    add[(1,)](x, y, 1, 1, **OPTIONS)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(41)
        add[(1,)](x, y, 1, 1, **OPTIONS)
    stream.synchronize()
    assert (y == 42).all()


def test_in_a_cuda_graph(add: KernelLauncher) -> None:
    x, y = torch.zeros(N, device="cuda"), torch.zeros(N, device="cuda")
    add[(1,)](x, y, 1, 1, **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add[(1,)](x, y, 1, 1, **OPTIONS)
    x.fill_(5)
    y.zero_()
    graph.replay()
    assert (y == 6).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_device_of_its_arguments(add: KernelLauncher) -> None:
    for device in (1, 0, 1):
        launch(add, torch.arange(N, device=f"cuda:{device}", dtype=torch.float32), 1, 1)
        assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError):
        add[(1,)](torch.zeros(N, device="cuda:0"), torch.zeros(N), 1, 1, **OPTIONS)


def test_a_tensor_on_the_cpu_is_refused_as_triton_refuses_it(add: KernelLauncher) -> None:
    x = torch.zeros(N, device="cuda")
    launch(add, x, 1, 1)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add[(1,)](x, torch.zeros(N), 1, 1, **OPTIONS)
    launch(add, x, 1, 1)


def test_a_damaged_binary_is_not_loaded(store: KernelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = Compiling(monkeypatch)
    x = torch.arange(N, device="cuda", dtype=torch.float32)
    launch(wrap(module(tmp_path / "a"), store).add, x, 1, 1)
    (entry,) = store.cache.entries()
    content = bytearray(entry.files["add.cubin"])
    content[len(content) // 2] ^= 0xFF
    (entry.path / "add.cubin").write_bytes(content)
    launch(wrap(module(tmp_path / "b"), KernelStore(store.cache)).add, x, 1, 1)
    launch(wrap(module(tmp_path / "c"), KernelStore(store.cache)).add, x, 1, 1)
    assert compiling.names == ["add", "add"]


WORKER = """
import json, sys, time
import torch, triton
from tests.helpers.models import Mlp, error
compiled = []
real = triton.compile
counted = lambda source, **options: compiled.append(source.name) or real(source, **options)
triton.compile = triton.compiler.compile = counted
torch.manual_seed(0)
model, x = Mlp(256, 512).cuda().bfloat16().eval(), torch.randn(3, 256).cuda().bfloat16()
fast = torch.compile(model, backend="fuseline", options={"pipeline": "raise,fuse"})
with torch.no_grad():
    start = time.perf_counter()
    y = fast(x)
    torch.cuda.synchronize()
    print(json.dumps({"compiled": compiled, "seconds": time.perf_counter() - start, "y": y.float().sum().item(),
                      "error": error(y.float(), model(x).float())}))
"""


def test_a_fresh_process_compiles_nothing(tmp_path: Path) -> None:
    """Triton's own cache is empty each time, so that what is found is ours."""
    answers = []
    for turn in ("cold", "warm"):
        given = {**os.environ, "FUSELINE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        given |= {"TRITON_CACHE_DIR": str(tmp_path / turn)}
        done = subprocess.run([sys.executable, "-c", WORKER], env=given, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout.splitlines()[-1]))
        print(turn, answers[-1])
    cold, warm = answers
    assert len(cold["compiled"]) >= 2 and warm["compiled"] == []
    assert cold["y"] == warm["y"] and max(cold["error"], warm["error"]) < 2e-2
    assert all(isinstance(e.files, dict) for e in Cache(tmp_path / "cache" / "compiled").entries())


def microseconds(call: Callable[[], Any], count: int = 300) -> float:
    """Host time of a call, the least of ten rounds; the GPU's queue never fills."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count * 1e6)
    return best


def test_what_a_launch_costs_the_host(tmp_path: Path, store: KernelStore) -> None:
    """A kernel of ten tensors, as decode launches them; run with -s to read the figures."""
    with torch.no_grad():
        model = Mlp(64, 96).bfloat16()
        program = fuseline.capture(model, (torch.randn(4, 64).bfloat16(),), dynamic={"x": {0: torch.export.Dim("b")}})
    program, _ = fuseline.Pipeline("raise,quantize{weights=int4:g32},fuse").run(program)
    lowered = lower(program)
    plain = load_module(lowered.write(tmp_path / "plain")).run_linear_0_few
    ours = wrap(load_module(lowered.write(tmp_path / "ours")), store).run_linear_0_few
    assert isinstance(ours, KernelLauncher) and not isinstance(plain, KernelLauncher)
    kernel = next(k for k in lowered.kernels if k.name == "run_linear_0_few")
    kinds = {"*bf16": torch.bfloat16, "*u8": torch.uint8, "*i32": torch.int32, "*fp32": torch.float32}
    pointers = [torch.zeros(1 << 14, device="cuda", dtype=kinds[t]) for t in kernel.signature.values() if t in kinds]
    constants = {**kernel.constants, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    costs = {}
    for name, function in (("triton", plain), ("fuseline", ours)):
        call = lambda function=function: function[(48,)](*pointers, 1, **constants)
        call()
        costs[name] = microseconds(call)
    ready = next(iter(ours.known.values()))
    addresses = [p.data_ptr() for p in pointers]
    stream = torch.cuda.current_stream().cuda_stream
    costs["C launcher alone"] = microseconds(
        lambda: ready.launch(48, 1, 1, stream, *ready.head, *addresses, 1, *ready.constants)
    )
    print({name: f"{cost:.2f} us" for name, cost in costs.items()}, f"{len(pointers)} tensors")
    assert costs["fuseline"] < costs["triton"]
