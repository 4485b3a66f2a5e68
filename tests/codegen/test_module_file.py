"""Emitted modules as files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Kernel, Launcher
from fuseline.codegen.module_file import deduplicate, load_module, render, write_module
from fuseline.compiler.errors import UserError
from tests.codegen.regions import region


def launcher(name: str, scale: float = 2.0) -> Launcher:
    from fuseline.codegen.emitter import emit_region

    answer = emit_region(region(lambda x: x * scale, [torch.randn(4, 6)]), name)
    assert isinstance(answer, Launcher)
    return answer


def test_kernels_that_differ_in_their_names_only_are_shared() -> None:
    shared = deduplicate([launcher("layer_0"), launcher("layer_1"), launcher("other", 3.0)])
    assert [s.name for s in shared] == ["layer_0", "layer_1", "other"]
    assert [s.kernels[0].name for s in shared] == ["layer_0_kernel", "layer_0_kernel", "other_kernel"]
    text = render(shared)
    assert text.count("@triton.jit") == 2
    assert text.count("layer_0_kernel[") == 2 and "layer_1_kernel" not in text
    assert "def layer_1(" in text


def test_a_shared_kernel_serves_all_lines() -> None:
    def served(name: str, line: str) -> Launcher:
        kernel = Kernel(f"{name}_kernel", f"@triton.jit\ndef {name}_kernel(): pass\n", {}, {}, ("op",), (line,), ("p",))
        return Launcher(name, f"def {name}():\n    {name}_kernel[(1,)]()\n", (kernel,))

    shared = deduplicate([served("a", "x.py:1"), served("b", "x.py:2")])
    assert shared[0].kernels == shared[1].kernels
    assert shared[0].kernels[0].lines == ("x.py:1", "x.py:2")
    assert "# lines: x.py:1, x.py:2" in render(shared)


def test_two_kernels_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two kernels are called a_kernel"):
        render([launcher("a"), launcher("a", 3.0)])


def test_a_module_is_written_whole_and_imported(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "module.py"
    write_module(path, [launcher("f")], extra="def answer():\n    return 42\n")
    module = load_module(path)
    assert module.answer() == 42 and load_module(path) is module
    assert [p.name for p in path.parent.iterdir() if p.suffix != ""] == ["module.py"]
    write_module(path, [launcher("f")], extra="def answer():\n    return 43\n")
    assert load_module(path).answer() == 43


def test_a_module_that_fails_to_import_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('broken')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            load_module(path)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no emitted module at"):
        load_module(tmp_path / "missing.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed") as caught:
        load_module(tmp_path / "missing.py")
    assert "pip install triton" in str(caught.value)
