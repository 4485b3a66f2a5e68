"""fuseline.examine says beforehand what torch.compile then does: graphs, breaks, sites, kernels, recompilations."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler import compat, normalize
from fuseline.compiler.report import Report
from fuseline.models.decoder import TinyDecoder
from fuseline.runtime.executable import Executable

pytestmark = pytest.mark.usefixtures("only_own_passes")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.norm(x))))


class Breaks(Pair):
    def forward(self, x):
        h = self.first(self.norm(x))
        print(end="")  # a break
        if h.mean() > -1e9:  # a break
            h = torch.relu(h)
        return self.second(h) * h.sum().item()  # a break


class InALoop(Pair):
    def forward(self, x):
        for _ in range(2):
            x = self.second(self.first(x))
            print(end="")  # a break
        return x


def marked(kind: type) -> list[tuple[str, int]]:
    """File and line of the lines that are marked in a class."""
    lines, start = inspect.getsourcelines(kind)
    file = inspect.getsourcefile(kind)
    return [(file, start + i) for i, line in enumerate(lines) if line.endswith("# a break\n")]


def test_a_model_that_is_one_graph() -> None:
    found = fuseline.examine(Pair().eval(), torch.randn(4, 16))
    assert found.ok and found.findings() == [] and found.breaks == []
    (graph,) = found.graphs
    assert [(p.name, len(p.taken), p.refused) for p in graph.passes] == [
        ("raise", 1, []), ("fuse-loss", 0, []), ("fuse", 2, []),
    ]  # fmt: skip
    assert [t.rule for t in graph.passes[0].taken] == ["LayerNorm"]
    assert graph.regions == 2 and graph.kernels >= 2 and graph.fallbacks == [] and graph.leftovers == []
    assert graph.weights_before == graph.weights_after == sum(p.numel() * 4 for p in Pair().parameters())


class Norms(nn.Module):
    """Three norms, one of them of cubes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(16)) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            mean = (x.pow(2) if i != 1 else x.pow(3)).mean(-1, keepdim=True)
            x = x + layer(self.weights[i] * (x * torch.rsqrt(mean + 1e-6)))
        return x


def test_what_a_rule_nearly_takes() -> None:
    found = fuseline.examine(Norms().eval(), torch.ones(2, 4, 16))
    raised = found.graphs[0].passes[0]
    assert [t.rule for t in raised.taken] == ["RMSNorm"] * 2
    (near,) = raised.near
    assert near.rule == "RMSNorm" and near.fits == near.parts - 1
    line = inspect.getsourcelines(Norms.forward)[1] + 2
    assert near.line == f"{__file__}:{line}" and "3" in near.problem
    assert f"| `raise` | nearly RMSNorm: {near.problem} | " in str(found)
    assert fuseline.examine(Pair().eval(), torch.randn(4, 16)).graphs[0].passes[0].near == []


def test_it_says_what_the_backend_then_does() -> None:
    model, ids = TinyDecoder(layers=1).eval(), torch.arange(8)[None]
    pipeline = "raise,quantize{weights=int4:g64},fuse"
    (graph,) = fuseline.examine(model, ids, pipeline=pipeline).graphs
    seen = []
    compiled = torch.compile(model, backend="fuseline", options={"pipeline": pipeline, "record": seen.append})
    compiled(ids)
    (compilation,) = seen
    report: Report = compilation.report
    assert isinstance(compilation.executable, Executable)
    for mine, real in zip(graph.passes, report.passes, strict=True):
        assert (mine.name, mine.nodes_before, mine.nodes_after) == (real.name, real.nodes_before, real.nodes_after)
        assert len(mine.taken) == real.matched
        assert {r.site: r.reason for r in mine.refused} == real.refused
    assert graph.weights_after == compilation.program.weight_bytes() < graph.weights_before
    whole = {one.name: one.reason for one in graph.whole}
    assert set(whole) == {"embed.weight", "head.weight"}
    assert whole["embed.weight"] == "no pass takes it"
    assert whole["head.weight"] == graph.passes[1].refused[0].reason


def test_breaks_are_those_of_the_real_compilation() -> None:
    model, x = Breaks().eval(), torch.randn(4, 16)
    found = fuseline.examine(model, x)
    assert [(b.at.file, b.at.line) for b in found.breaks] == marked(Breaks)
    assert [b.remedy.kind for b in found.breaks] == ["printing", "branch on a tensor", "tensor to Python number"]
    fuseline.optimize(model)(x)
    real = {(b.file, b.line) for b in fuseline.breaks(model)}
    assert real == set(marked(Breaks))
    assert len(found.graphs) == len(fuseline.reports(model)) == 4
    assert not found.ok
    first = found.findings()[0]
    assert first.what.startswith("graph break, printing: ") and "is_compiling()" in str(first.remedy)
    assert first.where == ":".join(map(str, marked(Breaks)[0]))


