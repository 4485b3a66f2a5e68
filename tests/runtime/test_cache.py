"""The disk cache: what is found, what is trusted, what is said of a miss, and what a broken disk does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuseline.compiler.errors import UserError
from fuseline.runtime import cache as cache_module, location
from fuseline.runtime.cache import Cache
from fuseline.runtime.entry import Entry, Miss
from fuseline.runtime.housekeeping import tidy_modules
from fuseline.runtime.location import CacheWarning, cache_root, keep_module, size_limit

FIELDS = {"source": "a" * 64, "constants": {"BLOCK": "2"}, "target": "cuda:90", "triton": "3.6.0"}
FILES = {"k.cubin": bytes(range(256)) * 4, "k.json": b'{"shared": 16}'}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test may be warned anew; warnings are errors where a test doesn't ask for them."""
    monkeypatch.setattr(location, "_warned", set())
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path / "root"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def stored(cache: Cache, **changes: object) -> Path:
    path = cache.put("kernels", "k", {**FIELDS, **changes}, FILES)
    assert path is not None
    return path


def test_what_is_put_is_found(cache: Cache) -> None:
    assert cache.get("kernels", "k", FIELDS).reason == "no entry of k"
    path = cache.put("kernels", "k", FIELDS, FILES, because="no entry of k")
    found = cache.get("kernels", "k", dict(reversed(FIELDS.items())))  # the order of fields says nothing
    assert isinstance(found, Entry) and found.files == FILES and found.because == "no entry of k"
    assert found.path == path and abs(found.made - time.time()) < 60
    assert isinstance(Cache(cache.directory).get("kernels", "k", FIELDS), Entry), "another process finds it, too"
    assert isinstance(cache.get("kernels", "other", FIELDS), Miss)
    assert isinstance(cache.get("modules", "k", FIELDS), Miss)


def test_a_miss_says_which_field_differs(cache: Cache) -> None:
    stored(cache)
    miss = cache.get("kernels", "k", {**FIELDS, "triton": "3.7.0"})
    assert not miss and str(miss) == "triton: 3.6.0 stored, 3.7.0 here"
    assert miss.differing == {"triton": ("3.6.0", "3.7.0")} and not miss.damaged
    miss = cache.get("kernels", "k", {**FIELDS, "constants": {"BLOCK": "4"}, "target": "cuda:80"})
    assert set(str(miss).split("; ")) == {"constants.BLOCK: 2 stored, 4 here", "target: cuda:90 stored, cuda:80 here"}
    miss = cache.get("kernels", "k", {**FIELDS, "source": "b" * 64})
    assert str(miss) == "source: aaaaaaaaaaaa… stored, bbbbbbbbbbbb… here"
    fewer = {k: v for k, v in FIELDS.items() if k != "target"} | {"device": 1}
    assert set(cache.get("kernels", "k", fewer).differing) == {"target", "device"}


def test_a_miss_is_explained_by_the_nearest_entry(cache: Cache) -> None:
    stored(cache, source="c" * 64, target="cuda:80")
    stored(cache, triton="3.5.0")
    stored(cache, source="d" * 64, triton="3.4.0")
    assert str(cache.get("kernels", "k", FIELDS)) == "triton: 3.5.0 stored, 3.6.0 here"


def test_values_of_another_type_are_other_values(cache: Cache) -> None:
    stored(cache, flag=True)
    assert set(cache.get("kernels", "k", {**FIELDS, "flag": 1}).differing) == {"flag"}
    assert cache.get("kernels", "k", {**FIELDS, "flag": True})


def truncate(path: Path) -> None:
    (path / "k.cubin").write_bytes(FILES["k.cubin"][:100])


def flip(path: Path) -> None:
    content = bytearray(FILES["k.cubin"])
    content[500] ^= 1
    (path / "k.cubin").write_bytes(content)


