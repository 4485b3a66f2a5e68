"""The claims on real weights: SmolLM2-135M-Instruct through capture, passes, backend and generate()."""

from __future__ import annotations

import copy

import pytest
import torch

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.outline import inline
from fuseline.compiler.provenance import source_line
from fuseline.models.spec import load
from tests.helpers.models import error

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")
PROMPT = "The history of the steam engine began when"


@pytest.fixture(scope="module")
def demo():
    return load("demo:smollm2")


def test_raise_and_fuse_find_everything_and_change_nothing(demo):
    ids = torch.tensor([demo.encode(PROMPT * 3)])
    program = fuseline.capture(demo.model, (ids,), {"use_cache": False})
    after, report = fuseline.Pipeline("raise,fuse").run(program, verification="full")
    rules = report["raise"].rules
    assert (rules["RMSNorm"], rules["SwiGLU"], rules["Attention"], rules["RotaryPair"]) == (61, 30, 30, 30)
    assert not report["raise"].refused
    attentions = [n for n in inline(after.module).graph.nodes if n.target is ops.attention.overload]
    assert len(attentions) == 30 and all(n.args[5] == "causal" for n in attentions)
    computing = [n for n in after.graph.nodes if n.op in ("call_function", "call_module")]
    assert sum(source_line(n) is not None for n in computing) >= 0.99 * len(computing)
    with torch.no_grad():
        expected = demo.model(ids, use_cache=False).logits
        actual = after.to_module()(ids, use_cache=False).logits
    assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_eager(demo, cache):
    ids = torch.tensor([demo.encode(PROMPT)])
    settings = {"max_new_tokens": 64, "do_sample": False, "cache_implementation": None if cache == "dynamic" else cache}
    expected = demo.model.generate(ids, **settings)
    torch.compiler.reset()
    compiled = copy.deepcopy(demo.model)
    found = []
    compiled.compile(backend="fuseline", options={"pipeline": "raise,fuse", "record": found.append})
    assert torch.equal(compiled.generate(ids, **settings), expected)
    print(f"{cache} cache: {len(found)} graphs reached the backend")
    assert 2 <= len(found) <= 3
    assert all(c.report["raise"].rules["RMSNorm"] == 61 for c in found)


def test_int8_keeps_the_perplexity(demo):
    from fuseline.models import metrics, text

    windows = text.windows(text.evaluation_text(), demo.encode, 256, 6)
    torch.compiler.reset()
    compiled = fuseline.optimize(copy.deepcopy(demo.model), "raise,quantize{weights=int8},fuse")

    def logits(model):
        return lambda ids: model(ids, use_cache=False).logits.detach()

    with torch.no_grad():
        compared = metrics.compare(logits(demo.model), logits(compiled), windows)
    assert compared.perplexity_after <= 1.01 * compared.perplexity_before
    assert compared.top1 > 0.95
