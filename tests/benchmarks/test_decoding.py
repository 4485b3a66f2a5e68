"""The decode loop is the model's own greedy decoding, and its floor counts the right bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


from decode import agreed, compared, parse
from decoding.loop import INPUTS, WARMUP, Loop
from decoding.model import SHAPES, State, build, cache_bytes, fitting, prompted, static_cache, weight_bytes
from decoding.options import prompt_length
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CPU, CAPACITY, PROMPT, STEPS = torch.device("cpu"), 24, 10, 12


@pytest.fixture(scope="module")
def model() -> Any:
    return build("tiny", None, CPU, torch.float32)


@pytest.fixture(scope="module")
def state(model: Any) -> State:
    return prompted(model, 2, PROMPT, CAPACITY, CPU)


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_loop_decodes_what_generate_does(model: Any, state: State, inputs: str) -> None:
    loop = Loop(model, model, state, CAPACITY, inputs)
    logits, tokens = loop.tokens(STEPS)
    expected = model.generate(
        state.prompt, attention_mask=torch.ones_like(state.prompt), max_new_tokens=STEPS + 1, do_sample=False
    )
    assert torch.equal(torch.cat([state.token, tokens], 1), expected[:, PROMPT:])
    assert len(set(tokens.flatten().tolist())) > 3  # the weights are random and not degenerate
    with torch.no_grad():
        whole = model(torch.cat([state.prompt, state.token], 1)).logits[:, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_a_restart_leaves_every_address(model: Any, state: State) -> None:
    loop = Loop(model, model, state, CAPACITY)
    tensors = [loop.token, loop.position, loop.mask, *(layer.keys for layer in loop.cache.layers)]
    tensors += [layer.cumulative_length for layer in loop.cache.layers]
    before = [(x.data_ptr(), x.clone()) for x in tensors]
    loop.warm_up()
    assert not torch.equal(loop.mask, before[2][1])
    loop.restart()
    assert all(x.data_ptr() == address and torch.equal(x, value) for x, (address, value) in zip(tensors, before))


def test_timed_steps(model: Any, state: State) -> None:
    decoded = Loop(model, model, state, CAPACITY).timed(4, 3)
    assert len(decoded.step.seconds) == 3 and len(decoded.host.seconds) == 12
    assert 0 < decoded.host.median < 1 and 0 < decoded.step.median < 1


def test_weights_are_the_same_each_time_and_logits_are_peaked(model: Any, state: State) -> None:
    again = build("tiny", None, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        logits = model(state.prompt).logits
    assert 3 < logits.std().item() < 5


def test_the_bytes_of_the_floor(model: Any) -> None:
    sizes = SHAPES["tiny"]
    hidden, inner, vocabulary, layers = 128, 256, 512, sizes["num_hidden_layers"]
    linears = 2 * hidden * hidden + 2 * hidden * (hidden // 2) + 3 * hidden * inner
    expected = layers * (linears + 2 * hidden) + hidden + hidden * vocabulary
    assert weight_bytes(model, 3) == 4 * (expected + 3 * hidden)
    one = cache_bytes(model, 2, 1)
    assert one * CAPACITY == sum(
        4 * (layer.keys.numel() + layer.values.numel()) for layer in static_cache(model, 2, CAPACITY, CPU).layers
    )


@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_as_many_layers_as_fit_in_half_of_the_memory(shape: str) -> None:
    most = SHAPES[shape]["num_hidden_layers"]
    assert fitting(shape, 1e12) == most and fitting(shape, 1e8) == 1
    with torch.device("meta"):
        models = [LlamaForCausalLM(LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": n})) for n in (1, 2)]
    one, two = (2 * sum(p.numel() for p in model.parameters()) for model in models)  # 16 bits
    for layers in (1, 3, most):
        needed = 2 * (one + (layers - 1) * (two - one))
        assert fitting(shape, needed) == layers and fitting(shape, needed - 2) == max(1, layers - 1)


def test_logits_and_tokens_beside_the_reference() -> None:
    reference = torch.tensor([[1.0, 2.0, 4.0]])
    assert compared(reference, reference) == {"error": 0.0, "kl": 0.0, "argmax_equal": True}
    other = compared(reference, torch.tensor([[5.0, 2.0, 4.0]]))
    assert other["error"] == 1.0 and other["kl"] > 0.1 and not other["argmax_equal"]
    assert agreed(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])) == 2
    assert agreed(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [9, 4]])) == 0


TINY = ("--model-shape", "tiny", "--cache-length", "48", "--steps", "8")


def rows(script: str, path: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Runs a benchmark without a GPU, and returns its rows by name."""
    command = [sys.executable, f"benchmarks/{script}", "--device", "cpu", "--json", str(path), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.slow
def test_decode_runs_without_a_gpu(tmp_path: Path) -> None:
    found = rows("decode.py", tmp_path / "decode.json", *TINY, "--only", "eager", "fuseline-bf16", "fuseline-int4")
    assert set(found) == {"eager", "fuseline-bf16", "fuseline-int4"}
    for row in found.values():
        assert "failed" not in row and min(row["ms"], row["tokens_s"], row["host_us"], row["floor_ms"]) > 0
        assert row["to_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    eager, ours, int4 = (found[name] for name in ("eager", "fuseline-bf16", "fuseline-int4"))
    assert (eager["error"], eager["tokens_equal"]) == (0.0, 8) and ours["argmax_equal"] and ours["kl"] < 1e-2
    assert ours["weight_bytes"] == pytest.approx(eager["weight_bytes"], rel=1e-2)
    assert int4["weight_bytes"] < 0.5 * ours["weight_bytes"] and 0 < int4["kl"] < 0.5


@pytest.mark.slow
def test_the_host_cost_runs_without_a_gpu(tmp_path: Path) -> None:
    found = rows("host_cost.py", tmp_path / "cost.json", *TINY, "--only", "fuseline-bf16", "fuseline-bf16-loops")
    assert [found[name]["checks"] for name in ("fuseline-bf16", "fuseline-bf16-loops")] == ["C++", "Python"]
    for row in found.values():
        assert row["step_us"] > row["executable_us"] > row["launch_us"] > 0 and row["captured"] is False
        assert {"executable", "weights", "key", "checks", "launch", "rest"} <= set(row["stages"])


@pytest.mark.slow
def test_the_language_model_runs_without_a_gpu(tmp_path: Path) -> None:
    words = (
        "--model",
        "demo:tiny-llama",
        "--tokens",
        "6",
        "--windows",
        "1",
        "--length",
        "32",
        "--pipeline",
        "raise,fuse",
    )
    found = rows("language_model.py", tmp_path / "model.json", *words)
    assert set(found) == {"eager", "raise,fuse"}
    assert found["raise,fuse"]["tokens_equal_to_eager"] == found["raise,fuse"]["tokens"] == 6
    assert found["raise,fuse"]["kl"] < 1e-2 and found["raise,fuse"]["graphs"] > 0 and found["eager"]["ms_per_token"] > 0


def test_a_cache_too_short_is_said() -> None:
    with pytest.raises(SystemExit, match="error: a cache of 50 slots holds no prompt and 64 steps"):
        prompt_length(parse(["--cache-length", "50"]))
    assert prompt_length(parse(["--cache-length", "100"])) == 100 - 64 - WARMUP
