"""The torch.compile backend: results, gradients and tokens are eager's; the model stays what it was."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import backend, compile as compilation
from fuseline.compiler.weights import STORE
from tests.helpers.models import Mlp, Tied, error, ops, tiny_llama

FUSE = {"pipeline": "fuse{allow_empty}"}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    backend.recent.clear()


def compiled(model: torch.nn.Module, **options) -> torch.nn.Module:
    """The same model, its forward compiled; one entry of `backend.recent` a graph."""
    model.compile(backend="fuseline", options={**FUSE, **options})
    return model


def test_the_entry_point_is_registered() -> None:
    assert "fuseline" in torch._dynamo.list_backends()


@torch.no_grad()
def test_torch_compile_by_name() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    assert error(torch.compile(model, backend="fuseline")(x), model(x)) < 1e-6
    assert len(backend.recent) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipline": "fuse"}, "backend 'fuseline' has no option 'pipline'; did you mean 'pipeline'?"),
        ({"target": "tritn"}, "unknown target 'tritn'; did you mean 'triton'?"),
        ({"target": "triton"}, "target 'triton' needs a model on a GPU"),
        ({"pipeline": "fusee"}, "unknown pass 'fusee'; did you mean 'fuse'?"),
        ({"pipeline": "quantize{weights=int8,only=nowhere}"}, "pass 'quantize' matched no site"),
        ({"verify": "ful"}, "unknown verification level 'ful'; did you mean 'full'?"),
    ],
)
def test_what_a_wrong_option_says(options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, x = Mlp(), torch.randn(3, 8)
    expected = model(x)
    model.compile(backend="fuseline", options={**FUSE, **options})
    with pytest.raises(Exception) as caught, torch.no_grad():
        model(x)
    assert message in str(caught.value)
    model._compiled_call_impl = None
    assert torch.equal(model(x), expected)  # the model is as it was


def test_modes_are_refused() -> None:
    with pytest.raises(Exception, match="backend 'fuseline' has no modes"):
        torch.compile(Mlp(), backend="fuseline", mode="max-autotune")(torch.randn(3, 8))


@torch.no_grad()
def test_a_bad_weight_is_reported_at_compilation_by_its_name() -> None:
    model = compiled(Mlp(), pipeline="quantize{weights=int8}")
    model.up.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match="weight 'up.weight' holds NaN or infinite values"):
        model(torch.randn(3, 8))


# -- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pipeline", ["fuse", "quantize{weights=int8},fuse", "quantize{weights=int4:g8},fuse"])
def test_siblings_share_one_compilation_and_have_their_own_results(pipeline: str) -> None:
    torch.manual_seed(0)
    blocks, x = [Mlp() for _ in range(3)], torch.randn(4, 8)
    alone = [fuseline.Pipeline(pipeline).run(fuseline.capture(b, (x,)))[0].to_module()(x) for b in blocks]
    results = [compiled(block, pipeline=pipeline)(x) for block in blocks]
    assert len(backend.recent) == 1
    for result, expected in zip(results, alone, strict=True):
        assert error(result, expected) < 1e-6
    assert error(results[0], results[1]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("pipeline", "bound"), [("fuse", 1e-6), ("quantize{weights=int8},fuse", 0.03)])
def test_a_parameter_replaced_or_edited_after_compilation_is_noticed(pipeline: str, bound: float) -> None:
    torch.manual_seed(0)
    model, x = compiled(Mlp(), pipeline=pipeline), torch.randn(4, 8)
    eager = lambda: Mlp.forward(model, x)
    assert error(model(x), eager()) < bound
    before = eager()
    model.down.weight.mul_(-3)
    assert error(model(x), eager()) < bound and error(before, eager()) > 0.1
    model.up.weight = torch.nn.Parameter(torch.randn(16, 8))
    assert error(model(x), eager()) < bound
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
    assert error(model(x), eager()) < bound
    model.load_state_dict({name: tensor * 3 for name, tensor in model.state_dict().items()}, assign=True)
    assert error(model(x), eager()) < bound
    model.gate.weight.data.copy_(torch.randn(16, 8))
    fuseline.refresh(model)
    assert error(model(x), eager()) < bound
    assert len(backend.recent) == 1


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    model, ids = compiled(Tied(), pipeline="quantize{weights=int8,only=*}"), torch.tensor([[1, 2, 3]])
    model(ids)
    table = [e for e in backend.recent[0].program.lift()[1] if type(e).__name__ == "Pack"]
    assert len(table) == 2
    model.embed.weight.mul_(5)
    assert error(model(ids), Tied.forward(model, ids)) < 0.03


@torch.no_grad()
def test_nothing_of_a_dropped_model_is_kept() -> None:
    model = compiled(Mlp(), pipeline="quantize{weights=int8},fuse")
    model(torch.randn(2, 8))
    gone = weakref.ref(model.up.weight)
    held = STORE.bytes()
    del model
    gc.collect()
    assert gone() is None and STORE.bytes() < held
    assert ops(backend.recent[0].program)  # what is kept to read is still readable


# -- training ---------------------------------------------------------------------------------------------------------


def step(model: torch.nn.Module, *args, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    result = model(*args, **kwargs)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    loss = loss if loss.dim() == 0 else loss.square().sum()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_training_step_of_a_decoder_is_eagers() -> None:
    model, ids = tiny_llama().train(), torch.randint(0, 100, (2, 9))
    loss, gradients = step(model, ids, labels=ids, use_cache=False)
    actual, found = step(compiled(copy.deepcopy(model)), ids, labels=ids, use_cache=False)
    assert backend.recent and all(c.program.training for c in backend.recent)
    assert error(actual, loss) < 1e-5
    assert max(error(a, b) for a, b in zip(found, gradients, strict=True)) < 1e-5


class Written(torch.nn.Module):
    """A decoder's block by hand, without the casts that library models make, its parts as dialect ops too."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.norm = torch.nn.Parameter(torch.rand(width) + 0.5)
        self.mlp = Mlp(width, 24)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = torch.ops.fuseline.rms_norm(x, self.norm, 1e-6)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        q, k = torch.ops.fuseline.rotary(q, cos, sin), torch.ops.fuseline.rotary(k, cos, sin)
        a = torch.ops.fuseline.attention(q, k, v, None, q.shape[-1] ** -0.5, "causal")
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        return F.layer_norm(x + self.mlp(x), (x.shape[-1],)).sum()


