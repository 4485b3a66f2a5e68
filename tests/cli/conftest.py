"""The command line in this process: exit code, stdout and stderr of one command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fuseline.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable]:
    """`cli("run", "demo:tiny-llama", …)`; nothing is written to the user's cache."""
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as raised:
            main(list(arguments))
        code = raised.value.code
        out, err = capsys.readouterr()
        return Result(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    yield run
    torch._dynamo.reset()  # compiled code is kept by code object, and the tests share the models' classes
