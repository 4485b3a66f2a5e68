"""GPTQ and AWQ checkpoints: codes are loaded as codes, the logits are those of the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fuseline
from fuseline.compiler.precision import error
from fuseline.models import awq, gptq, load
from fuseline.models.coded import CodedLinear

pytest.importorskip("transformers")

from tests.exporting.plain import logits
from tests.models.checkpoints import Written, plain, write

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq 2 bits": ("gptq", {"bits": 2, "zeros_less": 1}),
    "gptq 3 bits": ("gptq", {"bits": 3, "zeros_less": 1, "group": 32}),
    "gptq 4 bits": ("gptq", {"zeros_less": 1}),
    "gptq 8 bits": ("gptq", {"bits": 8, "zeros_less": 1, "group": 8}),
    "gptq 8 bits, symmetric, rows": ("gptq", {"bits": 8, "symmetric": True, "group": -1, "zeros_less": 1}),
    "gptq symmetric": ("gptq", {"symmetric": True, "zeros_less": 1}),
    "gptq symmetric, zeros of v2 under the name of v1": ("gptq", {"symmetric": True}),
    "gptq v2": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "gptq v2, 3 bits": ("gptq", {"bits": 3, "checkpoint_format": "gptq_v2"}),
    "gptq planes, 3 bits": ("gptq", {"bits": 3, "checkpoint_format": "gptq_p"}),
    "gptq planes, 5 bits": ("gptq", {"bits": 5, "checkpoint_format": "gptq_p", "ordered": True}),
    "gptq planes, 7 bits": ("gptq", {"bits": 7, "checkpoint_format": "gptq_p", "symmetric": True}),
    "gptq planes, 8 bits": ("gptq", {"bits": 8, "checkpoint_format": "gptq_p"}),
    "gptq ordered": ("gptq", {"ordered": True, "zeros_less": 1}),
    "gptq ordered, 3 bits, symmetric": ("gptq", {"ordered": True, "bits": 3, "symmetric": True, "zeros_less": 1}),
    "awq": ("awq", {}),
    "awq rows": ("awq", {"group": -1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_expanded_weights(kind: str, tmp_path: Path) -> None:
    method, options = KINDS[kind]
    written = write(tmp_path, method, **options)
    model = load(f"hf:{tmp_path}", torch.float64).model
    linears = {name: m for name, m in model.named_modules() if isinstance(m, CodedLinear)}
    assert linears.keys() == written.weights.keys()
    for name, linear in linears.items():
        columns = slice(None) if linear.order is None else linear.order
        assert torch.equal(linear.weight, written.weights[name][:, columns]), "the product of a code and a scale"
        assert linear.scale.dtype == torch.float16 and not linear.codes.is_floating_point()
        assert (linear.zero is None) == bool(options.get("symmetric"))
    assert error(logits(model), logits(plain(written))) < 1e-12


PACKED = Path(__file__).parent / "packed" / "packed.safetensors"


@pytest.mark.parametrize("case", ["gptq2", "gptq3", "gptq4", "gptq8", "gptq_p3", "gptq_p6", "awq4"])
def test_what_their_own_packers_wrote(case: str) -> None:
    """AutoGPTQ's words, channels out of order, GPTQModel's planes, and AutoAWQ's."""
    tensors = {n.removeprefix(f"{case}."): t for n, t in load_file(PACKED).items() if n.startswith(f"{case}.")}
    weight = tensors.pop("weight")
    like = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    one = {"bits": int(case[-1]), "group": 16, "scales": "F16", "indices": True}
    in_planes = case.startswith("gptq_p")
    read = {"zeros_as_they_are": in_planes, "planes": in_planes, "symmetric": False, "ordered": True}
    module = awq.AwqLinear(like, one) if case == "awq4" else gptq.GptqLinear(like, one, read)
    module.load_state_dict(tensors, assign=True)
    made = module.finished("w")
    assert torch.equal(made.weight, weight if made.order is None else weight[:, made.order])
    assert (made.order is None) == (case == "awq4")


def test_codes_take_their_bits(tmp_path: Path) -> None:
    write(tmp_path, "gptq", bits=3, zeros_less=1)
    for module in load(f"hf:{tmp_path}").model.modules():
        if isinstance(module, CodedLinear):
            assert module.codes.numel() * 8 == module.in_features * module.out_features * 3


def test_a_captured_program_reads_codes(tmp_path: Path) -> None:
    """What `fuse` looks for: a linear of decoded codes, which are weights and are not computed."""
    write(tmp_path, "gptq", bits=3, ordered=True, zeros_less=1)
    loaded = load(f"hf:{tmp_path}")
    program = fuseline.capture(loaded.model, loaded.example_args, loaded.example_kwargs)
    decoded = [n for n in program.graph.nodes if n.target is fuseline.compiler.ops.decode.overload]
    assert len(decoded) == 14 and all(u.target is torch.ops.aten.linear.default for n in decoded for u in n.users)
    assert all("weight" in n.args[0].meta for n in decoded)


def test_bfloat16_rounds_weights_and_no_scales(tmp_path: Path) -> None:
    written = write(tmp_path, "gptq", zeros_less=1)
    for name, module in load(f"hf:{tmp_path}", torch.bfloat16).model.named_modules():
        if isinstance(module, CodedLinear):
            assert torch.equal(module.weight, written.weights[name].float().to(torch.bfloat16))


