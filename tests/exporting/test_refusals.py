"""What a checkpoint cannot hold is refused, with the place, the reason, and the nearest pipeline that works."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.expressions import Constant
from fuseline.compiler.precision import error
from fuseline.exporting.parameters import assign
from fuseline.exporting.planning import plan
from fuseline.exporting.rotations import Matrix, folded, peel
from fuseline.exporting.unify import Use, unify
from tests.passes.rotated_models import VOCABULARY, Decoder, Norm, Shape, shapes

pytest.importorskip("transformers")

from tests.exporting.plain import logits, model_of
from tests.families.decoders import build


def refused(model: nn.Module, pipeline: str, path: Path) -> UserError:
    with pytest.raises(UserError) as raised:
        fuseline.export(model, path / "out", pipeline)
    assert not (path / "out").exists()
    return raised.value


CASES = {
    "r1 of tied tables": (
        lambda: build("LlamaConfig", tie_word_embeddings=True),
        "raise,rotate{r1,r2}",
        r"a rotation by hadamard, blocks of 64 at run time",
        "raise,rotate{r1,r2,untie}",
    ),
    "layer norms": (
        lambda: model_of("GPT-2"),
        "raise,rotate{r1,r2,untie}",
        r"the model:     linear\(.*\n.*after rotate/R1 into columns",
        "raise,rotate{r2}",
    ),
    "codes": (
        lambda: model_of("Llama"),
        "raise,rotate{r2},quantize{weights=int8}",
        r"'model.layers.0.self_attn.q_proj.weight' is quantized \(int8:sym\)",
        "raise,rotate{r2}",
    ),
    "r4 of stacked experts": (
        lambda: model_of("Mixtral, grouped_mm"),
        "raise{experts=false},rotate{r1,r4,untie}",
        r"experts/.*its weight model.layers.0.mlp.experts.down_proj is no nn.Linear's",
        "raise{experts=false},rotate{r1,untie}",
    ),
    "a size without a matrix": (
        lambda: build("LlamaConfig", intermediate_size=94),
        "raise,rotate{r2,r4}",
        "compressed-tensors has no matrix of that size",
        "raise,rotate{r2}",
    ),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_a_pipeline_that_works(case: str, tmp_path: Path) -> None:
    make, pipeline, reason, remedy = CASES[case]
    model = make().eval()
    error_ = refused(model, pipeline, tmp_path)
    assert re.search(reason, str(error_)), str(error_)
    assert error_.remedy == f'-p "{remedy}"'
    fuseline.export(model, tmp_path / "out", remedy, check=False)


def test_a_pipeline_that_changes_nothing(tmp_path: Path) -> None:
    assert "changes no weight" in str(refused(model_of("Llama"), "raise,fuse", tmp_path))


def test_other_models_and_formats(tmp_path: Path) -> None:
    error_ = refused(nn.Linear(2, 2), "raise,rotate{r2}", tmp_path)
    assert "Linear is no class of transformers" in str(error_)
    with pytest.raises(UserError, match="unknown format 'gguf'"):
        fuseline.export(model_of("Llama"), tmp_path / "out", "raise,rotate{r2}", format="gguf")


def test_a_model_that_was_loaded_quantized(tmp_path: Path) -> None:
    model = model_of("Llama")
    model.config.quantization_config = {"quant_method": "awq"}
    assert "was loaded with quantized weights" in str(refused(model, "raise,rotate{r2}", tmp_path))


@pytest.mark.slow
def test_dropped_originals(tmp_path: Path) -> None:
    model = fuseline.optimize(model_of("Llama"), "raise,rotate{r2}", keep_originals=False)
    logits(model)
    with pytest.raises(UserError, match="values of 4 weights were dropped"):
        fuseline.export(model, tmp_path / "out")


class Twice(nn.Module):
    """One linear behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.first, self.second = Norm(Shape(width=8)), Norm(Shape(width=8))
        self.shared = nn.Linear(8, 8, bias=False)
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return torch.tanh(self.shared(self.first(x))) + torch.sin(self.shared(self.second(x)))


def test_one_parameter_with_two_values() -> None:
    model = Twice()
    with pytest.raises(UserError) as raised:
        plan(model, fuseline.capture(model, (IDS,)), Pipeline("raise,rotate{r1}"))
    text = str(raised.value)
    assert "'shared.weight' is read in several places" in text
    assert "shared/linear#0: " in text and "shared/linear#1: " in text
    assert "scale(cast(shared.weight), first.weight)" in text and "second.weight" in text


IDS = torch.arange(10).reshape(2, 5) % VOCABULARY


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes, st.sampled_from(("hadamard", "random-hadamard", "orthogonal")), st.booleans())
def test_the_solution_is_the_model_or_refused(shape: Shape, kind: str, untie: bool) -> None:
    """In float64, on models of every shape: a copy with the solved parameters computes the same."""
    model = Decoder(shape)
    options = f"r1,r2,kind={kind},seed=3{',untie' if untie else ''},allow_empty"
    captured = fuseline.capture(model, (IDS,))
    try:
        found = plan(model, captured, Pipeline(f"raise{{allow_empty}},rotate{{{options}}}")).assignment
    except UserError as reason:
        assert "cannot hold" in reason.headline or "changes no weight" in reason.headline
        return
    again, state = copy.deepcopy(model), model.state_dict()
    if found.untied:
        again.head.weight = nn.Parameter(again.head.weight.detach().clone())
    again.load_state_dict({n: found.evaluate(n, t) if n in found.values else t for n, t in state.items()})
    with torch.no_grad():
        assert error(again(IDS), model(IDS)) < 1e-10


def test_a_tensor_of_the_code_stays_as_it_is() -> None:
    model = Decoder(Shape())
    written, other = (Constant((n,), (), torch.float32, "cpu") for n in (1.0, 2.0))
    captured = fuseline.capture(model, (IDS,))
    assert not assign(model, captured, [Use("norm/mul#0", "norm", written, written)]).values
    with pytest.raises(UserError, match="a tensor that the model's code writes down, read at norm/mul#0"):
        assign(model, captured, [Use("norm/mul#0", "norm", written, other)])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "orthogonal"])
@pytest.mark.parametrize("block", [0, 4])
def test_rotations_are_read_back(kind: str, block: int) -> None:
    """From the expressions and, for r4, from the graph."""
    model = Decoder(Shape(width=12, inner=20))
    options = f"r1,r2,r4,kind={kind},seed=3,block={block}"
    found, _ = Pipeline(f"raise,rotate{{{options}}}").run(fuseline.capture(model, (IDS,)))
    seed = None if kind == "hadamard" else 3
    expected = {Matrix(kind, size, seed) for size in (block or 12, 6, block or 20)}
    assert {matrix for node in found.weights() for matrix, _ in folded(node.meta["weight"])} == expected
    online = {one.matrix for node in found.graph.nodes if (one := peel(node)) is not None}
    assert online == {Matrix(kind, block or 20, seed)}


def test_a_copy_needs_no_values() -> None:
    """Solving a graph against itself finds nothing to change."""
    model = Decoder(Shape())
    captured = fuseline.capture(model, (IDS,))
    found = unify(captured, captured.copy())
    assert found.uses and not found.online and not assign(model, captured, found.uses).values
