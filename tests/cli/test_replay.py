"""`fuseline replay`: equal code shows no difference in any process, and a change is shown once, with its places."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

import fuseline
from fuseline import schemas
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.replay.against import commit_of, here, record_in_process
from fuseline.replay.compare import Difference, Recording, compare, read, write_index
from fuseline.replay.corpus import PIPELINES, Case, cases, corpus
from fuseline.replay.record import kernel_text, plain, record, without_folders

PACKAGE = Path(fuseline.__file__).parent
MODEL = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)), (torch.ones(3, 16),)

def broken():
    raise ValueError("not today, {__file__}")
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo:tiny-decoder under two pipelines, by a process of its own."""
    folder = tmp_path_factory.mktemp("replay") / "record"
    record_in_process(here(), cases(["demo:tiny-decoder"], (PIPELINES[1], PIPELINES[3])), folder, seed=1)
    return folder


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb emits without another interpreter."""

    def emit(root: Path, found: list[Case], folder: Path, done: Callable[[str], None], seed: int = 0) -> None:
        assert root == here()
        record([case.to_json() for case in found], folder, done)
        write_index(folder, found)

    monkeypatch.setattr(sys.modules["fuseline.cli.replay"], "record_in_process", emit)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus file of one small model and one that cannot be made."""
    (tmp_path / "replay_models.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "corpus.toml"
    path.write_text('models = ["py:replay_models:make", "py:replay_models:broken"]\npipelines = ["fuse"]\n')
    return path


# ---- determinism ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_codegen_is_deterministic(recorded: Path, cli: Callable) -> None:
    """Recorded by one process, emitted again by another in which sets and hashes come in another order."""
    result = cli("replay", str(recorded), "--json", "-")
    assert result.code == 0, result.out[:3000]
    data = json.loads(result.out)
    assert data["different"] is False and len(data["cases"]) == 2
    assert sum(len(kernels["same"]) for kernels in data["cases"].values()) >= 30
    said = " ".join(result.err.split())  # long paths wrap
    assert re.fullmatch(rf"no difference from {re.escape(str(recorded))}: \d+ kernels of 2 cases", said)


@pytest.mark.slow
def test_codegen_is_deterministic_for_every_family(tmp_path: Path) -> None:
    """The same for every row of tests/families; whatever the model, its manifest keeps to the published schema.

    A few models of transformers walk through a set of strings, so that their graphs differ before we see them.
    """
    pytest.importorskip("transformers")
    sides = []
    for seed in (1, 2):
        record_in_process(here(), corpus("families"), tmp_path / str(seed), seed=seed)
        sides.append(read(tmp_path / str(seed)))
    difference = compare(*sides)
    others = {case for change in difference.changes if change.kind == "capture" for case in change.cases}
    ours = [change for change in difference.changes if not others.issuperset(change.cases)]
    assert not ours, json.dumps(Difference({}, ours[:3], [], []).to_json(), indent=1)
    assert len(others) <= 0.05 * len(difference.cases), sorted(others)
    moved = [c for c, k in difference.cases.items() if k.changed or k.added or k.removed or k.renamed]
    assert others.issuperset(moved)
    assert sum(len(kernels.same) for kernels in difference.cases.values()) > 1000
    validator = jsonschema.Draft202012Validator(schemas.load("manifest-1"))
    texts = [files["manifest.json"] for files in sides[0].files.values() if "manifest.json" in files]
    assert len(texts) > 0.8 * len(sides[0].cases)
    for text in texts:
        manifest = json.loads(text)
        files = {name: [name] * count for name, count in manifest["files"].items()}
        validator.validate({**manifest, "module": "0" * 64, "files": files})
        for kernel in manifest["kernels"]:
            assert kernel["ops"] and kernel["lines"] and kernel["made_by"] and kernel["buffers"], kernel["name"]


def test_a_recording_holds_nothing_of_its_machine(recorded: Path) -> None:
    """No absolute path, no version, no temporary name: two machines record the same."""
    import torch

    texts = [path.read_text() for path in recorded.rglob("*") if path.is_file()]
    assert len(texts) > 30
    for text in texts:
        assert str(here()) not in text and "/tmp" not in text and "site-packages" not in text
        assert torch.__version__ not in text and sys.prefix not in text


# ---- comparing -----------------------------------------------------------------------------------------------------


KERNEL = "# 4 warps, 2 stages\ndef {name}(x):\n    a = load({n})\n    b = {op}(a)\n    store(b, {n})\n"


def recording(*kernels: tuple[str, str, int], case: str = "c", **files: str) -> Recording:
    texts = {f"kernels/{name}.py": KERNEL.format(name=name, op=op, n=n) for name, op, n in kernels}
    return Recording([Case(case, "m", "p")], {case: {**texts, **files}})


def test_equal_recordings_do_not_differ() -> None:
    one = recording(("k", "exp", 4), **{"module.py": "x\n"})
    found = compare(one, one)
    assert not found and found.cases["c"].same == ["k"]


def test_one_change_in_many_kernels_is_one_change() -> None:
    """Also where sizes and names differ from kernel to kernel; another change stays another."""
    sizes = (64, 96, 128, 576)
    before = recording(*((f"k_{n}", "exp", n) for n in sizes), ("other", "sin", 8))
    after = recording(*((f"k_{n}", "exp2", n) for n in sizes), ("other", "cos", 8))
    found = compare(before, after)
    first, second = found.changes
    assert [file for _, file in first.places] == [f"k_{n}" for n in sizes]
    changed = ["-    b = exp(a)", "+    b = exp2(a)"]
    assert first.lines == [" def kernel(x):", "     a = load(64)", *changed, "     store(b, 64)"]
    assert [file for _, file in second.places] == ["other"]


def test_numbers_matter_within_a_change() -> None:
    """7 → 8 and 9 → 10 are one change, 5 → 5 + 1 is another."""
    before = recording(("k_x", "f(7)", 1), ("k_y", "f(9)", 1), ("k_z", "f(5)", 1))
    after = recording(("k_x", "f(8)", 1), ("k_y", "f(10)", 1), ("k_z", "f(5 + 1)", 1))
    found = [[file for _, file in change.places] for change in compare(before, after).changes]
    assert found == [["k_x", "k_y"], ["k_z"]]


def test_kernels_that_only_moved_are_renamed() -> None:
    before = recording(("k_1", "exp", 4), ("k_2", "sin", 4), ("gone", "tan", 4))
    after = recording(("k_1", "erf", 4), ("k_2", "exp", 4), ("k_3", "sin", 4))
    kernels = compare(before, after).cases["c"]
    assert kernels.renamed == {"k_1": "k_2", "k_2": "k_3"}
    assert (kernels.added, kernels.removed, kernels.changed) == (["k_1"], ["gone"], [])


def test_what_else_differs() -> None:
    same = ("k", "exp", 4)
    host = compare(recording(same, **{"module.py": "run(1)\n"}), recording(same, **{"module.py": "run(1, 2)\n"}))
    assert host and [c.kind for c in host.changes] == ["module"]
    failing = compare(recording(same), recording(**{"error.txt": "UserError: no\n"}))
    assert [c.lines for c in failing.changes] == [["+UserError: no"]] and failing.cases["c"].removed == ["k"]
    graph = compare(recording(same, **{"capture.txt": "mul"}), recording(same, **{"capture.txt": "div"}))
    assert [c.kind for c in graph.changes] == ["capture"]
    cases_ = compare(recording(same, case="old"), recording(same, case="new"))
    assert cases_ and (cases_.added, cases_.removed) == (["new"], ["old"])


def test_what_is_recorded_is_normalised() -> None:
    assert without_folders("no file /tmp/a-b/c.py, nor ./d/e or a/b") == "no file c.py, nor ./d/e or a/b"
    manifest = {"version": 1, "module": "abc", "files": {"m.py": ["/x/m.py"]}, "kernels": []}
    assert plain(manifest) == {"version": 1, "files": {"m.py": 1}, "kernels": []}

    class Kernel:
        num_warps, num_stages, source = 4, 2, "def k(): pass\n\n"
        signature, constants = {"x_ptr": "*fp32", "B": "constexpr"}, {"B": 8}

    assert kernel_text(Kernel) == "# 4 warps, 2 stages\n# x_ptr: *fp32\n# B: constexpr = 8\ndef k(): pass\n"


# ---- the verb ------------------------------------------------------------------------------------------------------


def test_record_then_a_change(cli: Callable, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    folder = tmp_path / "record"
    result = cli("replay", str(folder), "--record", "--corpus", str(small), "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    kernels, failed = data["kernels"], data["failed"]
    assert sorted(kernels.values()) == [0, 4] and "not today" in str(failed)
    assert "recorded 4 kernels of 2 cases" in result.err and f"fuseline replay {folder}\n" in result.err
    assert cli("replay", str(folder)).code == 0
    case = next(case for case, count in kernels.items() if count)
    for name in ("run_linear_0_row", "run_linear_1_row"):  # as if the code had emitted something else then
        path = folder / case / "kernels" / f"{name}.py"
        path.write_text(path.read_text().replace("tl.program_id(0)", "tl.program_id(1)", 1))
    (folder / case / "kernels" / "run_linear_1_tile.py").rename(folder / case / "kernels" / "run_linear_9_tile.py")
    differing = cli("replay", str(folder), "--json", "-")
    assert differing.code == 1
    data = json.loads(differing.out)
    assert data["cases"][case]["changed"] == ["run_linear_0_row", "run_linear_1_row"]
    (change,) = (c for c in data["changes"] if c["kind"] == "kernel")
    assert [place[1] for place in change["places"]] == ["run_linear_0_row", "run_linear_1_row"]
    assert max(len(line) for line in differing.err.splitlines() if not line.startswith("  ")) <= 80
    assert "in 2 kernels of 1 case: run_linear_0_row, run_linear_1_row" in differing.err
    assert differing.err.count("-    ") == 1 and "+    row = tl.program_id(0)" in differing.err


def test_an_older_recording_is_replaced_and_nothing_else(
    cli: Callable, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    small.write_text('models = ["py:replay_models:broken"]\n')
    folder = tmp_path / "record"
    for _ in range(2):
        assert cli("replay", str(folder), "--record", "--corpus", str(small)).code == 0
    assert sorted(p.name for p in folder.iterdir()) == ["py_replay_models_broken__raise_fuse", "replay.json"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".record")], "nothing half written is left"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    result = cli("replay", str(other), "--record", "--corpus", str(small))
    assert result.code == 2 and "is there and no recording: nothing was written" in result.err
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_mistakes(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("models = 3")
    (tmp_path / "worse.toml").write_text("models = ")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "replay.json").write_text('{"version": 1, "cases": [{"folder": "a"}]}')
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "replay.json").write_text('{"version": 2}')
    for arguments, message in (
        ((), "replay takes DIR, or --against REV"),
        (("d", "--against", "main"), "replay takes DIR, or --against REV"),
        (("--against", "main", "--record"), "replay takes DIR, or --against REV"),
        (("d", "--corpus", "tiny"), "DIR knows its corpus"),
        ((str(tmp_path),), f"is no recording: it has no replay.json\n  try: fuseline replay {tmp_path} --record"),
        ((str(tmp_path / "damaged"),), "is a damaged recording"),
        ((str(tmp_path / "newer"),), "is a recording of version 2, not 1"),
        (("d", "--record", "--corpus", "tyni"), "no corpus 'tyni'; did you mean 'tiny'?"),
        (("d", "--record", "--corpus", str(tmp_path / "bad.toml")), "'models' is not a list of strings"),
        (("d", "--record", "--corpus", str(tmp_path / "worse.toml")), "is no TOML file"),
    ):
        result = cli("replay", *arguments)
        assert result.code == 2 and message in result.err, result.err


def test_a_commit_that_is_not_there(cli: Callable) -> None:
    if not (here() / ".git").exists():
        pytest.skip("no git checkout")
    result = cli("replay", "--against", "no-such-branch")
    assert result.code == 2 and "no commit 'no-such-branch' in" in result.err
    assert cli("replay", "--against", "--help").code == 2, "an option is no revision"


def test_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fuseline.replay.against.here", lambda: tmp_path)
    with pytest.raises(UserError, match="--against needs a git checkout"):
        commit_of("HEAD")


def test_a_recorder_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(FuselineError, match="could not be recorded") as caught:
        record_in_process(tmp_path, [], tmp_path / "out")
    assert "the package came from" in str(caught.value)
    with pytest.raises(UserError, match="is no recording"):
        read(tmp_path / "out")


def test_the_corpora() -> None:
    tiny = corpus("tiny")
    assert len(tiny) == len({case.folder for case in tiny}) >= 4 and tiny[0].model == "demo:tiny-decoder"
    pytest.importorskip("transformers")
    assert len(corpus("families")) > 100


@pytest.mark.slow
def test_one_command_against_a_commit(tmp_path: Path) -> None:
    """In a repository of its own: no difference at first, then one change of a helper, shown once with its count."""
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copytree(PACKAGE, clone / "fuseline", ignore=shutil.ignore_patterns("__pycache__"))
    git = lambda *words: subprocess.run(
        ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "before")
    (tmp_path / "corpus.toml").write_text('models = ["demo:tiny-decoder"]\npipelines = ["raise,fuse"]\n')
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def replay() -> tuple[int, str, dict]:
        command = [sys.executable, "-m", "fuseline", "replay", "--against", "HEAD", "--corpus",
                   str(tmp_path / "corpus.toml"), "--json", "-"]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(clone), "TMPDIR": str(temporary)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1) and done.stdout, done.stderr
        return done.returncode, done.stderr, json.loads(done.stdout)

    code, said, data = replay()
    assert code == 0 and "no difference from HEAD" in said, said
    helper = clone / "fuseline" / "codegen" / "templates" / "gemv.py"
    text = helper.read_text()
    assert text.count("neighbours read the same weights") == 1
    helper.write_text(text.replace("neighbours read the same weights", "neighbours share their weights"))
    code, said, data = replay()
    assert code == 1
    (case,) = data["cases"].values()
    assert len(case["changed"]) == 5 and all(name.endswith("_row") for name in case["changed"])
    (change,) = data["changes"]
    assert len(change["places"]) == 5 and said.count("neighbours share") == 1 and "in 5 kernels of 1 case" in said
    assert git("status", "--porcelain").split() == ["M", "fuseline/codegen/templates/gemv.py"]
    assert git("worktree", "list").count("\n") == 1
    assert not [p for p in temporary.iterdir() if p.name.startswith("fuseline")], "nothing of ours is left behind"
