"""C++ on this machine: compiled once, kept, and done without where it cannot be had."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from fuseline.runtime import location, native
from fuseline.runtime.cache import Cache
from fuseline.runtime.location import CacheWarning

SOURCE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "answer"};
PyMODINIT_FUNC PyInit_answer(void) {
  PyObject *made = PyModule_Create(&definition);
  PyModule_AddIntConstant(made, "value", 42);
  return made;
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def never(source: Path) -> bytes:
    raise AssertionError("compiled again")


def test_compiled_once_and_kept(source: Path, store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.build(source, store).value == 42
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", never)
        assert native.build(source, store).value == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert native.build(source, store).value == 43


def test_another_pytorch_has_other_headers(source: Path, store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    native.build(source, store)
    monkeypatch.setattr(native, "versions", lambda: {"torch": "2.99"})
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", never)
        with pytest.raises(AssertionError, match="compiled again"):
            native.build(source, store)
    native.build(source, store)
    assert len(list(store.entries())) == 2


def test_an_entry_that_cannot_be_loaded_is_replaced(
    source: Path, store: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_it = native._compile
    monkeypatch.setattr(native, "_compile", lambda source: b"\x7fELF of another machine")
    with pytest.raises(native.Missing):
        native.build(source, store)
    monkeypatch.setattr(native, "_compile", compile_it)
    assert native.build(source, store).value == 42
    monkeypatch.setattr(native, "_compile", never)
    assert native.build(source, store).value == 42


def test_where_nothing_can_be_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_warned", set())
    (tmp_path / "file").write_text("no folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native.build(source, Cache(tmp_path / "file")).value == 42
    assert [w.category for w in caught] == [CacheWarning]


def test_what_is_missing_is_said(source: Path, store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text(SOURCE + "unknown thing;")
    with pytest.raises(native.Missing, match="error: .*unknown"):
        native.build(source, store)
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.raises(native.Missing, match="no-such-compiler: No such file"):
        native.build(source, store)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(native.Missing, match=r"no C\+\+ compiler was found \(CXX names one\)"):
        native.build(source, store)


def test_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.module.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="fuseline"):
            assert native.module("watch") is None and native.module("watch") is None
    finally:
        native.module.cache_clear()
    assert len(caplog.records) == 1 and "watch runs in Python" in caplog.text
