"""rsparse: structure before and after, numerics against the formula, refusals and what they say, equal plans."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.ops import sparse_linear
from fuseline.compiler.plan import Plan
from fuseline.runtime.tensor_store import TensorStore
from tests.helpers.models import Mlp, error, ops, tiny_llama

UNIFORM = "rsparse{budget=0.5,budgets=uniform,split=1,prefill=sparse}"


def batches(count: int = 3, shape: tuple[int, ...] = (4, 16, 8), dtype: torch.dtype = torch.float64) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=draw).to(dtype),) for _ in range(count)]


def ids(count: int = 3) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 100, (2, 32), generator=draw), "use_cache": False} for _ in range(count)]


def rewritten(model: torch.nn.Module, pipeline: str, data: list[Any]) -> tuple[Any, Plan]:
    plan = fuseline.analyze(model, pipeline, data)
    args, kwargs = (data[0], {}) if isinstance(data[0], tuple) else ((), data[0])
    with torch.no_grad():
        program, _ = Pipeline(pipeline).run(fuseline.capture(model, args, kwargs), verification="full", plan=plan)
    return program, plan


def test_before_and_after() -> None:
    model = Mlp(8, 16).double()
    program, plan = rewritten(model, f"raise,{UNIFORM}", batches())
    assert ops(program).count("sparse_linear") == 3 and "linear" not in ops(program)
    gate, up, down = (n for n in program.graph.nodes if n.target is sparse_linear.overload)
    assert gate.args[2] is up.args[2] and gate.args[0] is up.args[0]  # one mask
    assert tuple(gate.args[1].meta["val"].shape) == (8, 16)
    assert plan.sites[""]["rsparse"].structure["read"] == pytest.approx(0.5)
    assert down.args[6] == 0


@pytest.mark.parametrize("options", ["split=1", "split=1,score=norm-weighted", "split=0.6,low_rank=on,factors=weights"])
def test_against_the_formula(options: str) -> None:
    """Thresholds are quantiles over the data, the branch the weights' singular vectors, all of it written out here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # factors are float32: of some weights they are good to a little more than 1e-6 only
        model = Mlp(32, 48).double()
    data = batches(2, (4, 64, 32))
    plan = fuseline.analyze(model, f"raise,rsparse{{budget=0.5,budgets=uniform,prefill=sparse,{options}}}", data)
    fast = fuseline.optimize(copy.deepcopy(model), Pipeline(plan.pipeline), plan=plan, target="eager")
    share = 0.6 if "0.6" in options else 1.0

    def product(x: torch.Tensor, layers: list[torch.nn.Linear], seen: torch.Tensor) -> list[torch.Tensor]:
        weight = torch.cat([layer.weight for layer in layers])
        m, n = weight.shape
        rank = round((1 - share) * 0.5 * n * m / (n + m))
        fraction = 0.5 - rank * (n + m) / (n * m)
        scale = weight.norm(dim=0) if "norm" in options else torch.ones(n).double()
        limit = torch.quantile(seen.abs() * scale, 1 - fraction)
        kept = torch.where(x.abs() * scale > limit, x, 0)
        u, s, v = torch.linalg.svd(weight)
        y = kept @ weight.T + (x - kept) @ v[:rank].T * s[:rank] @ u[:, :rank].T
        parts = y.split([len(layer.weight) for layer in layers], -1)
        return [p if layer.bias is None else p + layer.bias for p, layer in zip(parts, layers, strict=True)]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * model.norm

    with torch.no_grad():
        seen = torch.cat([x for (x,) in data])
        inner = F.silu(model.gate(norm(seen))) * model.up(norm(seen))
        x = data[0][0]
        gate, up = product(norm(x), [model.gate, model.up], norm(seen))
        (expected,) = product(F.silu(gate) * up, [model.down], inner)
        # thresholds come from a table of 1000 quantiles, so a few channels at the edge may fall to the other side
        gap = (fast(x) - (x + expected)).abs().amax(-1) / expected.abs().max()
        assert (gap < 1e-6).double().mean() > 0.6
        assert gap.mean() < 3e-3
        assert error(fast(x), model(x)) > 1e-2  # the approximation is one


def test_all_channels_are_the_model() -> None:
    model = tiny_llama(num_hidden_layers=1).double()
    pipeline = "raise,rsparse{budget=1,budgets=uniform,prefill=sparse,low_rank=off}"
    fast = fuseline.optimize(copy.deepcopy(model), pipeline, calibration=ids(1), target="eager")
    with torch.no_grad():
        assert error(fast(**ids(1)[0]).logits, model(**ids(1)[0]).logits) < 1e-6


