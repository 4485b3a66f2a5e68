"""Many processes and one cache, processes that are killed, and disks that are full or read-only."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fuseline.runtime.cache import Cache
from fuseline.runtime.entry import Entry

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(Path(__file__).with_name("cache_worker.py"))]


def environment(cache: Path, folder: Path, mode: str) -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSELINE_"))}
    given |= {"FUSELINE_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return given | ({"TRITON_INTERPRET": "1"} if mode == "interpreted" else {})


def check(mode: str, answers: list[dict[str, Any]]) -> None:
    """The results are right, and all the same."""
    if mode == "interpreted":
        assert all(a["error"] < 1e-5 and a["target"] == "triton" for a in answers)
        assert len({Path(a["path"]).name for a in answers}) == 1
    else:
        assert all(a["kernels"] == answers[0]["kernels"] and len(a["kernels"]) >= 4 for a in answers)
        assert all(len(ptx) > 30 for ptx in answers[0]["kernels"].values())


def check_sound(root: Path) -> int:
    """Every entry verifies, and every module is what its name says; returns how many there are."""
    entries = list(Cache(root / "compiled").entries())
    assert all(isinstance(e, Entry) for e in entries), entries
    modules = [p for p in (root / "modules").glob("*.py") if not p.name.startswith(".")]
    for path in modules:
        assert path.stem == f"fuseline_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        assert json.loads(path.with_suffix(".json").read_text())["kernels"]
    return len(entries) + len(modules)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "die_at"), [("offline", 2), ("interpreted", 2)])
def test_eight_processes_compile_into_one_cache_and_one_is_killed(tmp_path: Path, mode: str, die_at: int) -> None:
    given, start = environment(tmp_path / "cache", tmp_path, mode), tmp_path / "start"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": given, "cwd": ROOT}
    victim = subprocess.Popen([*COMMAND, mode, str(start), str(die_at)], **pipes)
    others = [subprocess.Popen([*COMMAND, mode, str(start)], **pipes) for _ in range(7)]
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("start-*"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    start.touch()
    results = [process.communicate(timeout=540) for process in (victim, *others)]
    if victim.returncode == 0:  # the others had written it all before: then it is killed in a cache of its own
        given["FUSELINE_CACHE"] = str(tmp_path / "another")
        alone = subprocess.run([*COMMAND, mode, str(start), str(die_at)], env=given, cwd=ROOT)
        assert alone.returncode == -signal.SIGKILL
        check_sound(tmp_path / "another")
    else:
        assert victim.returncode == -signal.SIGKILL and results[0][0] == ""
    assert [process.returncode for process in others] == [0] * 7, results
    assert not any("Warning: compiled code cannot" in error for _, error in results)
    check(mode, [json.loads(out) for out, _ in results[1:]])
    count = check_sound(tmp_path / "cache")
    assert count >= (4 if mode == "offline" else 1)
    given["FUSELINE_CACHE"] = str(tmp_path / "cache")
    last = subprocess.run([*COMMAND, mode], capture_output=True, text=True, env=given, cwd=ROOT, check=True)
    answer = json.loads(last.stdout)
    check(mode, [answer, json.loads(results[1][0])])
    assert mode == "interpreted" or answer["stored"] == len(answer["kernels"]), "a ninth compiles nothing"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "interpreted"])
@pytest.mark.parametrize("disk", ["full", "read-only", "not there"])
def test_a_disk_that_takes_nothing(tmp_path: Path, mode: str, disk: str) -> None:
    """A real file system, mounted for the worker alone: one warning and a right result."""
    mount = tmp_path / "mount"
    mount.mkdir()
    given = environment(mount / "cache", tmp_path, mode)
    command = [*COMMAND, mode]
    if disk == "not there":
        given["FUSELINE_CACHE"] = "/proc/fuseline"
    else:
        fill = f"head -c 1M /dev/zero > {mount}/zeros; mkdir {mount}/cache" if disk == "full" else "true"
        more = f"mount -o remount,ro {mount}" if disk == "read-only" else "true"
        script = f'mount -t tmpfs -o size=64k fuseline {mount} && ({fill}); {more} && exec "$@"'
        unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
        if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount a file system")
        command = [*unshare, "sh", "-c", script, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    check(mode, [json.loads(done.stdout)])
    why = {"full": "No space left on device", "read-only": "Read-only file system", "not there": "No such file"}[disk]
    assert done.stderr.count("CacheWarning") == 1 and why in done.stderr
    assert "Set FUSELINE_CACHE to a folder that can be written and has room" in done.stderr


FIELDS = [{"n": n} for n in range(3)]
FILES = [{"a": bytes([n]) * 40_000, "b": bytes([n + 9]) * 9_000} for n in range(3)]


def _churn(directory: Path, seed: int) -> None:
    """Puts, replaces, gets and now and then clears, until it is killed."""
    warnings.simplefilter("error")
    choose, cache = random.Random(seed), Cache(directory, limit=1 << 30)
    while True:
        n = choose.randrange(3)
        found = cache.get("kernels", "k", FIELDS[n])
        if found and found.files != FILES[n]:
            (directory / f"wrong-{seed}").write_text("an entry of other files")
        cache.put("kernels", "k", FIELDS[n], FILES[n], replace=choose.random() < 0.5)
        if choose.random() < 0.02:
            cache.clear()


def test_processes_that_are_killed_at_any_moment(tmp_path: Path) -> None:
    """Forty SIGKILLs at random among writers of the same entries: whatever is there is whole."""
    directory = tmp_path / "cache"
    directory.mkdir()
    forked = multiprocessing.get_context("fork")
    choose = random.Random(0)
    alive = [forked.Process(target=_churn, args=(directory, seed)) for seed in range(4)]
    for process in alive:
        process.start()
    try:
        for seed in range(4, 44):
            time.sleep(choose.random() * 0.05)
            process = alive.pop(0)
            assert process.is_alive(), "a worker ended by an error"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            found = [e for e in Cache(directory).entries() if isinstance(e, Entry)]
            assert all(e.files == FILES[e.fields["n"]] for e in found)
            alive.append(forked.Process(target=_churn, args=(directory, seed)))
            alive[-1].start()
    finally:
        for process in alive:
            process.kill()
            process.join()
    assert not list(directory.glob("wrong-*"))
    cache = Cache(directory)
    left = [p for p in directory.rglob(".*") if p.is_dir()]
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    for n in range(3):
        assert cache.put("kernels", "k", FIELDS[n], FILES[n])
    cache.tidy()
    assert not [p for p in directory.rglob(".*") if p.is_dir()], "what the dead left is gone"
    entries = list(cache.entries())
    assert len(entries) == 3 and all(isinstance(e, Entry) for e in entries)