def edit_header(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header = json.loads((path / "entry.json").read_text())
        (path / "entry.json").write_text(json.dumps({**header, **changes}))

    return edit


def another_header(path: Path) -> None:
    (path / "entry.json").write_text("[" * 100_000)


def outside(path: Path) -> None:
    header = json.loads((path / "entry.json").read_text())
    header["files"] = {"../../../secret": header["files"]["k.cubin"]}
    (path / "entry.json").write_text(json.dumps(header))


def a_file(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("not a folder")


def folder_for_a_file(path: Path) -> None:
    (path / "k.cubin").unlink()
    (path / "k.cubin").mkdir()


DAMAGES = {
    "truncated": (truncate, "k.cubin has 100 bytes, not 1024"),
    "one bit": (flip, "k.cubin is not what was stored: its SHA-256 differs"),
    "a file is gone": (lambda p: (p / "k.json").unlink(), "k.json cannot be read: No such file"),
    "a folder for a file": (folder_for_a_file, "k.cubin cannot be read: Is a directory"),
    "no header": (lambda p: (p / "entry.json").unlink(), "entry.json is missing"),
    "an empty header": (lambda p: (p / "entry.json").write_text(""), "entry.json cannot be read: Expecting value"),
    "half a header": (lambda p: os.truncate(p / "entry.json", 90), "entry.json cannot be read"),
    "binary header": (lambda p: (p / "entry.json").write_bytes(b"\xff\xfe\x00"), "entry.json cannot be read"),
    "a deep header": (another_header, "entry.json cannot be read"),
    "another format": (edit_header(version=2), "entry.json is not ours: no header of format 1"),
    "another kernel": (edit_header(name="other"), "entry.json is not ours: it is of kernels other"),
    "other fields": (
        edit_header(fields={**FIELDS, "triton": "3.5.0"}),
        "its fields do not belong to its folder's name",
    ),
    "a list of files": (edit_header(files=["k.cubin"]), "'files' is missing"),
    "files without sizes": (edit_header(files={"k.cubin": 7}), "no size and SHA-256 of k.cubin"),
    "files elsewhere": (outside, "the file name '../../../secret'"),
    "a file in its place": (a_file, "entry.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_replaced(cache: Cache, damage: str) -> None:
    harm, reason = DAMAGES[damage]
    path = stored(cache)
    harm(path)
    miss = cache.get("kernels", "k", FIELDS)
    assert isinstance(miss, Miss) and miss.damaged and reason in str(miss)
    neighbour = cache.get("kernels", "k", {**FIELDS, "triton": "3.7.0"})
    assert isinstance(neighbour, Miss), "nor does it break the explanation of another miss"
    assert stored(cache) == path
    found = cache.get("kernels", "k", FIELDS)
    assert isinstance(found, Entry) and found.files == FILES
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_an_intact_entry_stays(cache: Cache) -> None:
    path = stored(cache)
    cache.put("kernels", "k", FIELDS, {"k.cubin": b"another process's"})
    assert cache.get("kernels", "k", FIELDS).files == FILES
    assert cache.put("kernels", "k", FIELDS, {"k.cubin": b"better"}, replace=True) == path
    assert cache.get("kernels", "k", FIELDS).files == {"k.cubin": b"better"}


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "x" * 300, "größe", ".hidden", "\ud800", "CON:"])
def test_any_name_is_a_folder_inside(cache: Cache, name: str) -> None:
    path = cache.put("kernels", name, FIELDS, FILES)
    assert path is not None and path.parent.parent == cache.directory / "kernels"
    assert cache.get("kernels", name, FIELDS).name == name
    assert [e.name for e in cache.entries()] == [name]


def test_a_write_that_was_killed_leaves_nothing_that_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before the rename: whatever it wrote is invisible, and removed after an hour."""

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    stored(cache, triton="3.5.0")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "rename", kill)
        patch.setattr(cache_module.shutil, "rmtree", lambda *a, **k: None)  # the dead clean nothing up
        with pytest.raises(Killed):
            stored(cache)
    (left,) = (p for p in (cache.directory / "kernels" / "k").iterdir() if p.name.startswith("."))
    assert {p.name for p in left.iterdir()} == {"k.cubin", "k.json", "entry.json"}
    assert len(list(cache.entries())) == 1 and not cache.get("kernels", "k", FIELDS)
    cache.tidy()
    assert left.exists(), "a writer may be at work on it"
    os.utime(left, (time.time() - 7200,) * 2)
    cache.tidy()
    assert not left.exists() and len(list(cache.entries())) == 1


def aged(path: Path, seconds: float) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=8 << 10)
    paths = [aged(stored(cache, triton=str(i)), 1000 - i) for i in range(3)]
    assert cache.get("kernels", "k", {**FIELDS, "triton": "0"}), "used now, so it is the last to go"
    assert paths[0].stat().st_mtime > time.time() - 60
    for i in range(3, 6):
        stored(cache, triton=str(i))
    assert not paths[1].exists() and paths[0].exists() and paths[2].exists() is False
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 8 << 10
    assert all(isinstance(e, Entry) for e in cache.entries())


def test_what_was_just_used_is_not_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=3 << 10)
    for i in range(4):
        stored(cache, triton=str(i))
    assert len(list(cache.entries())) == 4, "another process may be about to read it"


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    assert Cache(tmp_path, limit=1000).put("kernels", "k", FIELDS, FILES) is None
    assert Cache(tmp_path, limit=0).put("kernels", "k", FIELDS, {}) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 1 << 30), ("4096", 4096), ("512M", 512 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 << 30), ("0", 0)],
)
def test_the_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("FUSELINE_CACHE_SIZE", text)
    assert size_limit() == size


def test_a_limit_that_is_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELINE_CACHE_SIZE", "lots")
    with pytest.raises(UserError, match="FUSELINE_CACHE_SIZE is 'lots', which is not a size") as caught:
        Cache()
    assert "try: FUSELINE_CACHE_SIZE=2GiB" in str(caught.value)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "root" and Cache().directory == tmp_path / "root" / "compiled"
    monkeypatch.delenv("FUSELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "fuseline"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fuseline"


UNWRITABLE = {"below a file": "file/below", "in /proc": "/proc/fuseline", "in /sys": "/sys/fuseline"}


@pytest.mark.parametrize("place", UNWRITABLE)
def test_a_folder_that_cannot_be_written_warns_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / UNWRITABLE[place])
    with pytest.warns(CacheWarning) as caught:
        assert cache.put("kernels", "k", FIELDS, FILES) is None
        assert cache.put("kernels", "other", FIELDS, FILES) is None
        assert Cache(tmp_path / UNWRITABLE[place]).put("kernels", "k", FIELDS, FILES) is None
    (warning,) = caught
    text = str(warning.message)
    assert f"compiled code cannot be kept in {cache.directory}: " in text and "Set FUSELINE_CACHE to a folder" in text
    assert cache.get("kernels", "k", FIELDS).reason == "no entry of k"
    assert list(cache.entries()) == [] and cache.clear() == 0
    cache.tidy()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_in_the_middle(cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    stored(cache)
    with monkeypatch.context() as patch, pytest.warns(CacheWarning, match=os.strerror(number)):
        patch.setattr(Path, "write_bytes", refuse)
        assert cache.put("kernels", "k", {**FIELDS, "triton": "3.7.0"}, FILES) is None
    assert cache.get("kernels", "k", FIELDS), "what is there serves on"
    assert len(list((cache.directory / "kernels" / "k").iterdir())) == 1, "nothing half written is left"


def test_a_cache_that_can_only_be_read_serves(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(cache)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert cache.get("kernels", "k", FIELDS).files == FILES
    assert cache.put("kernels", "k", FIELDS, FILES) is not None, "it is there already, and nobody is warned"


def test_clearing(cache: Cache) -> None:
    stored(cache)
    stored(cache, triton="3.7.0")
    assert cache.clear() == 2 and list(cache.entries()) == [] and cache.clear() == 0
    assert stored(cache).is_dir()


def test_threads_that_put_get_clear_and_damage(cache: Cache) -> None:
    """Any mixture of them: a get gives the files that were put or a miss; nothing raises."""
    fields = [{**FIELDS, "n": i} for i in range(3)]
    wrong: list[object] = []
    stop = time.monotonic() + 1.5

    def work(k: int) -> None:
        try:
            own = Cache(cache.directory, limit=1 << 20)
            i = k
            while time.monotonic() < stop:
                i += 1
                found = own.get("kernels", "k", fields[i % 3])
                if found and found.files != {"f": b"%d" % (i % 3) * 5000}:
                    wrong.append(found)
                own.put("kernels", "k", fields[i % 3], {"f": b"%d" % (i % 3) * 5000}, replace=i % 5 == 0)
                if k == 0 and i % 40 == 0:
                    own.clear()
                if k == 1 and i % 7 == 0 and found:
                    with contextlib.suppress(FileNotFoundError):  # another thread replaced it
                        os.truncate(found.path / "f", 10)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for item in fields:
        cache.put("kernels", "k", item, {"f": b"%d" % item["n"] * 5000})
    assert all(cache.get("kernels", "k", item) for item in fields)


def write_module(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "fuseline_0.py"
    path.write_text("x = 1\n")
    return path


def test_a_module_goes_elsewhere_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep_module(write_module) == tmp_path / "root" / "modules" / "fuseline_0.py"
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning) as caught:
        first = keep_module(write_module, tmp_path / "file" / "modules")
        second = keep_module(write_module, tmp_path / "file" / "modules")
    assert first == second and first.read_text() == "x = 1\n" and tmp_path not in first.parents
    assert len(caught) == 1 and "Not a directory" in str(caught[0].message)

    def refuse(directory: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="there is nowhere to write a generated module") as error:
        keep_module(refuse, tmp_path)
    assert "set FUSELINE_CACHE (or TMPDIR)" in str(error.value)


def test_modules_are_bounded(tmp_path: Path) -> None:
    for i in range(4):
        for ending in ("py", "json"):
            aged_file = tmp_path / f"fuseline_{i}.{ending}"
            aged_file.write_text("x" * 500)
            aged(aged_file, 1000 - i)
    aged_file = tmp_path / ".fuseline_9.py.abc"
    aged_file.write_text("half")
    aged(aged_file, 7200)
    (tmp_path / "notes.txt").write_text("the user's own")
    tidy_modules(tmp_path, 2500)
    assert {p.name for p in tmp_path.iterdir()} == {
        "fuseline_2.py", "fuseline_2.json", "fuseline_3.py", "fuseline_3.json", "notes.txt",
    }  # fmt: skip
