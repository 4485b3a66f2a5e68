"""keep_originals=False: what is dropped, that results stay the same to the bit, and what the model then refuses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import UserError
from fuseline.codegen.lower import lower
from fuseline.compiler.expand import decode_in_blocks, dequantize_in_blocks, expand_at_use
from fuseline.compiler.expressions import Cast, Concat, Constant, Output, Pack, Param, Quantize, Scale
from fuseline.compiler.observe import Numerics
from fuseline.compiler.ops import decode, dequantize, encode
from fuseline.compiler.outline import inline
from fuseline.compiler.schemes import Scheme
from fuseline.compiler.weights import STORE, WeightStore, stand_in
from fuseline.originals import dropped
from tests.helpers.models import Mlp, Tied, error, tiny_llama

INT8, INT4 = "quantize{weights=int8}", "raise{allow_empty},quantize{weights=int4:g4},fuse{allow_empty}"


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def small(pipeline: str = INT8, **settings) -> torch.nn.Module:
    """A called model without originals."""
    torch.manual_seed(0)
    model = fuseline.optimize(Mlp(), pipeline, keep_originals=False, **settings)
    with torch.no_grad():
        model(torch.ones(1, 8))
    return model


def bytes_of(model: torch.nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@torch.no_grad()
@pytest.mark.one_in(3)
@pytest.mark.parametrize("pipeline", [INT8, INT4, "quantize{weights=int8,activations=int8}"])
def test_the_same_bits_without_originals(pipeline: str) -> None:
    kept, lean = Mlp(), Mlp()
    lean.load_state_dict(kept.state_dict())
    fuseline.optimize(kept, pipeline)
    fuseline.optimize(lean, pipeline, keep_originals=False)
    for rows in (3, 1, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(kept(x), lean(x))
    assert sorted(dropped(lean)) == ["down.weight", "gate.weight", "up.weight"] and not dropped(kept)
    assert bytes_of(lean) == bytes_of(kept) - 3 * 8 * 16 * 4 + 3 * 4


def test_a_dropped_parameter_is_still_itself() -> None:
    torch.manual_seed(0)
    model = Mlp()
    weight = model.up.weight
    fuseline.optimize(model, INT8, keep_originals=False)
    assert not dropped(model)  # until the first call is over
    with torch.no_grad():
        model(torch.ones(1, 8))
    assert model.up.weight is weight and dict(model.named_parameters())["up.weight"] is weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((16, 8), torch.float32, "cpu")
    assert weight.isnan().all() and weight.untyped_storage().nbytes() == 4
    assert model.up.bias.isfinite().all()  # read as it is


@torch.no_grad()
@pytest.mark.slow
def test_the_decode_loop_is_compiled_once_more_at_most() -> None:
    """Dynamo guards strides, so the graph that was compiled before the drop is compiled again, and no other."""
    ids = torch.arange(8)[None]
    settings = {"max_new_tokens": 5, "do_sample": False}
    kept = fuseline.optimize(tiny_llama(num_hidden_layers=1), "quantize{weights=int8}")
    expected = [kept.generate(ids, **settings) for _ in range(3)]
    count = len(fuseline.reports(kept))
    torch.compiler.reset()
    lean = fuseline.optimize(tiny_llama(num_hidden_layers=1), "quantize{weights=int8}", keep_originals=False)
    seen = []
    for tokens in expected:
        assert torch.equal(lean.generate(ids, **settings), tokens)
        seen.append(len(fuseline.reports(lean)))
    assert seen == [count, count + 1, count + 1]


@torch.no_grad()
def test_a_tied_weight_that_is_read_as_it_is_stays() -> None:
    model = fuseline.optimize(Tied(), "quantize{weights=int8,only=head|body}", keep_originals=False)
    model(torch.arange(4))
    assert list(dropped(model)) == ["body.weight"]
    assert model.head.weight is model.embed.weight and model.embed.weight.isfinite().all()


class Either(torch.nn.Module):
    """Reads its weight in a linear, or as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, plainly: bool = False) -> torch.Tensor:
        return x * self.body.weight if plainly else F.linear(x, self.body.weight)


