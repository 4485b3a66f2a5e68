"""`fuseline analyze` and `--plan`: plans are made, used by the other verbs, resumed, and refused where they must be."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fuseline import Pipeline, Plan
from fuseline.cli.calibrating import Size, calibrate
from fuseline.models import load
from fuseline.passes.rotation.learning import matrices

QUANTIZE = "quantize{weights=int4:sym,activations=int4:token}"
LEARN = f"raise,rotate{{r1,r2,kind=learned,untie,steps=2}},{QUANTIZE}"
CHOOSE = f"raise,rotate{{r3,r4,choose,allow_empty}},{QUANTIZE}"
TEXT = ("--windows", "4", "--length", "16", "--batch", "2")
MLP = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(16, 32, bias=False)
        self.down = torch.nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

def make():
    torch.manual_seed(0)
    return Mlp(), (torch.randn(4, 16),)
"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plan of LEARN for demo:tiny-decoder, as a file."""
    plan, _ = calibrate(load("demo:tiny-decoder"), Pipeline(LEARN), Size(2, 16, 1))
    return str(plan.save(tmp_path_factory.mktemp("plan") / "plan.json"))


def test_it_says_what_each_rotation_brought(cli: Callable, tmp_path: Path) -> None:
    out, data = tmp_path / "plan.json", tmp_path / "data.json"
    result = cli("analyze", "demo:tiny-decoder", "-p", CHOOSE, "-o", str(out), *TEXT, "--json", str(data))
    assert result.code == 0 and result.err == ""  # no bar where there is no terminal
    assert "demo:tiny-decoder: calibrated on 4 windows of 16 tokens of text" in result.out
    assert max(map(len, result.out.replace(str(tmp_path), "").splitlines())) <= 80
    decided = Plan.load(out).sites[""]["rotate"].structure
    rows = [line.split() for line in result.out.splitlines()]
    assert ["rotations", "divergence", "change", "found"] in rows
    for name, value in decided["measured"].items():
        assert any(row[:2] == [name, f"{value:.3g}"] for row in rows)
    assert f"kept: {', '.join(decided['keep']) or 'none of them'}" in result.out
    record = json.loads(data.read_text())
    assert record["passes"][0]["sites"][""] == decided and record["path"] == str(out)
    kept = [row[0] for row in record["passes"][0]["rows"] if row[3] == "kept"]
    assert [set(name.split("+")) for name in kept][-1:] == ([set(decided["keep"])] if decided["keep"] else [])


@pytest.mark.slow
def test_a_plan_is_used_by_the_other_verbs(cli: Callable, learned: str, tmp_path: Path) -> None:
    """It brings its pipeline; -p with the same one is right as well."""
    ran = cli("run", "demo:tiny-decoder", "--plan", learned, "--windows", "0", "--tokens", "0", "--json", "-")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["pipeline"] == LEARN and record["calibrated"] is None
    assert record["passes"][1]["name"] == "rotate" and record["passes"][1]["error"] < 1e-5
    dumped = tmp_path / "dumped"
    stopped = ("--stop-after", "rotate", "--dump", str(dumped))
    assert cli("opt", "demo:tiny-decoder", "-p", LEARN, "--plan", learned, *stopped).code == 0
    assert (dumped / "002_rotate.py").exists()
    assert "R1 into rows" in cli("opt", "demo:tiny-decoder", "--plan", learned).out
    kernels = cli("kernels", "demo:tiny-decoder", "--plan", learned)
    assert kernels.code == 0 and "none in a region" in kernels.out
    compared = cli("compare", "demo:tiny-decoder", "--plan", learned)
    assert compared.code == 0 and f"next: fuseline diff demo:tiny-decoder --plan {learned}" in compared.out.replace(
        "next: what differs in the graphs themselves\n  ", "next: "
    )
    assert cli("diff", "demo:tiny-decoder", "--plan", learned, "--stat").code == 1
    drawn = cli("view", "demo:tiny-decoder", "--plan", learned, "-o", str(tmp_path / "page.html"))
    assert drawn.code == 0 and "4 stages" in drawn.out.replace(" \n", " ").replace("\n", " ")