def test_a_function_that_no_graph_is_made_of() -> None:
    found = fuseline.examine(InALoop().eval(), torch.randn(4, 16))
    assert found.graphs == []
    assert [f.what.split(":")[0] for f in found.findings()] == ["no graph was captured", "graph break, printing"]
    assert found.findings()[1].what.endswith("; forward runs in Python as a whole")


def test_a_forward_that_is_kept_from_the_compiler() -> None:
    class Off(Pair):
        @torch.compiler.disable
        def forward(self, x):
            return self.first(x)

    (finding,) = fuseline.examine(Off().eval(), torch.randn(4, 16)).findings()
    assert finding.what == "no graph was captured: the whole forward runs in Python"
    assert "take @torch.compiler.disable off forward" in str(finding.remedy)


def test_a_graph_that_the_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor(list(range(16)))

    monkeypatch.setattr(normalize, "LARGEST_CONSTANT", 15)
    (finding,) = fuseline.examine(Constant(), torch.randn(2, 16)).findings()
    assert "not compiled: the model's code builds a constant of 16 elements in its forward" in finding.what
    assert "self.register_buffer" in str(finding.remedy)
    with pytest.raises(Exception, match="builds a constant of 16 elements"):
        torch.compile(Constant(), backend="fuseline")(torch.randn(2, 16))


def test_control_flow_that_is_refused() -> None:
    class Chooses(Pair):
        def forward(self, x):
            return torch.cond(x.mean() > 0, lambda x: x + 1, lambda x: x - 1, (self.first(x),))

    (finding,) = fuseline.examine(Chooses().eval(), torch.randn(4, 16)).findings()
    assert "not compiled: the model calls cond, whose body is a graph of its own" in finding.what
    assert finding.remedy == "put that call in a function under torch.compiler.disable: the rest is still compiled"


