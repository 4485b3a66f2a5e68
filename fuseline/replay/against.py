"""Recording a side of a replay in a process of its own: this checkout, or a commit of it in a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fuseline

from ..compiler.errors import FuselineError, UserError
from . import record as recorder
from .compare import write_index
from .corpus import Case


def here() -> Path:
    """Where this package lies: the root of the checkout, if it is one."""
    return Path(str(fuseline.__file__)).resolve().parent.parent


def record_in_process(
    root: Path, cases: list[Case], folder: Path, done: Callable[[str], None] = lambda case: None, seed: int = 0
) -> None:
    """Records `cases` into `folder` with the package at `root`, in a fresh Python whose sets are ordered by `seed`.

    The recorder is this package's own, so that both sides of a comparison are recorded in the same way.

    Raises:
        FuselineError: the process failed; the details are its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": str(seed), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="fuseline-replay-") as temporary:
        listed, said = Path(temporary, "cases.json"), Path(temporary, "stderr")
        listed.write_text(json.dumps([case.to_json() for case in cases]), encoding="utf-8")
        # -P: the recorder's own folder is not searched for modules
        command = [sys.executable, "-P", str(Path(recorder.__file__).resolve()), str(listed), str(folder), str(root)]
        with said.open("w") as errors, subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(recorder.DONE):
                    done(line.removeprefix(recorder.DONE).strip())
        if process.returncode:
            last = said.read_text(errors="replace").strip().splitlines()[-6:]
            raise FuselineError(f"the package at {root} could not be recorded", last)
    write_index(folder, cases)


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a commit of this checkout in a temporary folder, which is removed at the end; git is only read.

    Raises:
        UserError: this package is not in a git checkout, or there is no such commit.
    """
    commit = commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="fuseline-replay-") as temporary:
        archive, root = Path(temporary, "archive.tar"), Path(temporary, "source").resolve()
        _git("archive", "--format=tar", "-o", str(archive), commit)
        with tarfile.open(archive) as tar:
            # Python 3.11.0 to 3.11.3 know no filters; the archive is git's own
            tar.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        archive.unlink()
        yield root


def commit_of(revision: str) -> str:
    """The full name of a commit; raises what `checkout` does."""
    try:
        inside = _git("rev-parse", "--show-toplevel")
    except (OSError, subprocess.CalledProcessError):
        inside = ""
    if not inside or Path(inside).resolve() != here():
        raise UserError("--against needs a git checkout", [f"the package lies in {here()}"], "pip install -e CHECKOUT")
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        raise UserError(f"no commit {revision!r} in {here()}", remedy="git log --oneline") from None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(here()), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