@pytest.mark.slow
def test_a_learned_rotation_is_exported(cli: Callable, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    made = cli("analyze", "demo:tiny-llama", "-p", LEARN, "-o", plan, *TEXT)
    assert made.code == 0 and "r1+r2 learned" in made.out and "learned R2 at 2 sites" in made.out, made.err
    exact = LEARN.removesuffix(f",{QUANTIZE}")
    result = cli("export", "demo:tiny-llama", "-p", exact, "--plan", plan, "-o", out)
    assert result.code == 0 and "checked    loaded again" in result.out, result.err
    rotations = json.loads((Path(out) / "fuseline_rotations.json").read_text())["rotations"]
    assert {one["kind"] for one in rotations} == {"learned"}
    refused = cli("export", "demo:nothing", "-p", exact, "-o", str(tmp_path / "other"))
    assert refused.code == 2 and "fuseline analyze demo:nothing" in refused.err


def test_run_calibrates_where_there_is_no_plan(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseline.cli.calibrating.DEFAULTS", Size(2, 16, 1))
    result = cli("run", "demo:tiny-decoder", "-p", CHOOSE, "--windows", "0", "--tokens", "0")
    assert result.code == 0, result.err
    assert "note: calibrated on 2 windows of 16 tokens of text, for this run only" in result.out
    assert f'fuseline analyze demo:tiny-decoder -p "{CHOOSE}" -o plan.json' in result.out


def test_a_model_without_a_tokenizer_is_calibrated_on_its_example(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "mlp.py").write_text(MLP)
    model, plan = f"py:{tmp_path / 'mlp.py'}:make", str(tmp_path / "plan.json")
    pipeline = CHOOSE.replace("r3,", "").replace("raise,", "raise{allow_empty},")
    refused = cli("run", model, "-p", pipeline)
    assert refused.code == 2 and f'try: fuseline analyze {model} -p "{pipeline}" -o plan.json' in refused.err
    made = cli("analyze", model, "-p", pipeline, "-o", plan)
    assert made.code == 0, made.err
    assert "calibrated on the model's example inputs, as it has no tokenizer" in made.out.replace("\n", " ")
    assert cli("run", model, "--plan", plan).code == 0


@pytest.mark.slow
def test_a_stopped_search_goes_on(cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[int] = []

    def stops(work, *arguments, **options):
        for number in work:
            if number == 6 and 6 not in taken:
                taken.append(number)
                raise KeyboardInterrupt
            taken.append(number)
            yield number

    monkeypatch.setattr(matrices, "steps", stops)
    out, progress = tmp_path / "plan.json", tmp_path / "progress"
    pipeline = LEARN.replace("steps=2", "steps=7")
    command = ("analyze", "demo:tiny-decoder", "-p", pipeline, "-o", str(out), *TEXT, "--checkpoint", str(progress))
    stopped = cli(*command)
    assert stopped.code == 130 and f"the same command goes on from {progress}" in stopped.err
    assert progress.exists() and not out.exists()
    other = cli(*command, "--windows", "2")
    assert other.code == 2 and "holds the progress of another search" in other.err
    assert cli(*command).code == 0
    assert taken == [0, 1, 2, 3, 4, 5, 6, 5, 6]  # it is kept after every fifth step
    assert out.exists() and not progress.exists()


@pytest.mark.slow
def test_the_page_is_true(cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands of docs/calibration.md, one after the other, and its Python."""
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"```(?:console|text)\n(.*?)```", page, re.DOTALL))
    commands = re.findall(r"^(?:\$ )?fuseline (.+)$", blocks, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["analyze", "run", "opt"]
    for command in commands:
        result = cli(*shlex.split(command))
        assert result.code == 0, result.err
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "block.py").write_text(block)
    runpy.run_path(str(tmp_path / "block.py"))
    assert Plan.load("plan.json").pipeline in block and not Path("progress.safetensors").exists()


def test_what_analyze_refuses(cli: Callable, tmp_path: Path) -> None:
    model, out = "demo:nothing", str(tmp_path / "plan.json")  # no model is looked for
    plain = cli("analyze", model, "-p", "raise,fuse", "-o", out)
    assert plain.code == 2 and "no pass of 'raise,fuse' decides from data" in plain.err
    assert "-o plan.json" in cli("analyze", model, "-p", LEARN, "-o", "plan.safetensors").err
    assert "no such folder" in cli("analyze", model, "-p", LEARN, "-o", str(tmp_path / "none" / "plan.json")).err
    (tmp_path / "plan.safetensors").touch()
    there = cli("analyze", model, "-p", LEARN, "-o", out)
    assert there.code == 2 and "plan.safetensors exists already" in there.err and "--force" in there.err
    forced = ("analyze", "demo:tiny-decoder", "-p", LEARN, "-o", out, "--force")
    odd = cli(*forced, "--windows", "5", "--batch", "2")
    assert odd.code == 2 and "5 windows fill no whole number of calls of 2" in odd.err and "--windows 4" in odd.err
    assert "holds no 4 windows of 10000000 tokens" in cli(*forced, "--length", "10000000").err
    assert (tmp_path / "plan.safetensors").stat().st_size == 0


def test_what_a_plan_is_refused_for(cli: Callable, learned: str, tmp_path: Path) -> None:
    other = cli("run", "demo:nothing", "-p", CHOOSE, "--plan", learned)
    assert other.code == 2 and "the plan was made for another pipeline" in other.err
    assert f"plan: {LEARN}" in other.err and f"here: {CHOOSE}" in other.err and "fuseline analyze" in other.err
    model = cli("opt", "demo:tiny-decoder", "--plan", learned, "--dtype", "bfloat16")
    assert model.code == 2 and "the plan was made for another model" in model.err
    assert "is bfloat16[" in model.err and "there\n" in model.err and "try: analyse this model" in model.err
    assert "no plan at" in cli("kernels", "demo:nothing", "--plan", str(tmp_path / "none.json")).err
    for verb in ("opt", "kernels", "compare", "diff"):
        missing = cli(verb, "demo:nothing", "-p", LEARN)
        assert missing.code == 2 and "'rotate' decides from data, and there is none" in missing.err
        assert f'try: fuseline analyze demo:nothing -p "{LEARN}" -o plan.json' in missing.err
    for verb, more in (("bisect", ()), ("reduce", ("-o", str(tmp_path / "small.py")))):
        refused = cli(verb, "demo:nothing", "-p", LEARN, "--check", "crash", *more)
        assert refused.code == 2 and f"'rotate' decides from data, and '{verb}' takes no plan" in refused.err
        assert f"fuseline {verb} DIR/00N_rotate.py" in refused.err