def test_nothing_is_left_changed() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.steps = nn.BatchNorm1d(16), nn.Dropout(), 0
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x, cache):
            self.steps += 1
            self.seen.add_(1)
            cache[0].add_(x.mean())
            return self.drop(self.norm(x))

    model, x, cache = Counts().train(), torch.randn(4, 16), [torch.zeros(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = dict(torch._dynamo.pgo.get_code_state())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = fuseline.examine(model, x, cache)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.steps == 0 and torch.equal(cache[0], torch.zeros(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dict(torch._dynamo.pgo.get_code_state()) == records
    assert {one.name for one in found.graphs[0].inputs if one.mutated} == {
        "seen",
        "cache_0",
        "norm_num_batches_tracked",
    }
    assert [f.what for f in found.findings()][0] == "steps changes with every call (0 → 1), and so does the graph"


def captures(model: nn.Module, *calls: tuple) -> int:
    """How often Dynamo captures a model that is called like this."""
    count = 0

    def backend(module, inputs):
        nonlocal count
        count += 1
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for call in calls:
        compiled(*call)
    return count


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.steps = nn.Linear(16, 16), 0

    def forward(self, x, times, flag):
        if x.shape[0] == 4:  # written into the graph
            x = x + 1
        return self.fc(x) * times if flag else x


def test_what_is_written_into_a_graph_is_captured_anew() -> None:
    model = Sizes().eval()
    found = fuseline.examine(model, torch.randn(4, 7, 16), 2, flag=True)
    assert [(one.kind, str(one)) for one in found.fixed] == [
        ("constant", "x.shape[0] = 4"),
        ("size", "x.shape[1] = 7"),
        ("constant", "x.shape[2] = 16"),
        ("value", "times = 2"),
        ("value", "flag = True"),
    ]
    call = lambda a, b, times=2, flag=True: (torch.randn(a, b, 16), times, flag)
    assert captures(model, call(4, 7), call(4, 8), call(4, 9), call(4, 10)) == 2  # a size becomes a symbol
    assert captures(model, call(4, 7), call(5, 7)) == captures(model, call(4, 7), call(4, 7, flag=False)) == 2


@pytest.mark.slow
def test_an_attribute_that_counts_calls_is_captured_with_each() -> None:
    class Steps(Sizes):
        def forward(self, x):
            self.steps += 1
            return self.fc(x) * self.steps

    class Buffer(Steps):
        def __init__(self) -> None:
            super().__init__()
            del self.steps
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    x = torch.randn(2, 16)
    (finding,) = (f for f in fuseline.examine(Steps().eval(), x).findings() if "changes" in f.what)
    assert "register_buffer" in str(finding.remedy)
    assert captures(Steps().eval(), *[(x,)] * 4) == 4
    assert captures(Buffer().eval(), *[(x,)] * 4) == 1
    assert not any("changes" in f.what for f in fuseline.examine(Buffer().eval(), x).findings())


@pytest.mark.slow
def test_a_model_on_the_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        model = TinyDecoder(hidden=4096, layers=1, heads=32, kv_heads=8).eval()
        ids = torch.zeros(1, 16, dtype=torch.int64)
    found = fuseline.examine(model, ids, pipeline="raise,quantize{weights=int4:g64},fuse")
    (graph,) = found.graphs
    assert found.ok and graph.regions and graph.weights_before > 4 * graph.weights_after > 1e8


@pytest.mark.slow
def test_a_model_that_was_compiled_already() -> None:
    model, x = Pair().eval(), torch.randn(4, 16)
    fuseline.optimize(model)(x)
    count = len(fuseline.reports(model))
    assert fuseline.examine(model, x).ok and fuseline.examine(torch.compile(model), x).ok
    assert len(fuseline.reports(model)) == count
    assert fuseline.examine(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval(), x).ok


def test_training() -> None:
    with torch.enable_grad():
        found = fuseline.examine(Pair(), torch.randn(4, 16))
    (finding,) = found.findings()
    assert "captured for training" in finding.what and finding.remedy == "with torch.no_grad(): for inference"
    assert found.graphs[0].training and found.graphs[0].kernels == 0


def test_passes_that_find_nothing_or_need_what_is_not_there() -> None:
    class Sorts(nn.Module):
        def forward(self, x):
            return x.sort().values

    found = fuseline.examine(Sorts(), torch.randn(4, 16), pipeline="raise,quantize{weights=int8}")
    texts = [f"{f.what}; {f.remedy}" for f in found.findings()]
    assert texts[0] == "pass 'raise' found no site; leave it out of the pipeline"
    assert texts[1].startswith("pass 'quantize' found no site; asked for: weights=int8; the program has no product")
    assert texts[2] == 'no pass marks what becomes a kernel: PyTorch runs every op; -p "…,fuse"'
    (leftover,) = found.graphs[0].leftovers
    assert (leftover.op, leftover.count, leftover.view) == ("aten.sort.default", 1, False)
    assert leftover.lines[0].startswith(__file__)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_group_size_that_does_not_fit_comes_with_one_that_does() -> None:
    found = fuseline.examine(Wide().eval(), torch.randn(4, 64), pipeline="quantize{weights=int8:g48}")
    assert found.findings()[0].remedy == "quantize{weights=int8:g16}"
    (one,) = found.graphs[0].passes
    assert {r.site: r.reason for r in one.refused} == {
        "first/linear#0": "group size 48 does not divide 64 (16, 32 would)",
        "second/linear#0": "group size 48 does not divide 32 (16 would)",
    }
    assert [r.line for r in one.refused] == [f"{__file__}:{Wide.forward.__code__.co_firstlineno + 1}"] * 2
    assert "weights=int8:g16" in str(found) and _row("quantize", "second/linear#0", one.refused[1].line) in str(found)


def _row(name: str, site: str, line: str | None) -> str:
    return f"| `{name}` | refused: group size 48 does not divide 32 (16 would) | `{site}` | {line} |"


def test_a_region_that_no_kernel_takes() -> None:
    """Attention over heads that are wider than the template's."""
    with torch.device("meta"):
        model, ids = TinyDecoder(hidden=2048, layers=1).eval(), torch.zeros(1, 16, dtype=torch.int64)
    found = fuseline.examine(model, ids)
    (finding,) = found.findings()
    assert finding.what.startswith("no kernel for attention: heads of 512 and 512 dimensions, more than 256")
    assert finding.where is not None and "decoder.py:" in finding.where
    (fallback,) = found.graphs[0].fallbacks
    assert fallback.ops == ("fuseline.attention.default",)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "Pair.forward() cannot be called with these arguments: missing a required argument: 'x'"),
        ((1, 2, 3), {}, "too many positional arguments\n  it takes (x)\n  given: 1, 2, 3"),
        ((), {"y": torch.ones(2)}, "given: y=float32[2]"),
        ((torch.ones(4, 9),), {}, "Pair fails on these inputs, without any compiler: RuntimeError"),
    ],
)
def test_a_call_that_is_not_the_models(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(fuseline.UserError) as raised:
        fuseline.examine(Pair().eval(), *args, **kwargs)
    assert message in str(raised.value) and "\n  try: " in str(raised.value)


def test_an_unknown_pass() -> None:
    with pytest.raises(fuseline.UserError, match="unknown pass 'rais'; did you mean 'raise'"):
        fuseline.examine(Pair().eval(), torch.randn(4, 16), pipeline="rais")


@pytest.mark.slow
def test_the_report_holds_what_an_issue_needs() -> None:
    found = fuseline.examine(Breaks().eval(), torch.randn(4, 16))
    text = str(found)
    file, line = marked(Breaks)[1]
    assert f"   - at `{file}:{line}`: `if h.mean() > -1e9:  # a break`" in text
    assert "   - remedy: torch.where(condition, a, b) computes both sides" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "Parameters: 6 of float32 (4416 bytes)." in text
    assert "| `raise{allow_empty}` | exact | 1 | 0 | 8 → 8 |" in text
    assert "tensor(" not in text


def test_parameters_keep_their_names_where_an_attribute_changes() -> None:
    """Dynamo reads modules through `__dict__` then."""
    assert compat.qualified_name("L['self'].__dict__['_modules']['fc']._parameters['weight']") == "fc.weight"
