"""Emitted modules as files."""

from __future__ import annotations

import errno
import importlib.util
import os
import py_compile
import tempfile
from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Kernel, Launcher
from fuseline.codegen.kernel_text import call
from fuseline.codegen.module_file import deduplicate, load_module, render, write_module, write_text
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


def test_a_longer_name_makes_no_other_kernel() -> None:
    """Its parameters then take several lines."""

    def of(name: str) -> Launcher:
        head = call(f"def {name}(", ["x_ptr", "y_ptr", "ROWS: tl.constexpr"], "):")
        source = "\n".join(["@triton.jit", *head, "    pass"]) + "\n"
        return Launcher(f"run_{name}", f"def run_{name}():\n    {name}[(1,)]()\n", (Kernel(name, source, {}, {}),))

    short, long = of("k"), of("k" * 110)
    assert long.kernels[0].source.count("\n") > short.kernels[0].source.count("\n")
    assert {kernel.name for one in deduplicate([short, long]) for kernel in one.kernels} == {"k"}


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


def test_a_file_is_taken_for_what_it_holds(tmp_path: Path) -> None:
    """A file that was truncated, edited or swapped is written again; the right one is left alone, mark of use apart."""
    path = tmp_path / "module.py"
    write_text(path, "answer = 42\n")
    assert load_module(path).answer == 42
    for damaged in (b"answer", b"answer = 41\n", b"\xff\x00"):
        path.write_bytes(damaged)
        write_text(path, "answer = 42\n")
        assert path.read_text() == "answer = 42\n" and load_module(path).answer == 42
    os.utime(path, (1e9, 1e9))
    before = path.stat()
    write_text(path, "answer = 42\n")
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime > 1e9


def test_a_right_file_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    write_text(tmp_path / "module.py", "answer = 42\n")
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    write_text(tmp_path / "module.py", "answer = 42\n")
    with pytest.raises(OSError, match="Read-only"):
        write_text(tmp_path / "module.py", "answer = 43\n")


def test_bytecode_beside_a_module_is_not_trusted(tmp_path: Path) -> None:
    """Python would take bytecode of another source of the same size and second for the module's own."""
    path = tmp_path / "module.py"
    path.write_text("answer = 41\n")
    os.utime(path, (1e9, 1e9))
    py_compile.compile(str(path))
    path.write_text("answer = 42\n")
    os.utime(path, (1e9, 1e9))
    assert load_module(path).answer == 42
    other = tmp_path / "other.py"
    other.write_text("x = 1\n")
    load_module(other)
    assert not list((tmp_path / "__pycache__").glob("other*")), "and none is written"


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
