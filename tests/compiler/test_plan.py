"""Plans: a pass that needs data analyses once; every graph captured after is rewritten by what it decided."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.compiler.expressions import Constant
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.plan import Plan, SitePlan
from fuseline.compiler.sites import sites

aten = torch.ops.aten


@dataclass(frozen=True)
class Threshold(fuseline.Pass):
    """Zeroes a linear's inputs below a quantile of their magnitudes on the calibration data."""

    name = "threshold"
    tier = fuseline.Tier.LOSSY
    needs_data = True

    share: float = 0.5

    def analyze(self, program, data):
        found: dict[str, list[torch.Tensor]] = {}
        named = sites(program.graph)

        class Watch(torch.fx.Interpreter):
            def run_node(self, n):
                value = super().run_node(n)
                for user in n.users:
                    if user.target is aten.linear.default and user.args[0] is n:
                        found.setdefault(where[user.name], []).append(value.detach().abs().flatten())
                return value

        where = {node.name: site for node, site in named.items()}
        module, weights = program.lift()
        for flat in data:
            Watch(module).run(*[flat[i] for i in program.arguments], *program.binder(weights)(flat))
        return {
            site: SitePlan({"share": self.share}, {"bound": torch.cat(values).quantile(self.share)})
            for site, values in found.items()
        }

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is aten.linear.default and (decision := rewriter.decision(node)) is not None:
                bound = float(decision.tensors["bound"])

                def build(new, node=node, bound=bound):
                    x = node.args[0]
                    keep = new(aten.ge.Scalar, new(aten.abs.default, x), bound)
                    zero = new.weight(Constant((0.0,), (), x.meta["val"].dtype, "cpu"))
                    return new(aten.linear.default, new(aten.where.self, keep, x, zero), *node.args[1:])

                rewriter.rewrite(node, [node], build, "linear")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

    def thresholded(self, x, bounds):
        x = torch.where(x.abs() >= bounds[0], x, 0.0)
        h = torch.relu(torch.nn.functional.linear(x, self.first.weight, self.first.bias))
        return self.second(torch.where(h.abs() >= bounds[1], h, 0.0))


BATCHES = [torch.randn(16, 8) for _ in range(3)]


def bounds_of(plan: Plan) -> list[float]:
    return [float(plan.sites[f"{name}/linear#0"]["threshold"].tensors["bound"]) for name in ("first", "second")]


@torch.no_grad()
def test_a_calibrated_model_behaves_the_same_at_every_size():
    torch.compiler.reset()
    net = Net()
    plan = fuseline.analyze(net, [Threshold()], BATCHES)
    expected = torch.cat(BATCHES).abs().quantile(0.5)
    assert bounds_of(plan)[0] == pytest.approx(float(expected))
    assert Threshold().findings(plan.of("threshold")).lines == ("decided at 2 sites",)
    optimized = fuseline.optimize(net, [Threshold()], calibration=BATCHES, dynamic=False)
    for rows in (1, 3, 16):
        x = torch.randn(rows, 8)
        assert torch.equal(optimized(x), net.thresholded(x, bounds_of(plan)))
    assert len(fuseline.reports(optimized)) == 3


@torch.no_grad()
def test_a_plan_survives_its_files_and_the_plain_backend_takes_it(tmp_path: Path):
    torch.compiler.reset()
    net = Net()
    plan = fuseline.analyze(net, [Threshold(share=0.25)], [{"x": b} for b in BATCHES])
    path = plan.save(tmp_path / "plan.json")
    again = Plan.load(path)
    assert again.pipeline == plan.pipeline == "threshold{share=0.25}" and bounds_of(again) == bounds_of(plan)
    x = torch.randn(5, 8)
    expected = net.thresholded(x, bounds_of(plan))
    compiled = torch.compile(net, backend="fuseline", options={"pipeline": [Threshold(share=0.25)], "plan": str(path)})
    assert torch.equal(compiled(x), expected)


def test_each_pass_analyses_what_its_predecessors_left():
    net = Net()
    program = fuseline.capture(net, (BATCHES[0],))
    plan = Pipeline([Threshold(share=0.9)]).analyze(program, [program.examples])
    full = torch.relu(net.first(BATCHES[0])).abs().quantile(0.9).item()
    assert bounds_of(plan)[1] == pytest.approx(full), "one pass sees the program before its own rewrites"


def test_data_that_is_missing_is_asked_for_with_the_line_to_write():
    with pytest.raises(fuseline.UserError) as caught:
        fuseline.optimize(Net(), [Threshold()])
    assert "'threshold' decides from data, and there is none" in str(caught.value)
    assert 'fuseline.optimize(model, "threshold", calibration=batches), or plan=PATH' in str(caught.value)
    assert 'fuseline analyze MODEL -p "threshold" -o plan.json' in str(caught.value)
    program = fuseline.capture(Net(), (BATCHES[0],))
    with pytest.raises(fuseline.UserError, match="decides from data"):
        Pipeline([Threshold()]).run(program)


def test_a_plan_for_something_else_is_refused():
    net = Net()
    plan = fuseline.analyze(net, [Threshold()], BATCHES)
    program = fuseline.capture(net, (BATCHES[0],))
    with pytest.raises(fuseline.UserError, match="the plan was made for another pipeline"):
        Pipeline([Threshold(share=0.1)]).run(program, plan=plan)
    net.second = torch.nn.Linear(8, 5)
    other = fuseline.capture(net, (BATCHES[0],))
    with pytest.raises(fuseline.UserError, match=r"another model: 'second.weight' is float32\[5, 8\] here and"):
        Pipeline([Threshold()]).run(other, plan=plan)


def test_a_site_without_a_decision_is_refused_by_name():
    net = Net()
    plan = fuseline.analyze(net, [Threshold()], BATCHES)
    del plan.sites["second/linear#0"]
    _, report = Pipeline([Threshold()]).run(fuseline.capture(net, (BATCHES[0],)), plan=plan)
    assert report["threshold"].matched == 1
    assert report["threshold"].refused == {"second/linear#0": "the plan has no decision for this site"}


def test_damaged_plans_are_named(tmp_path: Path):
    path = fuseline.analyze(Net(), [Threshold()], BATCHES).save(tmp_path / "plan.json")
    record = json.loads(path.read_text())
    with pytest.raises(fuseline.UserError, match="no plan at"):
        Plan.load(tmp_path / "none.json")
    path.write_text(json.dumps({**record, "version": 99}))
    with pytest.raises(fuseline.UserError, match="a plan of version 99, and this release reads version 1"):
        Plan.load(path)
    path.write_text(json.dumps(record)[:40])
    with pytest.raises(fuseline.UserError, match="not a complete plan"):
        Plan.load(path)
    path.write_text(json.dumps(record))
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:20])
    with pytest.raises(fuseline.UserError, match="not a complete plan"):
        Plan.load(path)


def test_calibration_needs_batches_and_an_instance():
    with pytest.raises(fuseline.UserError, match="calibration holds no batch"):
        fuseline.analyze(Net(), [Threshold()], [])
    with pytest.raises(fuseline.UserError, match="a calibration batch is a tensor, a tuple or a dict, not int"):
        fuseline.analyze(Net(), [Threshold()], [3])
    with pytest.raises(fuseline.UserError, match="a class has no weights to calibrate yet"):
        fuseline.optimize([Threshold()], calibration=BATCHES)
