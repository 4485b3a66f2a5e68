"""The launcher beside Triton's own launches: the same binaries, the same arguments, on a GPU that only records."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import compile_kernel
from fuseline.runtime import kernels as kernels_module, triton_api
from fuseline.runtime.cache import Cache
from fuseline.runtime.kernel_store import KernelStore, fields
from fuseline.runtime.kernels import KernelLauncher, wrap
from tests.runtime.fake_gpu import FakeGpu, fake_gpu
from tests.runtime.launches import ADD, OPTIONS, Compiling, module

FLOATS = torch.zeros(4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as fake:
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(Cache(tmp_path / "cache"))


def both(tmp_path: Path, store: KernelStore) -> tuple[KernelLauncher, Any]:
    """The launcher, and Triton's own function for the same text."""
    return wrap(module(tmp_path / "ours"), store).add, module(tmp_path / "plain").add


def same_launch(gpu: FakeGpu, ours: Any, plain: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    gpu.launches.clear()
    plain[grid](*arguments, **constants)
    expected = list(gpu.launches)
    gpu.launches.clear()
    for _ in range(3):  # met for the first time, and known
        ours[grid](*arguments, **constants)
    assert gpu.launches == expected * 3 and len(expected) == 1


X, Y = FLOATS[:100], FLOATS[512:612]
CALLS: dict[str, tuple[Any, ...]] = {
    "aligned": (X, Y, 7, 3),
    "x is misaligned": (FLOATS[1:], Y, 7, 3),
    "y is misaligned": (X, FLOATS[515:], 7, 3),
    "stride 1": (X, Y, 1, 3),
    "stride 16": (X, Y, 16, 3),
    "stride 0": (X, Y, 0, 3),
    "a negative stride": (X, Y, -16, 3),
    "a wide stride": (X, Y, 1 << 33, 3),
    "one row": (X, Y, 7, 1),
    "16 rows": (X, Y, 7, 16),
    "many rows": (X, Y, 7, 1 << 40),
    "no elements": (torch.empty(0), Y, 7, 3),
    "a parameter": (torch.nn.Parameter(X), Y, 7, 3),
    "a boolean": (X, Y, True, 3),
    "bfloat16": (torch.zeros(100, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.bfloat16), 7, 3),
    "float16 to float64": (torch.zeros(100).half(), torch.zeros(100).double(), 7, 3),
    "int8 to uint8": (torch.zeros(100).char(), torch.zeros(100).byte(), 7, 3),
    "int64 to bool": (torch.zeros(100).long(), torch.zeros(100).bool(), 7, 3),
}


@pytest.mark.parametrize("call", CALLS)
def test_launches_as_triton_does(gpu: FakeGpu, store: KernelStore, tmp_path: Path, call: str) -> None:
    ours, plain = both(tmp_path, store)
    same_launch(gpu, ours, plain, (5,), *CALLS[call], **OPTIONS)
    assert list(ours.known.values()) != [None], "it was this launcher's launch"


def test_each_specialisation_is_a_binary_of_its_own(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    """Triton and the launcher tell apart the same calls."""
    ours, plain = both(tmp_path, store)
    for arguments in CALLS.values():
        same_launch(gpu, ours, plain, (5,), *arguments, **OPTIONS)
    for block in (64, 256):
        same_launch(gpu, ours, plain, (5,), *CALLS["aligned"], **{**OPTIONS, "BLOCK": block})
    same_launch(gpu, ours, plain, (5,), *CALLS["aligned"], **{**OPTIONS, "num_warps": 4})
    binaries = {ready.head[0] for ready in ours.known.values()}
    cached, _, _, _, _ = plain.device_caches[0]
    assert len(binaries) == len(cached) == len(list(store.cache.entries())) > 12
    theirs = sorted(instructions(kernel.asm["ptx"]) for kernel in cached.values())
    assert theirs == sorted(instructions(e.files["add.ptx"].decode()) for e in store.cache.entries())


def instructions(ptx: str) -> list[str]:
    """PTX without what it says of source files and lines."""
    lines = (line.partition("//")[0].strip() for line in ptx.splitlines())
    return [line for line in lines if line.endswith(";") and not line.startswith(".")]


@pytest.mark.parametrize(
    "grid",
    [(5,), (5, 2), (5, 2, 3), (0,), [5, 2], lambda meta: (meta["BLOCK"],)],
    ids=["one", "two", "three", "none", "list", "function"],
)
def test_grids(gpu: FakeGpu, store: KernelStore, tmp_path: Path, grid: Any) -> None:
    ours, plain = both(tmp_path, store)
    same_launch(gpu, ours, plain, grid, X, Y, 7, 3, **OPTIONS)


def test_keywords_in_any_order(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    source = ADD.source.replace("BLOCK: tl.constexpr", "BLOCK: tl.constexpr, MORE: tl.constexpr").replace(
        "+ 1", "+ MORE"
    )
    kernel = Kernel("add", source, {**ADD.signature, "MORE": "constexpr"}, {"BLOCK": 64, "MORE": 3})
    ours, plain = wrap(module(tmp_path / "a", kernel), store).add, module(tmp_path / "b", kernel).add
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, BLOCK=64, MORE=2, num_warps=1)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, MORE=64, BLOCK=2, num_warps=1)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, num_warps=1, BLOCK=True, MORE=2)
    # True == 1 and 0.0 == -0.0, and still they are other constants
    for more in (1, True, 0.0, -0.0, float("nan")):
        same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, BLOCK=64, MORE=more)
    assert len(list(store.cache.entries())) == 5, "floating-point constants are launched by Triton"