@pytest.mark.slow
def test_many_rows_are_dense_and_few_are_not() -> None:
    model = tiny_llama().double()
    pipeline = "raise,rsparse{budget=0.4,budgets=uniform,split=1,rows=2}"
    fast = fuseline.optimize(copy.deepcopy(model), pipeline, calibration=ids(2), target="eager")
    many, few = ids(1)[0], {"input_ids": torch.tensor([[5, 7]]), "use_cache": False}
    with torch.no_grad():
        assert error(fast(**many).logits, model(**many).logits) < 1e-6
        assert error(fast(**few).logits, model(**few).logits) > 1e-3


@pytest.mark.one_in(8)
@pytest.mark.parametrize("budgets", ["uniform", "sensitivity", "greedy", "searched,trials=9,calls=1"])
@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_every_division_keeps_the_budget(budgets: str, budget: float) -> None:
    model = tiny_llama()
    plan = fuseline.analyze(model, f"raise,rsparse{{budget={budget},budgets={budgets}}}", ids())
    spent = total = 0.0
    for decision in plan.of("rsparse").values():
        one = decision.structure
        if "channels" in one:
            n, m = one["channels"], one["columns"]
            spent += one["fraction"] * n * m + one["rank"] * (n + m)
            total += n * m
            assert one["kept"] == pytest.approx(one["fraction"], abs=0.02)
    assert spent / total == pytest.approx(budget, abs=2e-3)


@pytest.mark.slow
def test_the_closed_form_and_the_search_beat_equal_shares() -> None:
    """By the divergence on the data itself: sensitivities know which inputs can lose channels."""
    model, found = tiny_llama(), {}
    for budgets in ("uniform", "sensitivity", "searched"):
        pipeline = f"raise,rsparse{{budget=0.4,budgets={budgets},trials=16,calls=3,prefill=sparse}}"
        fast = fuseline.optimize(copy.deepcopy(model), pipeline, calibration=ids(), target="eager")
        with torch.no_grad():
            pairs = [(fast(**one).logits.log_softmax(-1), model(**one).logits.log_softmax(-1)) for one in ids()]
        found[budgets] = sum(F.kl_div(q, p, log_target=True, reduction="batchmean").item() for q, p in pairs)
    assert found["sensitivity"] < 0.7 * found["uniform"]
    assert found["searched"] <= found["sensitivity"] * 1.02


def test_a_trial_is_what_the_model_becomes() -> None:
    """What the search measures is what runs: the loss of what it keeps, from the rewritten model."""
    model = tiny_llama(num_hidden_layers=1)
    pipeline = "raise,rsparse{budget=0.4,split=0.8,low_rank=on,trials=6,calls=1,prefill=sparse}"
    plan = fuseline.analyze(model, pipeline, ids(1))
    found = plan.sites[""]["rsparse"].structure
    assert found["held_out"] == {"calls": 0, "kept": "sensitivity"}  # there is nothing to confirm a candidate on
    fast = fuseline.optimize(copy.deepcopy(model), pipeline, plan=plan, target="eager")
    one = ids(1)[0]
    with torch.no_grad():
        q, p = (run(**one).logits.flatten(0, 1).log_softmax(-1) for run in (fast, model))
    measured = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert found["measured"]["sensitivity"] == pytest.approx(measured, rel=1e-3)


def test_same_seed_same_plan_and_a_stopped_search_goes_on(tmp_path: Path) -> None:
    model, pipeline = tiny_llama(num_hidden_layers=1), "raise,rsparse{budget=0.4,trials=12,calls=1}"
    plans = [fuseline.analyze(model, pipeline, ids()) for _ in range(2)]
    other = fuseline.analyze(model, pipeline.replace("trials", "seed=1,trials"), ids())
    structures = [{s: d["rsparse"].structure for s, d in plan.sites.items()} for plan in (*plans, other)]
    assert structures[0] == structures[1]
    assert structures[0][""]["history"] != structures[2][""]["history"]

    from fuseline.passes.sparsity import search

    asked = 0
    whole = search.Losses.__call__

    def stops(self: Any, choices: Any) -> float:
        nonlocal asked
        asked += 1
        if asked == 8:
            raise KeyboardInterrupt
        return whole(self, choices)

    file = tmp_path / "progress.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.Losses, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            fuseline.analyze(model, pipeline, ids(), checkpoint=file)
    assert file.exists()
    resumed = fuseline.analyze(model, pipeline, ids(), checkpoint=file)
    assert {s: d["rsparse"].structure for s, d in resumed.sites.items()} == structures[0]
    assert not file.exists()