@torch.no_grad()
def test_a_later_graph_that_reads_a_dropped_weight_as_it_is_is_refused() -> None:
    model, x = fuseline.optimize(Either(), "quantize{weights=int8,allow_empty}", keep_originals=False), torch.ones(8, 8)
    expected = model(x)
    with pytest.raises(Exception, match="weight 'body.weight' is read as it is, and its values were dropped") as caught:
        model(x, plainly=True)
    assert "load the original model again, and keep its originals" in str(caught.value)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_weight_that_one_graph_of_the_first_call_reads_as_it_is_stays() -> None:
    class Both(Either):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(h, plainly=True)

    model, x = Both(), torch.rand(8, 8)
    reference = model(x)
    fuseline.optimize(model, "quantize{weights=int8,allow_empty}", keep_originals=False)
    for _ in range(2):
        assert 0 < error(model(x), reference) < 0.05
    assert len(fuseline.reports(model)) == 2 and not dropped(model)


REFUSED: list[tuple[Callable[[torch.nn.Module], object], str, str]] = [
    (lambda m: m.state_dict(), "cannot give a state_dict()", "fuseline.save(model, path)"),
    (lambda m: m.up.state_dict(), "cannot give a state_dict()", "fuseline.save(model, path)"),
    (lambda m: torch.nn.Sequential(m).state_dict(), "the values of '0.gate.weight'", "fuseline.save(model, path)"),
    (lambda m: m.train(), "cannot be trained", "without keep_originals=False"),
    (lambda m: torch.nn.Sequential(m).train(), "cannot be trained", "without keep_originals=False"),
    (lambda m: m.half(), "cannot be converted to torch.float16", "before fuseline.optimize"),
    (lambda m: m.to("cpu", torch.bfloat16), "cannot be converted to torch.bfloat16", "before fuseline.optimize"),
    (lambda m: torch.nn.Sequential(m).double(), "cannot be converted to torch.float64", "before fuseline.optimize"),
    (lambda m: m.to("meta"), "cannot be moved to the device 'meta'", "model.to(device) does work"),
    (lambda m: copy.deepcopy(m), "cannot be copied or pickled", "fuseline.load(path) for each copy"),
    (lambda m: copy.copy(m), "cannot be copied or pickled", "fuseline.load(path) for each copy"),
    (lambda m: torch.save(m, io.BytesIO()), "cannot be copied or pickled", "fuseline.load(path) for each copy"),
    (lambda m: m.load_state_dict(Mlp().state_dict()), "cannot take a state_dict in place", "assign=True"),
    (lambda m: Mlp.forward(m, torch.ones(1, 8)), "cannot run Linear outside of a compiled graph", "call the model"),
    (lambda m: fuseline.analyze(m, INT8, [torch.ones(1, 8)]), "read as it is, and its values were dropped", "again"),
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("use", "message", "remedy"), REFUSED)
def test_what_needs_the_originals_is_refused(use, message: str, remedy: str) -> None:
    model, x = small(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(UserError) as caught:
            use(model)
        assert message in str(caught.value) and remedy in str(caught.value)
        assert torch.equal(model(x), expected)  # and nothing is changed


def test_gradients_of_dropped_weights_are_refused() -> None:
    with pytest.raises(Exception, match="its weight wants a gradient"):
        small()(torch.ones(1, 8))


def test_gradients_of_inputs_pass_through_frozen_weights() -> None:
    torch.manual_seed(0)
    kept = Mlp().requires_grad_(False)
    lean = copy.deepcopy(kept)
    gradients = []
    for model, keep in ((kept, True), (lean, False)):
        fuseline.optimize(model, INT8, keep_originals=keep)
        with torch.no_grad():
            model(torch.ones(2, 8))
        x = torch.arange(16.0).reshape(2, 8).requires_grad_()
        model(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    assert dropped(lean)


@torch.no_grad()
def test_what_still_works() -> None:
    model, x = small(), torch.randn(2, 8)
    expected, count = model(x), len(fuseline.reports(model))
    assert model.eval() is model and not model.training
    assert model.to("cpu") is model and model.float() is model
    fuseline.refresh(model)
    assert torch.equal(model(x), expected) and len(fuseline.reports(model)) == count
    assert len(list(model.parameters())) == 6 and dropped(model)


@torch.no_grad()
def test_new_weights_make_it_an_ordinary_model_until_the_next_call() -> None:
    model, other, x = small(), Mlp(), torch.randn(2, 8)
    model.load_state_dict(other.state_dict(), assign=True)
    assert not dropped(model)
    plain = copy.deepcopy(model)
    assert torch.equal(plain(x), other(x)) and plain.train().training
    assert torch.equal(model(x), fuseline.optimize(other, INT8)(x))
    assert len(dropped(model)) == 3


@torch.no_grad()
def test_another_pipeline_cannot_have_what_was_not_derived() -> None:
    model = fuseline.optimize(small(), "quantize{weights=int4:g4}", keep_originals=False)
    with pytest.raises(Exception, match="the values of weight '.*' were dropped") as caught:
        model(torch.ones(1, 8))
    text = str(caught.value)
    assert "needed: pack(codes(quantize(" in text and "int4:g4:asym" in text and "int8:sym" in text
    assert "load the original model again" in text


@torch.no_grad()
def test_the_same_pipeline_can_be_asked_for_again_and_expands_what_is_held() -> None:
    model, x = small(), torch.randn(2, 8)
    expected = model(x)
    assert torch.equal(fuseline.optimize(model, INT8)(x), expected)  # dequantized once, from the codes


@torch.no_grad()
def test_numerics_need_the_originals() -> None:
    model = fuseline.optimize(small(), INT8, observers=[Numerics()], keep_originals=False)
    with pytest.raises(Exception, match="read as it is, and its values were dropped"):
        model(torch.ones(1, 8))


def test_the_plain_backend_refuses_and_says_why() -> None:
    compiled = torch.compile(Mlp(), backend="fuseline", options={"keep_originals": False})
    with pytest.raises(Exception, match="backend 'fuseline' cannot drop originals: it sees parameters") as caught:
        compiled(torch.ones(1, 8))
    assert "fuseline.optimize(model, pipeline, keep_originals=False)" in str(caught.value)


@torch.no_grad()
@pytest.mark.slow
def test_a_decorated_class_drops_too() -> None:
    @fuseline.optimize(INT8, keep_originals=False)
    class Net(Mlp):
        pass

    first, second, x = Net(), Net(), torch.randn(2, 8)
    expected = [fuseline.optimize(_plain(m), INT8)(x) for m in (first, second)]
    for model, reference in zip((first, second), expected, strict=True):
        assert torch.equal(model(x), reference) and len(dropped(model)) == 3


def _plain(model: torch.nn.Module) -> Mlp:
    plain = Mlp()
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def test_what_another_pipeline_derived_is_let_go() -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.ones(1, 8)
    fuseline.optimize(model, INT4)(x)
    fuseline.optimize(model, INT8, keep_originals=False)(x)
    held = STORE.held(list(model.parameters()))
    assert len(held) == 6 and {value.dtype for _, _, value in held} == {torch.int8, torch.float32}


@torch.no_grad()
def test_kernels_do_not_depend_on_what_was_dropped() -> None:
    model = small("raise{allow_empty},quantize{weights=int8},fuse")
    model(torch.ones(1, 8))  # compiled again, over stand-ins with strides of 0
    before, after = (lower(compilation.program) for compilation in fuseline.reports(model))
    assert before.source == after.source and before.kernels


# Expanding where it is used


@torch.no_grad()
def test_one_weight_is_expanded_at_a_time() -> None:
    model = fuseline.optimize(Mlp(), INT4)
    model(torch.ones(1, 8))
    module, _ = fuseline.reports(model)[0].program.lift()
    graph = expand_at_use(inline(module)).graph
    expansions = [n for n in graph.nodes if n.target is dequantize_in_blocks]
    assert len(expansions) == 3 and all(n.next in n.users for n in expansions)


@pytest.mark.parametrize(
    "scheme", [Scheme("int8"), Scheme("int8", 16, False), Scheme("int4", 32), Scheme("int4", 16, False)]
)
@pytest.mark.parametrize("shape", [(700, 64), (3, 200, 64), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_the_same_bits(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch) -> None:
    from fuseline.compiler import expand

    monkeypatch.setitem(expand.BLOCK, "cpu", 64 * 100)
    parts = scheme.quantize(torch.randn(shape, dtype=dtype))
    given = scheme.pack(parts["codes"]), parts["scale"], parts.get("zero"), scheme.bits, scheme.group_of(64), dtype
    assert torch.equal(dequantize_in_blocks(*given), dequantize.naive(*given))


@pytest.mark.parametrize("text", ["int3:g16", "mxfp4", "nvfp4", "fp8:b16", "ternary"])
def test_blocks_of_any_format_give_the_same_bits(text: str, monkeypatch) -> None:
    from fuseline.compiler import expand

    monkeypatch.setitem(expand.BLOCK, "cpu", 64 * 100)
    scheme = Scheme.parse(text, weights=True)
    parts = scheme.quantize(torch.randn(704, 64))
    given = scheme.pack(parts["codes"]), parts["scale"], parts.get("zero"), parts.get("outer"), scheme.format
    given = *given, scheme.group_of(64), True, torch.float32
    assert torch.equal(decode_in_blocks(*given), decode.naive(*given))
    codes, scale = encode.naive(torch.randn(3, 64), "e4m3", 0)  # one scale for all rows
    given = codes, scale, None, None, "e4m3", 64, False, torch.float32
    assert torch.equal(decode_in_blocks(*given), decode.naive(*given))


# The store


def weight(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([values], dtype=torch.float32), requires_grad=False)


W = Param("w")
TWICE = Scale(W, Constant((2.0,), (1,), torch.float32, "cpu"), 0)


def test_an_entry_stays_valid_when_its_parameter_is_dropped() -> None:
    store, w = WeightStore(), weight(1, 2)
    value = store.get(TWICE, [w])
    store.drop([w])
    assert store.dropped(w) and store.get(TWICE, [w]) is value and w.isnan().all()
    store.forget([w])
    store.forget()
    assert store.get(TWICE, [w]) is value


def test_what_was_not_derived_is_asked_for_by_name() -> None:
    store, w = WeightStore(), weight(1, 2)
    store.get(TWICE, [w])
    store.drop([w])
    with pytest.raises(UserError) as caught:
        store.get(Cast(W, torch.float64).rename({"w": "layers.0.up.weight"}), [w])
    text = str(caught.value)
    assert "the values of weight 'layers.0.up.weight' were dropped" in text
    assert "needed: cast(layers.0.up.weight)" in text and "held: scale(layers.0.up.weight, constant())" in text


def test_what_is_held_may_be_part_of_what_is_asked_for() -> None:
    store, w = WeightStore(), weight(1, 2)
    store.get(TWICE, [w])
    store.drop([w])
    assert store.get(Cast(TWICE, torch.float64), [w]).tolist() == [[2, 4]]
    other = weight(7, 8)
    assert store.get(Concat((TWICE, Param("b")), 0), [w, other]).tolist() == [[2, 4], [7, 8]]


def test_entries_over_several_parameters_survive_the_drop_of_one() -> None:
    store, first, second = WeightStore(), weight(1), weight(2)
    value = store.get(Concat((W, Param("b")), 0), [first, second])
    store.drop([second])
    assert store.get(Concat((W, Param("b")), 0), [first, second]) is value
    first.fill_(5)  # what was derived is of the old values, and cannot be derived again
    with pytest.raises(UserError, match="the values of weight 'b' were dropped"):
        store.get(Concat((W, Param("b")), 0), [first, second])


def test_new_values_end_the_drop() -> None:
    store, w = WeightStore(), weight(1, 2)
    store.get(TWICE, [w])
    store.drop([w])
    w.data = torch.tensor([[3.0, 4.0]])
    assert not store.dropped(w) and store.get(TWICE, [w]).tolist() == [[6, 8]]


def test_a_value_can_be_adopted() -> None:
    store, w = WeightStore(), torch.nn.Parameter(stand_in((1, 4), torch.float32, "cpu"), requires_grad=False)
    store.drop([w])
    scheme = Scheme("int4", 4, False)
    codes = Pack(Output(Quantize(W, scheme), "codes"), scheme)
    value = torch.tensor([[1, 2]], dtype=torch.uint8)
    store.adopt(codes, [w], value)
    assert store.get(codes.rename({"w": "anything"}), [w]) is value
    assert store.held([w]) == [(codes.rename({"w": "$0"}), (w,), value)]
    with pytest.raises(UserError, match=r"needed: scale\(quantize\(w, int4:g4:asym\)\)"):
        store.get(Output(Quantize(W, scheme), "scale"), [w])