def test_what_the_launcher_does_not_understand_is_triton_s(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    ours, plain = both(tmp_path, store)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, **OPTIONS)
    known = len(ours.known)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, rows=3, **OPTIONS)  # an argument by name
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, 128, num_warps=1)  # a constant by position
    assert len(ours.known) == known
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, **OPTIONS, maxnreg=128)
    assert list(ours.known.values())[-1] is None
    with pytest.raises(TypeError):
        ours[(5,)](X, Y)
    with pytest.raises(KeyError, match="nonsense"):
        ours[(5,)](X, Y, 7, 3, **OPTIONS, nonsense=1)


def test_several_devices_are_triton_s(gpu: FakeGpu, store: KernelStore, tmp_path: Path, monkeypatch) -> None:
    ours, plain = both(tmp_path, store)
    monkeypatch.setattr(kernels_module, "device_index", lambda tensor: int(tensor is Y))
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, **OPTIONS)
    monkeypatch.setattr(kernels_module, "device_index", lambda tensor: -1)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, **OPTIONS)
    assert list(ours.known.values()) == [None, None] and not list(store.cache.entries())


def test_launches_on_the_device_of_its_arguments(gpu: FakeGpu, store: KernelStore, tmp_path: Path, monkeypatch) -> None:
    """Where another device is the current one: its stream is not taken, and it is the current one again afterwards."""
    current = [0]

    class Device:
        def __init__(self, index: int):
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *exception: Any) -> None:
            current[0] = self.before

    seen = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(kernels_module, "device_index", lambda tensor: 1)
    monkeypatch.setattr(gpu, "get_current_device", lambda: current[0])
    monkeypatch.setattr(gpu, "get_current_stream", lambda device: seen.append((device, current[0])) or 100 + device)
    ours = wrap(module(tmp_path / "ours"), store).add
    for _ in range(2):
        ours[(5,)](X, Y, 7, 3, **OPTIONS)
    assert [launch[2] for launch in gpu.launches] == [101, 101] and seen == [(1, 1)] * 2 and current == [0]