def test_training_in_float64_agrees_to_1e_9() -> None:
    torch.manual_seed(0)
    model = Written().double()
    angles = torch.randn(5, 4, dtype=torch.float64)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    loss, gradients = step(model, x, cos, sin)
    actual, found = step(compiled(copy.deepcopy(model)), x, cos, sin)
    assert backend.recent[0].program.training
    assert abs(actual - loss) < 1e-9 * max(1.0, abs(loss))
    assert max(error(a, b) for a, b in zip(found, gradients, strict=True)) < 1e-9


def test_training_on_a_gpu_goes_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "find_spec", lambda name: object())
    program = fuseline.capture(Mlp(), (torch.randn(2, 8),))
    for on_gpu, chosen in ((False, "eager"), (True, "inductor")):
        monkeypatch.setattr(compilation, "_on_gpu", lambda program, there=on_gpu: there)
        assert compilation.choose_target(None, replace(program, training=True)) == chosen
        assert compilation.choose_target("eager", replace(program, training=True)) == "eager"
        assert compilation.choose_target("inductor", replace(program, training=True)) == "inductor"


def test_inductor_may_recompute_what_is_pointwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training through Inductor, unless the option says no; its setting is as it was afterwards."""
    import torch._inductor.compile_fx as inductor
    from torch._functorch import config

    seen: list[bool] = []

    def compiled_as_it_is(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(config.ban_recompute_materialized_backward)
        return module

    monkeypatch.setattr(inductor, "compile_fx", compiled_as_it_is)
    for options in ({}, {"recompute": False}):
        torch.compiler.reset()
        compiled(Mlp(), target="inductor", **options)(torch.randn(3, 8)).sum().backward()
    assert seen == [False, True] and config.ban_recompute_materialized_backward


def test_an_optimizer_step_reaches_the_next_forward() -> None:
    torch.manual_seed(0)
    model = Mlp()
    twin, model = copy.deepcopy(model), compiled(model)
    x = torch.randn(4, 8)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert error(model(x), twin(x)) < 1e-5
    assert len(backend.recent) == 1


def test_frozen_quantized_weights_under_training() -> None:
    torch.manual_seed(0)
    model = Mlp()
    for linear in (model.gate, model.up, model.down):
        linear.weight.requires_grad_(False)
    compiled(model, pipeline="quantize{weights=int8},fuse")
    x = torch.randn(4, 8)
    model(x).square().mean().backward()
    found = model.norm.grad.clone()
    model.norm.grad = None
    Mlp.forward(model, x).square().mean().backward()
    assert error(found, model.norm.grad) < 0.1
    assert model.up.weight.grad is None


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_eagers_tokens(cache: str | None) -> None:
    model, prompt = tiny_llama(), torch.tensor([[5, 17, 3, 42, 9]])
    settings = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    actual = compiled(copy.deepcopy(model)).generate(prompt, **settings)
    assert torch.equal(actual, expected) and actual.shape == (1, 21)
    assert 2 <= len(backend.recent) <= 5
    if cache == "static":
        assert any(c.program.mutated for c in backend.recent)


# -- the model stays what it was --------------------------------------------------------------------------------------


def test_the_model_keeps_its_state_its_hooks_and_its_modes() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    keys = list(model.state_dict())
    seen = []
    compiled(model)
    model.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    model.down.register_forward_hook(lambda module, args, result: result * 2)
    result = model(x)
    assert list(model.state_dict()) == keys and seen == [(3, 8)]
    model._compiled_call_impl = None
    assert error(result, model(x)) < 1e-6  # the inner hook's doubling is in the graph


def test_train_and_eval_are_told_apart() -> None:
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.fc(x), 0.5, self.training)

    model, x = compiled(Dropping()), torch.randn(8, 64)
    with torch.no_grad():
        model.eval()
        assert error(model(x), model.fc(x)) < 1e-6
        model.train()
        zeros = (model(x) == 0).float().mean()
        assert 0.3 < zeros < 0.7
        assert not torch.equal(model(x), model(x))


def test_autocast_around_the_call_is_kept() -> None:
    model, x = compiled(Mlp(), pipeline="quantize{weights=int8},fuse"), torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, expected = model(x), Mlp.forward(model, x)
    assert result.dtype == expected.dtype and error(result.float(), expected.float()) < 0.05


def test_observers_and_records_see_each_graph() -> None:
    from fuseline.compiler.observe import Numerics, Timing

    records, timing = [], Timing()
    model = compiled(Mlp(), observers=[Numerics(), timing], record=records.append)
    for rows in (2, 3, 4):
        model(torch.randn(rows, 8))
    assert timing.programs == len(records) == len(backend.recent) == 2  # the second graph's rows are symbolic
    assert all(r.report["fuse"].error < 1e-6 for r in records)


# -- Inductor ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["fuse", "quantize{weights=int8},fuse"])
def test_inductor_as_the_target(pipeline: str) -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(3, 8)
    with torch.no_grad():
        expected = fuseline.Pipeline(pipeline).run(fuseline.capture(model, (x,)))[0].to_module()(x)
        assert error(compiled(model, pipeline=pipeline, target="inductor")(x), expected) < 1e-5
    assert backend.recent[0].target == "inductor"


@pytest.mark.slow
def test_training_through_inductor() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    loss, gradients = step(model, x)
    actual, found = step(compiled(copy.deepcopy(model), target="inductor"), x)
    assert error(actual, loss) < 1e-5
    assert max(error(a, b) for a, b in zip(found, gradients, strict=True)) < 1e-4
