"""A stage's file, read back: the same program, edits included; and what each slip of an edit is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pipeline, Program, UserError
from fuseline.compiler.observe import Dump
from fuseline.compiler.precision import error, floats
from fuseline.compiler.provenance import makers, module_path, source_line
from fuseline.compiler.stage import Recipe, is_stage, load_stage, render
from fuseline.compiler.stage.tensors import placed
from fuseline.compiler.structure import same_structure
from fuseline.compiler.verifier import verify
from tests.helpers.models import Mlp, Tied, tiny_llama

aten = torch.ops.aten


def dumped(program: Program, folder: Path, pipeline: str = "quantize{weights=int8},fuse") -> list[Path]:
    Pipeline(pipeline).run(program, [Dump(folder)])
    return sorted(folder.glob("*.py"))


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic={"x": {0: torch.export.Dim.AUTO}})


def written(program: Program, folder: Path, recipe: Recipe | None = None) -> Path:
    path = folder / "stage.py"
    path.write_text(render(program, "a stage", recipe or Recipe("embedded")))
    return path


def test_every_stage_reads_back_and_goes_on_from_there(mlp: Program, tmp_path: Path) -> None:
    first, quantized, fused = dumped(mlp, tmp_path)
    at_once, _ = Pipeline("quantize{weights=int8},fuse").run(load_stage(first))
    resumed, _ = Pipeline("fuse").run(load_stage(quantized))
    assert same_structure(renamed(resumed, tmp_path), renamed(load_stage(fused), tmp_path))
    assert same_structure(renamed(at_once, tmp_path), renamed(resumed, tmp_path))
    for path in (first, quantized, fused):
        program = load_stage(path)
        verify(program, "full")
        for length in (4, 7):  # the size at capture, and another: the batch is still a symbol
            flat = [*program.examples[:-1], torch.randn(length, 8)]
            bound = 0.05 if path is not first else 0.0
            assert error(floats(program.run(flat))[0], floats(mlp.run(flat))[0]) <= bound


def renamed(program: Program, folder: Path) -> Program:
    """The program with the symbols' names that a stage gives them."""
    return load_stage(written(program, folder, Recipe("none")))


def test_what_is_read_renders_as_it_was_written(mlp: Program, tmp_path: Path) -> None:
    for path in dumped(mlp, tmp_path):
        text = path.read_text()
        title = text.partition('"""')[2].partition("\n")[0]
        assert render(load_stage(path), title, Recipe("file"), path.name) == text


def test_what_is_read_has_the_structure_that_was_written(tmp_path: Path) -> None:
    program = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    for pipeline in ("raise", "quantize{weights=int8},fuse"):
        after, _ = Pipeline(pipeline).run(program)
        assert same_structure(load_stage(written(after, tmp_path)), after)


def test_provenance_is_kept(mlp: Program, tmp_path: Path) -> None:
    *_, fused = dumped(mlp, tmp_path)
    before, after = Pipeline("quantize{weights=int8},fuse").run(mlp)[0], load_stage(fused)
    describe = lambda n: (source_line(n), module_path(n), makers(n))
    kept = {n.name: describe(n) for n in after.graph.nodes if n.op == "call_module"}
    assert kept == {n.name: describe(n) for n in before.graph.nodes if n.op == "call_module"}
    assert all(line and chain for line, _, chain in kept.values())


def test_an_edit_by_hand_changes_the_program(mlp: Program, tmp_path: Path) -> None:
    path = dumped(mlp, tmp_path)[0]
    edited = path.read_text().replace("torch.ops.aten.silu.default(linear)", "3 / linear")
    path.write_text(edited)
    with pytest.raises(UserError, match="this operator is not defined for these operands"):
        load_stage(path)
    path.write_text(edited.replace("3 / linear", "1 + torch.ops.aten.relu(linear) * 2"))
    program = load_stage(path)
    (linear,) = [n for n in program.graph.nodes if n.name == "linear"]
    assert [n.target for n in linear.users] == [aten.relu.default]
    assert [n.target for n in program.graph.nodes if n.name == "silu"] == [aten.add.Tensor]