def test_linears_of_their_own_bits(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: other bits for some linears, which the tensors' shapes tell."""
    four, eight = (write(tmp_path / str(bits), "gptq", bits=bits, zeros_less=1) for bits in (4, 8))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        other = load_file(eight.folder / "model.safetensors")
        tensors |= {name: t for name, t in other.items() if "down_proj" in name}

    four.edit(change)
    four.config(dynamic={"+:.*down_proj.*": {"bits": 8}})
    four.weights |= {name: w for name, w in eight.weights.items() if "down_proj" in name}
    assert error(logits(load(f"hf:{four.folder}", torch.float64).model), logits(plain(four))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_saved_and_optimized(method: str, tmp_path: Path) -> None:
    options = {"ordered": True, "zeros_less": 1, "bits": 3} if method == "gptq" else {}
    written = write(tmp_path / "in", method, **options)
    model = fuseline.optimize(load(f"hf:{tmp_path / 'in'}", torch.float64).model, "raise,fuse", keep_originals=False)
    ours = logits(model)
    assert error(ours, logits(plain(written))) < 1e-12
    fuseline.save(model, tmp_path / "saved")
    assert torch.equal(logits(fuseline.load(tmp_path / "saved")), ours)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({name: tensor})


UP, OUT = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"
BROKEN: dict[str, tuple[Any, str]] = {
    "missing codes' scales": (drop(f"{UP}.scales"), f"the tensor '{UP}.scales' is missing"),
    "missing codes": (drop(f"{UP}.qweight"), f"lacks 1 weights that LlamaForCausalLM needs: {UP}.weight"),
    "missing norm": (drop("model.norm.weight"), "lacks 1 weights that LlamaForCausalLM needs: model.norm.weight"),
    "a bias": (put(f"{UP}.bias", torch.ones(64)), f"has 1 tensors that LlamaForCausalLM has no place for: {UP}.bias"),
    "a second weight": (put(f"{OUT}.weight", torch.ones(4, 4)), f"has no place for: {OUT}.weight"),
    "no such linear": (
        lambda t: t.update({k.replace("up_proj", "op_proj"): v.clone() for k, v in list(t.items()) if UP in k}),
        "'model.layers.0.mlp.op_proj.qweight' has no place in LlamaForCausalLM; did you mean",
    ),
    "a shape": (put(f"{OUT}.scales", torch.ones(3, 32).half()), f"'{OUT}.q"),
    "a kind": (put(f"{OUT}.qzeros", torch.ones(2, 4)), f"'{OUT}.qzeros' is F32 [2, 4], not int32"),
    "a scale of NaN": (
        lambda t: t[f"{OUT}.scales"].fill_(float("nan")),
        f"has weights that are not finite: {OUT}.scale",
    ),
    "a plain weight's shape": (put("model.norm.weight", torch.ones(7)), "model.norm.weight: [7], not [64]"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_broken_checkpoints_name_the_tensor(method: str, case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    written = write(tmp_path, method, zeros_less=int(method == "gptq"))
    written.edit(change)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(fuseline.UserError) as raised:
        load(f"hf:{tmp_path}")
    assert message in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tensors_of_zeros_and_of_other_modules_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write(tmp_path, "gptq", zeros_less=1)
    expected = logits(load(f"hf:{tmp_path}").model)
    written.edit(lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(64), "score.weight": torch.ones(2, 2)}))
    assert torch.equal(logits(load(f"hf:{tmp_path}").model), expected)
    assert "1 tensors of" in capsys.readouterr().err


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "marlin": ("gptq", {}, {"checkpoint_format": "marlin"}, "its codes are in the layout 'marlin'"),
    "int16": ("gptq", {}, {"pack_dtype": "int16"}, "its codes are packed in int16"),
    "gemv": ("awq", {}, {"version": "gemv"}, "its codes are in the layout 'gemv'"),
    "awq of 3 bits": ("awq", {}, {"bits": 3}, "it has codes of 3 bits"),
    "mixed symmetry": ("gptq", {}, {"dynamic": {"+:.*up.*": {"sym": True}}}, "has another sym than the rest"),
    "no symmetry": ("gptq", {}, {"sym": True}, "it says sym, and 'model.layers.0.self_attn.q_proj.qzeros' has"),
    "five bits without planes": ("gptq", {"bits": 5}, {}, "has codes of 5 bits"),
    "no order": ("gptq", {"ordered": True, "zeros_less": 1}, {"desc_act": False}, "it says that channels are in order"),
    "a zero point of v1": ("gptq", {"symmetric": False}, {"sym": False}, "zero points that are stored as 15"),
    "unknown": ("gptq", {}, {"quant_method": "gptp"}, "unknown quantization method 'gptp'; did you mean 'gptq'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    method, options, config, reason = REFUSED[case]
    write(tmp_path, method, **options).config(**config)
    with pytest.raises(fuseline.UserError) as raised:
        load(f"hf:{tmp_path}")
    assert reason in str(raised.value)


def test_groups_of_several_sizes_are_refused(tmp_path: Path) -> None:
    written: Written = write(tmp_path, "gptq", ordered=True, zeros_less=1)
    written.edit(lambda tensors: tensors[f"{UP}.g_idx"].fill_(0))
    with pytest.raises(fuseline.UserError, match="has groups that are not of 16 channels each"):
        load(f"hf:{tmp_path}")