def test_launch_hooks_see_every_launch(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    from triton import knobs

    ours, _ = both(tmp_path, store)
    ours[(5,)](X, Y, 7, 3, **OPTIONS)
    seen: list[str] = []
    hook = lambda metadata: seen.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        ours[(5,)](X, Y, 7, 3, **OPTIONS)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    ours[(5,)](X, Y, 7, 3, **OPTIONS)
    assert seen == ["add"] and len(gpu.launches) == 3


def test_scratch_memory_is_triton_s(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    gpu.scratch = 64
    ours, plain = both(tmp_path, store)
    same_launch(gpu, ours, plain, (5,), X, Y, 7, 3, **OPTIONS)
    assert list(ours.known.values()) == [None]


def test_kernels_that_mention_another_stay_as_they_are(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    """Their text is not all that they are made of, so they may not be found by it."""
    helper = "\n\n@triton.jit\ndef helper(x):\n    return x + 1\n"
    kernel = Kernel("add", ADD.source.replace("mask=inside) + 1", "mask=inside) + helper(1)"), ADD.signature, {})
    loaded = wrap(module(tmp_path / "a", kernel, helper), store)
    loaded.add[(5,)](X, Y, 7, 3, **OPTIONS)
    assert {type(loaded.add).__name__, type(loaded.helper).__name__} == {"JITFunction"}
    assert len(gpu.launches) == 1 and not list(store.cache.entries())


@pytest.mark.parametrize("setting", ["TRITON_ALWAYS_COMPILE", "TRITON_KERNEL_DUMP", "TRITON_KERNEL_OVERRIDE"])
def test_triton_s_debugging_variables_work(gpu, store, tmp_path, monkeypatch, setting) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_DUMP_DIR", str(tmp_path / "dump"))
    monkeypatch.setenv("TRITON_OVERRIDE_DIR", str(tmp_path / "override"))
    monkeypatch.setenv(setting, "1")
    ours, _ = both(tmp_path, store)
    ours[(5,)](X, Y, 7, 3, **OPTIONS)
    assert ours.plain and len(gpu.launches) == 1
    assert setting != "TRITON_KERNEL_DUMP" or list((tmp_path / "dump").rglob("*.cubin"))


def test_a_kernel_that_does_not_compile_raises_triton_s_error(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    from triton.compiler.errors import CompilationError

    kernel = Kernel("add", ADD.source.replace("tl.arange(0, BLOCK)", "tl.nothing(BLOCK)"), ADD.signature, {})
    ours = wrap(module(tmp_path / "a", kernel), store).add
    for _ in range(2):
        with pytest.raises(CompilationError, match="nothing"):
            ours[(5,)](X, Y, 7, 3, **OPTIONS)


def test_more_shared_memory_than_there_is(gpu: FakeGpu, store: KernelStore, tmp_path: Path) -> None:
    """Triton's error, from the first launch on, whether the binary is stored or not."""
    from triton.runtime.errors import OutOfResources

    source = """@triton.jit
def product(x_ptr, y_ptr, B: tl.constexpr):
    k = tl.arange(0, B)
    x = tl.load(x_ptr + k[:, None] * B + k[None, :])
    tl.store(y_ptr + k[:, None] * B + k[None, :], tl.dot(x, tl.trans(x)))
"""
    kernel = Kernel("product", source, {"x_ptr": "*bf16", "y_ptr": "*fp32", "B": "constexpr"}, {"B": 64})
    gpu.utils.get_device_properties = lambda device: {"max_shared_mem": 1024}
    x, y = torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64)
    for folder in ("a", "b"):
        product = wrap(module(tmp_path / folder, kernel), store).product
        for _ in range(2):
            with pytest.raises(OutOfResources, match="shared memory, Required: .*, Hardware limit: 1024"):
                product[(1,)](x, y, B=64, num_warps=4, num_stages=1)
    assert len(list(store.cache.entries())) == 1 and not gpu.launches


def test_a_stored_binary_is_not_compiled_again(gpu, store, tmp_path, monkeypatch) -> None:
    compiling = Compiling(monkeypatch)
    wrap(module(tmp_path / "first"), store).add[(5,)](X, Y, 7, 3, **OPTIONS)
    again = KernelStore(Cache(store.cache.directory))
    ours = wrap(module(tmp_path / "second"), again).add
    ours[(5,)](X, Y, 7, 3, **OPTIONS)
    assert compiling.names == ["add"] and again.hits == 1 and not again.misses
    first, second = gpu.launches
    assert first == second
    ours[(5,)](X, Y, 1, 3, **OPTIONS)
    assert compiling.names == ["add", "add"]
    reason = str(again.misses["add"])
    assert (
        "signature.stride: i32 stored, constexpr here" in reason and "constants.stride: absent stored, 1 here" in reason
    )


def test_a_damaged_or_unfit_binary_is_compiled_again(gpu, store, tmp_path, monkeypatch, caplog) -> None:
    compiling = Compiling(monkeypatch)

    def launch(folder: str) -> None:
        wrap(module(tmp_path / folder), KernelStore(Cache(store.cache.directory))).add[(5,)](X, Y, 7, 3, **OPTIONS)

    launch("a")
    (entry,) = store.cache.entries()
    (entry.path / "add.cubin").write_bytes(b"\x7fELF")
    launch("b")
    assert len(compiling.names) == 2
    unfit = {**entry.files, "add.json": b'{"target": {"backend": "cuda"}}'}  # intact, and of no use
    store.cache.put("kernels", "add", entry.fields, unfit, replace=True)
    with caplog.at_level(logging.DEBUG, "fuseline"):
        launch("c")
    assert len(compiling.names) == 3 and "the stored kernel add cannot be loaded: KeyError" in caplog.text
    other = json.loads(entry.files["add.json"])
    other["target"]["arch"] = 80
    store.cache.put(
        "kernels", "add", entry.fields, {**entry.files, "add.json": json.dumps(other).encode()}, replace=True
    )
    launch("d")
    launch("e")
    assert len(compiling.names) == 4 and len(gpu.launches) == 5 and len(set(map(str, gpu.launches))) == 1
    (entry,) = store.cache.entries()
    assert json.loads(entry.files["add.json"])["target"]["arch"] == 90


def test_offline_compilation_stores_what_the_launcher_finds(gpu, store, tmp_path, monkeypatch) -> None:
    aligned = Kernel("add", ADD.source, {**ADD.signature}, ADD.constants, num_warps=1, num_stages=1)
    compiled = compile_kernel(aligned, "sm_90", store)
    assert not compiled.stored and compile_kernel(aligned, "sm_90", store).stored
    compiling = Compiling(monkeypatch)
    ours = wrap(module(tmp_path / "a"), store).add
    ours[(5,)](X, Y, 7, 3, **OPTIONS)  # 7 is neither 1 nor divisible by 16, as compiled offline
    assert compiling.names == [] and gpu.launches[0][1] == (5, 1, 1)
    assert compile_kernel(aligned, "sm_80", store).stored is False
    assert str(store.misses["add"]) == "target: cuda:90 stored, cuda:80 here"


def test_offline_entries_are_checked(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(ADD, "sm_90", store)
    (entry,) = store.cache.entries()
    assert {name.rpartition(".")[2] for name in entry.files} == {"json", "cubin", "ptx"}
    store.cache.put("kernels", "add", entry.fields, {"add.json": b"[]"}, replace=True)
    fresh = compile_kernel(ADD, "sm_90", store)
    assert not fresh.stored and fresh.asm["cubin"] == entry.files["add.cubin"]
    again = compile_kernel(ADD, "sm_90", store)
    assert again.stored and again.asm["cubin"] == entry.files["add.cubin"] and ".target sm_90" in again.asm["ptx"]
    assert (again.num_warps, again.shared_bytes) == (fresh.num_warps, fresh.shared_bytes)
    other = Kernel(
        "renamed", ADD.source.replace("def add", "def renamed"), ADD.signature, ADD.constants, num_warps=1, num_stages=1
    )
    assert ".entry renamed" in compile_kernel(other, "sm_90", store).asm["ptx"], "not an equal kernel's entry point"


def test_everything_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "source": ADD.source, "signature": ADD.signature, "divisible": ["x_ptr"], "constants": {"BLOCK": 1},
        "options": {"num_warps": 1}, "target": ("cuda", 90),
    }  # fmt: skip
    base = fields(**made)
    assert {"triton", "torch", "fuseline"} <= base.keys() and base["target"] == "cuda:90"
    for name, value in {
        "source": ADD.source.replace("+ 1", "+ 2"), "signature": {**ADD.signature, "rows": "i64"}, "divisible": [],
        "constants": {"BLOCK": True}, "options": {"num_warps": 2}, "target": ("cuda", 80),
    }.items():  # fmt: skip
        assert fields(**{**made, name: value}) != base, name
    decorated = ADD.source.replace("@triton.jit(do_not", "# a comment before it\n@triton.jit(do_not")
    assert fields(**{**made, "source": decorated}) == base, "how it is decorated shows in the signature"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert fields(**made) == base
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert fields(**made)["environment"]["DISABLE_PTXAS_OPT"] == "1"


def test_a_read_only_cache_of_triton_s(gpu, store, tmp_path, monkeypatch) -> None:
    """Triton keeps what it compiles as well; where it cannot, a folder of the process serves."""
    import triton

    from fuseline.runtime import location

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(location, "_warned", set())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "triton"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    ours = wrap(module(tmp_path / "a"), store).add
    with pytest.warns(location.CacheWarning, match="Not a directory"):
        ours[(5,)](X, Y, 7, 3, **OPTIONS)
    assert len(gpu.launches) == 1 and list(ours.known.values()) != [None]


def test_another_triton_is_left_alone(tmp_path: Path, store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver
    from triton.runtime.jit import JITFunction

    assert triton_api.unlike() is None, "this version is one of those that were checked"
    for target, name, value, reason in (
        (driver, "_BASE_ARGS_FORMAT", "iiiKKppOOO", "its launcher takes iiiKKppOOO"),
        (triton_api, "_ANSWERS", {16: ("i32", "")}, "it specialises 16 in another way"),
        (driver, "CudaLauncher", None, "AttributeError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            triton_api.unlike.cache_clear()
            assert reason in triton_api.unlike()
            assert isinstance(wrap(module(tmp_path / "a"), store).add, JITFunction)
    triton_api.unlike.cache_clear()
    assert isinstance(wrap(module(tmp_path / "a"), store).add, KernelLauncher)


def test_wrapping_twice_changes_nothing(tmp_path: Path, store: KernelStore) -> None:
    first = wrap(module(tmp_path), store)
    add = first.add
    assert wrap(first, KernelStore(store.cache)).add is add
    assert add.fn.__name__ == "add" and repr(add) == "KernelLauncher(add)"


def test_under_the_interpreter_nothing_is_wrapped(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from fuseline.codegen.module_file import load_module
from fuseline.runtime.kernels import wrap
print(type(wrap(load_module({str(tmp_path / "kernels.py")!r})).add).__name__)
"""
    module(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == "InterpretedFunction", done.stderr