def test_lines_for_debugging_are_passed_over(mlp: Program, tmp_path: Path) -> None:
    path = dumped(mlp, tmp_path)[0]
    before = load_stage(path)
    path.write_text(path.read_text().replace("        silu =", "        print(linear.sum())\n        silu ="))
    assert same_structure(renamed(load_stage(path), tmp_path), renamed(before, tmp_path))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("aten.silu.default(", "aten.sillu.default(", r"stage.py:\d+: there is no torch.ops.aten.sillu"),
        ("torch.ops.aten.silu.default(", "torch.relu(", "'torch.relu' is not an op of a stage\n  try: torch.ops.aten"),
        ("torch.ops.aten.silu.default(linear)", "linear.relu()", "calls ops, not methods"),
        ("silu.default(linear)", "silu.default(lineer)", "'lineer' is not defined here; did you mean 'linear'"),
        ("silu.default(linear)", "sum(linear)", "name the overload\n  try: torch.ops.aten.sum.dim_IntList or"),
        ("silu.default(linear)", "transpose.int(linear, 0, 5)", "does not fit its arguments\n  IndexError"),
        ("        return (", "        (", "the method returns nothing"),
        ("        silu = ", "        if True: pass\n        silu = ", "holds assignments of calls"),
        ("def forward(self, x, ", "def forward(self, y, ", "takes 'y', which is no input and no weight"),
        ("def forward(self, x, ", "def forward(self, ", "leaves out 'x'"),
        ("silu = ", "silu := ", "is not Python"),
        ("STAGE = {", "STAGES = {", "not a dumped stage: it has no STAGE"),
        ("{'format': 1", "{'format': 99", "is a stage of format 99, and this version reads format 1"),
    ],
)  # fmt: skip
def test_a_slip_is_told_with_its_line(mlp: Program, tmp_path: Path, before: str, after: str, message: str) -> None:
    path = written(mlp, tmp_path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=message):
        load_stage(path)


def test_a_region_named_like_a_weight_is_told(mlp: Program, tmp_path: Path) -> None:
    path = written(mlp, tmp_path)
    text = path.read_text().replace("torch.ops.aten.silu.default(linear)", "self.norm(linear)")
    method = "    def norm(self, x):\n        y = torch.ops.aten.silu.default(x)\n        return y\n"
    path.write_text(text.replace("\n\n\nSTAGE = {", f"\n\n{method}\n\nSTAGE = {{"))
    with pytest.raises(UserError, match=r"stage.py:\d+: the method 'norm' has the name of a weight: call it something"):
        load_stage(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('hello')")
    assert not is_stage(tmp_path / "train.py") and not is_stage(tmp_path / "absent.py")
    with pytest.raises(UserError, match="is not a dumped stage"):
        load_stage(tmp_path / "train.py")
    with pytest.raises(UserError, match="no such file"):
        load_stage(tmp_path / "absent.py")


def test_opening_a_strangers_stage_runs_nothing(mlp: Program, tmp_path: Path) -> None:
    path = written(mlp, tmp_path)
    mark = tmp_path / "ran"
    path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text())
    load_stage(path)
    assert not mark.exists()


def test_values_from_the_text_or_from_a_seed(mlp: Program, tmp_path: Path) -> None:
    embedded = load_stage(written(mlp, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(embedded.examples, mlp.examples))
    drawn = [load_stage(written(mlp, tmp_path, Recipe("random", seed=3))).examples for _ in range(2)]
    for first, second, original in zip(*drawn, mlp.examples):
        assert torch.equal(first, second) and first.shape == original.shape and not torch.equal(first, original)
        if original.numel() > 8:
            assert 0.5 < first.std() / original.std() < 2
    with pytest.raises(UserError, match="too many to write into one file"):
        big = fuseline.capture(torch.nn.Linear(1024, 1025), (torch.randn(1, 1024),))
        written(big, tmp_path)


def test_values_go_where_the_entries_say() -> None:
    flat = placed([torch.ones(2), 3, torch.ones(1)], [{"index": 0, "device": "meta"}, {"index": 1}, {"index": 2}])
    assert flat[0].is_meta and flat[1] == 3 and flat[2].device.type == "cpu"


class Cache(torch.nn.Module):
    """A step that writes into its cache, reads it, and returns a slice of it."""

    def forward(self, cache: torch.Tensor, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, at, x)
        return cache[1:] * 2


def test_a_written_input_stays_one(tmp_path: Path) -> None:
    inputs = (torch.zeros(5, 3), torch.ones(1, 3), torch.tensor([2]))
    program = fuseline.capture(Cache(), inputs)
    again = load_stage(written(program, tmp_path))
    assert again.mutated == program.mutated == {"cache"}
    marked = lambda p: [bool(n.meta.get("written")) for n in p.graph.nodes]
    assert marked(again) == marked(program) and any(marked(again))
    flat = [x.clone() for x in inputs]
    again.run(flat)
    assert torch.equal(flat[0][2], torch.ones(3))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    program = fuseline.capture(Tied(12, 4), (torch.tensor([1, 2]),))
    again = load_stage(written(program, tmp_path))
    assert [n.meta["weight"] for n in again.weights()] == [n.meta["weight"] for n in program.weights()]
    assert set(again.sources) == set(program.sources)


def test_a_whole_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ids = torch.tensor([[1, 2, 3, 4]])
    program = fuseline.capture(tiny_llama(num_hidden_layers=1), (ids,), {"use_cache": False})
    for path in dumped(program, tmp_path, "raise,quantize{weights=int8},fuse"):
        again = load_stage(path)
        verify(again, "full")
        assert error(floats(again.run(again.examples))[0], floats(program.run(program.examples))[0]) < 0.1