RELOAD = """
import sys, torch, fuseline
model = fuseline.load(sys.argv[1])
ids = torch.tensor([[3, 14, 15, 92, 65]])
with torch.no_grad():
    print(model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist())
"""


@pytest.mark.slow
def test_reloaded_in_another_process_it_generates_the_same_tokens(tmp_path: Path) -> None:
    model = tiny_llama()
    pipeline = "raise,rsparse{budget=0.5,split=0.9,low_rank=on,budgets=uniform}"
    fast = fuseline.optimize(model, pipeline, calibration=ids(), target="eager")
    prompt = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        expected = fast.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    fuseline.save(fast, tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "saved")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected)


@pytest.mark.slow
def test_quantized_behind_it_codes_lie_along_the_outputs() -> None:
    model = tiny_llama()
    pipeline = f"raise,{UNIFORM},quantize{{weights=int4:g16}}"
    program, plan = rewritten(model, pipeline, ids())
    found = [n for n in program.graph.nodes if n.target is sparse_linear.overload]
    assert len(found) == 14
    for node in found:
        weight = node.args[1]
        assert weight.target._opname == "dequantize"
        n, m = node.meta["val"].shape[-1], node.args[0].meta["val"].shape[-1]
        assert tuple(weight.args[0].meta["val"].shape) == (m, n // 2)
        assert tuple(weight.args[1].meta["val"].shape) == (m, n // 16)
    one = ids(1)[0]
    fast = fuseline.optimize(copy.deepcopy(model), pipeline, plan=plan, target="eager")
    sparse = fuseline.optimize(copy.deepcopy(model), f"raise,{UNIFORM}", calibration=ids(), target="eager")
    with torch.no_grad():
        assert 1e-4 < error(fast(**one).logits, sparse(**one).logits) < 0.2


def test_methods_that_decide_along_the_inputs_are_refused_behind_it() -> None:
    pipeline = f"raise,{UNIFORM},quantize{{weights=int4:g16,method=gptq,allow_empty}}"
    plan = fuseline.analyze(tiny_llama(), pipeline, ids(1))
    with torch.no_grad():
        _, report = Pipeline(pipeline).run(fuseline.capture(tiny_llama(), (), ids(1)[0]), plan=plan)
    assert any("decides along the inputs" in reason for reason in report["quantize"].refused.values())


def test_in_front_of_it_quantize_is_in_the_way() -> None:
    with pytest.raises(UserError, match="put 'rsparse' before 'quantize'"):
        fuseline.analyze(tiny_llama(), f"raise,quantize{{weights=int8}},{UNIFORM}", ids(1))


def test_an_input_rotated_at_run_time_stays_dense_and_counts() -> None:
    """Half of all bytes is read, so the others are read less."""
    plan = fuseline.analyze(tiny_llama(), f"raise,rotate{{r1,r4}},{UNIFORM}", ids(1))
    found = {site: one.structure for site, one in plan.of("rsparse").items()}
    turned = [site for site, one in found.items() if "rotated at run time" in one.get("reason", "")]
    assert len(turned) == 2 and all(".mlp." in site for site in turned)
    kept = [one["fraction"] for one in found.values() if "channels" in one]
    sparse, dense = found[""]["bytes"], found[""]["dense_bytes"]
    assert kept == pytest.approx([(0.5 * (sparse + dense) - dense) / sparse] * len(kept))
    step = Pipeline(f"raise,rotate{{r1,r4}},{UNIFORM}").passes[-1]
    assert any("rotated by weights" in line for line in step.findings(plan.of("rsparse")).lines)


def test_a_budget_below_what_stays_dense_is_refused() -> None:
    with pytest.raises(UserError, match="a budget of 0.2 of the bytes cannot be kept: products that stay dense hold 2"):
        fuseline.analyze(tiny_llama(), "raise,rotate{r4},rsparse{budget=0.2,budgets=uniform,split=1}", ids(1))


@pytest.mark.parametrize("budget", ["0", "-0.5", "1.5", "nan"])
def test_a_budget_that_is_none(budget: str) -> None:
    with pytest.raises(UserError, match="lies above 0, and is 1 at most"):
        Pipeline(f"rsparse{{budget={budget}}}")


@pytest.mark.parametrize(
    "options, what",
    [
        ("rows=64", "with more than 16 rows some row keeps every channel"),
        ("split=1.5", "lies above 0, and is 1 at most"),
        ("split=most", "neither a number nor 'searched'"),
        ("trials=0", "one trial and one call at least"),
    ],
)
def test_options_that_say_nothing(options: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        Pipeline(f"rsparse{{{options}}}")


def test_too_little_data_for_the_quantile() -> None:
    data = batches(1, (1, 4, 8))
    with pytest.raises(
        UserError, match="4 rows of calibration data are too few for a threshold that keeps 50.0%"
    ) as told:
        fuseline.analyze(Mlp(8, 16).double(), f"raise,{UNIFORM}", data)
    assert "give at least 26 tokens" in str(told.value)


def test_a_constant_input_stays_dense() -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.fixed = Mlp(8, 16), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + self.fixed(torch.ones_like(x))

    _, plan = rewritten(Constant().double(), f"raise,{UNIFORM}", batches())
    reasons = {site: one.structure.get("reason", "") for site, one in plan.of("rsparse").items()}
    assert "the same at all 192 rows" in reasons["fixed/linear#0"]


def test_data_that_is_no_number() -> None:
    data = batches(2)
    data[1][0][0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="calibration batch 1 makes values that are no finite numbers"):
        fuseline.analyze(Mlp(8, 16).double(), f"raise,{UNIFORM}", data)


def test_no_data() -> None:
    with pytest.raises(UserError, match="'rsparse' decides from data, and there is none"):
        fuseline.optimize(Mlp(8, 16), f"raise,{UNIFORM}")


def test_factors_of_other_weights_are_refused() -> None:
    model = tiny_llama()
    pipeline = "raise,rsparse{budget=0.5,split=0.8,low_rank=on,budgets=uniform}"
    plan = fuseline.analyze(model, pipeline, ids(1))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        fast = fuseline.optimize(model, pipeline, plan=plan, target="eager")
        with pytest.raises(Exception, match="low-rank factors were fitted for other values of '.*down_proj.weight'"):
            fast(**ids(1)[0])


def test_weights_are_decomposed_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors are found by the contents of what they were computed from; memory is emptied, as a new process's is."""
    from fuseline.passes.sparsity import factors

    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    model, data = tiny_llama(num_hidden_layers=1), ids()
    pipeline = "raise,rsparse{budget=0.5,split=0.8,low_rank=on,budgets=uniform}"
    made: list[int] = []
    whole = factors._decompose
    monkeypatch.setattr(factors, "_decompose", lambda w, dropped, rank: made.append(rank) or whole(w, dropped, rank))

    def analysed(calls: list[Any]) -> Plan:
        factors._KNOWN.clear()
        made.clear()
        return fuseline.analyze(model, pipeline, calls)

    def factors_of(plan: Plan) -> list[torch.Tensor]:
        return [one.tensors[key] for one in plan.of("rsparse").values() for key in ("up", "down") if key in one.tensors]

    first = analysed(data)
    assert len(made) == 4
    second = analysed(data)
    assert made == []
    assert all(torch.equal(a, b) for a, b in zip(factors_of(first), factors_of(second), strict=True))

    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    third = analysed(data)
    assert len(made) == 1
    gaps = [not torch.equal(a, b) for a, b in zip(factors_of(first), factors_of(third), strict=True)]
    assert sum(gaps) == 2 and gaps[-2:] == [True, True]

    for entry in TensorStore().cache.entries():
        (entry.path / "tensors.safetensors").write_bytes(b"cut off")
        break
    analysed(data)
    assert len(made) == 1, "a damaged entry is computed again"
    monkeypatch.setenv("FUSELINE_CACHE_SIZE", "0")
    analysed(data)
    assert made == [], "what is there is read"


def test_a_head_is_left_alone_unless_it_is_named() -> None:
    plan = fuseline.analyze(tiny_llama(num_hidden_layers=1), f"raise,{UNIFORM}", ids(1))
    assert "only=lm_head" in plan.of("rsparse")["lm_head/linear#0"].structure["reason"]
    named = fuseline.analyze(tiny_llama(num_hidden_layers=1), f"raise,{UNIFORM[:-1]},only=lm_head}}", ids(1))
    assert named.of("rsparse")["lm_head/linear#0"].structure["fraction"] == pytest.approx(0.5)
