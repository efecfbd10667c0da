"""Frozen linears and embeddings in 8 and 4 bits: how far from the weights they hold, what they keep, and what may stand on them."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from modules import quantized
from modules.families import read_model_config
from modules.linear import Linear, WeightGradients, linears
from modules.lm_ops import Segments
from modules.quantized import (
    Int8Embedding,
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    check_nf4_available,
    quantize_linears,
    quantized_parts,
)
from modules.stage import empty_stage, layer_key, meta_stage
from user_error import UserError

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GPTJ = {"model_type": "gptj", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
NEOX = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.5, "hidden_act": "gelu"}


@pytest.fixture(params=["int8", "nf4"])
def kind(request: pytest.FixtureRequest) -> type[QuantizedLinear]:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return {"int8": Int8Linear, "nf4": Nf4Linear}[request.param]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(kind: type[QuantizedLinear], weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    linear = kind(weight.shape[1], weight.shape[0], bias_dtype=None if bias is None else bias.dtype)
    linear.fill_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make, and the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.known.add(tensor.untyped_storage())  # was there before
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, num_bytes: int) -> None:
        self.alive -= num_bytes


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_int8_is_half_a_step_from_the_weight_and_a_row_of_zeros_stays_one(dtype: torch.dtype) -> None:
    weight = drawn(40, 24, dtype=dtype) * torch.logspace(-6, 3, 40).to(dtype)[:, None]
    weight[7] = 0
    linear = filled(Int8Linear, weight)
    seen, scale = linear.dequantized(), linear.weight_scale
    assert linear.weight.dtype == torch.int8
    assert scale.dtype == seen.dtype == torch.float32
    torch.testing.assert_close(scale, weight.float().abs().amax(1) / 127)
    assert ((weight.float() - seen).abs() <= 0.5 * scale[:, None] * (1 + 1e-4)).all()
    assert (linear.weight.abs().amax(1) == 127).sum() == 39
    assert scale[7] == 0
    assert not seen[7].any()
    assert linear(drawn(3, 24)).isfinite().all()


def test_rows_at_the_ends_of_fp32_neither_wrap_around_nor_overflow() -> None:
    weight = torch.full((3, 8), 1e-44)
    weight[1] = 2.6e-43  # 185 times the smallest number there is, which is the scale of this row
    weight[2] = 3e38
    seen = filled(Int8Linear, weight).dequantized()
    assert seen.isfinite().all()
    assert (seen[:2] >= 0).all() and (seen[:2] <= weight[:2]).all()
    torch.testing.assert_close(seen[2], weight[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_row_and_value(value: float, kind: type[QuantizedLinear], monkeypatch) -> None:
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 4 * 64 * 3)
    weight = drawn(8, 64)
    weight[5, 3] = value
    told = rf"must be finite; h.0.q_proj.weight holds {value} in row 5, column 3"
    with pytest.raises(UserError, match=told):
        kind(64, 8, bias_dtype=None).fill_(weight, "h.0.q_proj.weight")
    with pytest.raises(UserError, match=told):
        Int8Embedding(8, 64, out_dtype=torch.float32).fill_(weight, "h.0.q_proj.weight")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("outliers", "most"), [("none", 0.8), ("activations", 0.95), ("weights", 1), ("both", 1.002)])
def test_the_error_of_int8_is_at_most_that_of_llm_int8(outliers: str, most: float, dtype: torch.dtype) -> None:
    """bitsandbytes' own, with its threshold of 6.0. Where outliers of weights meet those of activations, what is lost is almost only the
    rounding of the weights, which both share: there the two are equal but for chance."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight, x = drawn(256, 512) * 0.02, drawn(256, 512, seed=1)
    if outliers in ("weights", "both"):
        weight[3] *= 30
        weight[drawn(256, 512, seed=2) > 2.9] *= 15
    if outliers in ("activations", "both"):
        x[:, [7, 100]] *= 30
    weight, x = weight.half().float(), x.to(dtype)  # LLM.int8 reads its weights in fp16
    expected = x.double() @ weight.double().T
    other = bitsandbytes.nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False, threshold=6.0)
    other.weight = bitsandbytes.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    other = other.to("cpu").eval()  # while it trains on a CPU it leaves the activations as they are
    ours, theirs = distance(filled(Int8Linear, weight)(x), expected), distance(other(x), expected)
    assert 0.002 < ours <= theirs * most


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_gradients_are_those_of_the_dequantised_weight(
    kind: type[QuantizedLinear], dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = filled(kind, drawn(48, 64) * 0.1, drawn(48, seed=1).to(dtype) if has_bias else None)
    x, grad = drawn(2, 5, 64, seed=2, dtype=dtype).requires_grad_(), drawn(2, 5, 48, seed=3, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, linear.dequantized().double(), linear.bias.double() if has_bias else None)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    used = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        used.append((x.dtype, weight.dtype))
        return gemm_linear(x, weight, bias)

    gemm_linear = quantized.gemm.linear
    monkeypatch.setattr(quantized.gemm, "linear", product)
    y = linear(x)
    (seen_grad,) = torch.autograd.grad(y, x, grad)
    assert used == [(dtype, dtype)] * 2
    assert (y.shape, y.dtype, seen_grad.dtype) == ((2, 5, 48), dtype, dtype)
    close = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for seen, wanted in ((y, expected), (seen_grad, expected_grad)):
        assert distance(seen, wanted) < close
        assert dtype == torch.float32 or distance(seen, wanted) > 1e-5
    assert linear.weight.grad is None
    assert all(not parameter.requires_grad for parameter in linear.parameters())


def test_the_two_products_of_a_head_are_its_forward_and_backward_without_gradients(kind: type[QuantizedLinear]) -> None:
    linear = filled(kind, drawn(48, 64), drawn(48, seed=1))
    x, grad = drawn(7, 64, seed=2).requires_grad_(), drawn(7, 48, seed=3)
    y = linear(x)
    assert torch.equal(linear.product(x), y) and not linear.product(x).requires_grad
    assert torch.equal(linear.product_transposed(grad), torch.autograd.grad(y, x, grad)[0])
    half = linear.product(x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half.bfloat16(), linear(x.bfloat16()))
    assert linear.product_transposed(grad.bfloat16()).dtype == torch.bfloat16


def test_fp16_overflows_only_where_the_result_does() -> None:
    """The int8 numbers themselves would add up to 127 * 64 * 100, twelve times what fp16 holds."""
    weight = drawn(7, 64).sign() * torch.tensor([1e-7, 1e-4, 0.02, 1.0, 9.0, 60000.0, 500000.0])[:, None]
    linear = filled(Int8Linear, weight)
    x = torch.full((3, 64), 100.0, dtype=torch.float16) * weight[3].half()  # row 3 adds up all of it
    y = linear(x)
    expected = x.double() @ weight.double().T
    fits = expected.abs() < 65000
    assert fits[:, :4].all() and (y.isfinite() == fits).all()
    assert expected[0, 3] == 6400
    torch.testing.assert_close(y[fits].double(), expected[fits], rtol=1e-3, atol=1e-6)
    small = torch.full((1, 64), 1e-3, dtype=torch.float16)  # with which the largest weights do not overflow either
    torch.testing.assert_close(linear(small).double(), small.double() @ weight.double().T, rtol=1e-3, atol=1e-6)
    grad = torch.tensor([[1000.0, 1000.0, 1000.0, 1000.0, 100.0, 0.01, 0.001]], dtype=torch.float16)
    torch.testing.assert_close(linear.product_transposed(grad).double(), grad.double() @ weight.double(), rtol=5e-3, atol=1)


def saved_for_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        assert function(x).requires_grad
    return saved


def test_a_forward_keeps_nothing_for_its_backward(kind: type[QuantizedLinear]) -> None:
    x = drawn(5, 64).requires_grad_()
    assert saved_for_backward(Linear(64, 48), x)  # what another linear keeps is seen
    assert saved_for_backward(filled(kind, drawn(48, 64), drawn(48)), x) == []
    kept = weakref.ref(product := x * 2)
    y = filled(kind, drawn(48, 64))(product)
    del product
    assert kept() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", FLOATS)
def test_recomputation_gives_the_same_bits(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    first, second = filled(kind, drawn(96, 64) * 0.1, drawn(96)), filled(kind, drawn(64, 96) * 0.1, drawn(64))

    def both(x: Tensor) -> Tensor:
        return second(F.gelu(first(x)))

    plain, again = (drawn(3, 64, dtype=dtype).requires_grad_() for _ in range(2))
    one, other = both(plain), checkpoint(both, again, use_reentrant=False)
    one.square().sum().backward()
    other.square().sum().backward()
    assert torch.equal(one, other)
    assert torch.equal(plain.grad, again.grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(130, 64), (130, 48), (7, 33)])
def test_where_blocks_end_changes_nothing(kind: type[QuantizedLinear], rows: int, columns: int, dtype: torch.dtype, monkeypatch) -> None:
    linear = filled(kind, drawn(rows, columns) * 0.1, drawn(rows))
    x, grad = drawn(4, columns, dtype=dtype), drawn(4, rows, dtype=dtype)
    whole = linear.dequantized(), linear(x), linear.product_transposed(grad)
    seen_blocks = set()
    for num_rows in (1, 3, 64, 100):
        monkeypatch.setattr(quantized, "BLOCK_BYTES", num_rows * columns * dtype.itemsize)
        seen_blocks.add(len(list(linear._blocks(x))))
        assert torch.equal(linear.dequantized(), whole[0])
        for seen, expected in zip((linear(x), linear.product_transposed(grad)), whole[1:], strict=True):
            assert distance(seen, expected) < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert len(seen_blocks) > 1 or (kind is Nf4Linear and columns == 33)  # 64 rows of 33 at least, and there are 7


def test_where_blocks_end_changes_no_bit_of_sums_that_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, grad = (torch.randint(-126, 127, shape, generator=generator).float() for shape in ((130, 64), (9, 64), (9, 130)))
    weight[:, 0] = 127.0
    weight *= 2.0 ** torch.randint(-1, 2, (130, 1), generator=generator)  # so a scale is a power of two
    linear = filled(Int8Linear, weight)
    assert torch.equal(linear.dequantized(), weight)
    for num_rows in (1, 7, 64, 1000):
        monkeypatch.setattr(quantized, "BLOCK_BYTES", num_rows * 64 * 4)
        assert torch.equal(linear(x), (x.double() @ weight.double().T).float())
        assert torch.equal(linear.product_transposed(grad), (grad.double() @ weight.double()).float())


@given(num_rows=st.integers(1, 500), bytes_per_row=st.integers(1, 99), most=st.integers(1, 9999), multiple=st.sampled_from([1, 2, 16, 64]))
def test_slices_of_rows_cover_all_within_the_bound_from_multiples(num_rows: int, bytes_per_row: int, most: int, multiple: int) -> None:
    slices = quantized._row_ranges(num_rows, bytes_per_row, most, multiple)
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(num_rows))
    lengths = [rows.stop - rows.start for rows in slices]
    assert all(length * bytes_per_row <= most or length <= multiple for length in lengths)
    assert all(rows.start % multiple == 0 for rows in slices)
    assert max(lengths) == lengths[0] and len(set(lengths[:-1])) <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_filling_from_a_mapped_file_takes_a_few_chunks_and_leaves_the_file_alone(
    kind: type[QuantizedLinear], dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    weight = drawn(1024, 256, dtype=dtype)
    (path := tmp_path / "weight").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=True, size=weight.numel(), dtype=dtype).view(weight.shape)
    linear, embedding = kind(256, 1024, bias_dtype=None), Int8Embedding(1024, 256, out_dtype=torch.float32)
    whole = filled(kind, weight)
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 32 * 256 * 4)
    for module in (linear, embedding):
        with Allocations() as allocations:
            module.fill_(mapped)
        assert quantized.CHUNK_BYTES < allocations.peak < 4.6 * quantized.CHUNK_BYTES  # (what is inside bitsandbytes is not seen)
    assert torch.equal(linear.weight, whole.weight) and torch.equal(linear.weight_scale, whole.weight_scale)
    assert path.read_bytes() == weight.view(torch.uint8).numpy().tobytes()


def test_no_step_makes_the_whole_weight(kind: type[QuantizedLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = filled(kind, drawn(1024, 256)), drawn(4, 256).requires_grad_()
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 32 * 256 * 4)
    with Allocations() as allocations:
        linear(x).sum().backward()
    assert quantized.BLOCK_BYTES < allocations.peak < 4 * quantized.BLOCK_BYTES  # of 32; the activations are half a block


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 100), (7, 33)])
def test_nf4_is_bitsandbytes_own_whatever_the_shape_and_the_chunks(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(rows, columns)
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 1)
    linear = filled(Nf4Linear, weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    num_whole = rows * columns // 64
    assert torch.equal(linear.weight[:num_whole].flatten(), packed[: num_whole * 32, 0])
    torch.testing.assert_close(linear.weight_scale[:num_whole], state.absmax[:num_whole], rtol=0, atol=0)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: weight.numel()]
    values = functional.get_4bit_type("nf4", device="cpu")[codes.long()]
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    expected = values * blocks.abs().amax(1).repeat_interleave(64)[: weight.numel()]
    torch.testing.assert_close(linear.dequantized(), expected.view(rows, columns), rtol=1e-6, atol=1e-6)
    assert 0.02 < distance(linear.dequantized(), weight) < 0.15
    assert linear.weight.numel() + 4 * linear.weight_scale.numel() <= (0.5 + 4 / 64) * weight.numel() + 36


def test_nf4_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    check_nf4_available("cpu")

    def no_kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel for this backend")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "quantize_4bit", no_kernel)
        with pytest.raises(UserError, match=r"nf4 needs a bitsandbytes that can quantise on cpu; .* no kernel for this backend.*int8"):
            check_nf4_available("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(state.shape))
        with pytest.raises(UserError, match=r"off by 1.*pip install -U bitsandbytes"):
            check_nf4_available("cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    for attempt in (lambda: check_nf4_available("cpu"), lambda: Nf4Linear(64, 8, bias_dtype=None, device="meta")):
        with pytest.raises(UserError, match=r"needs the package bitsandbytes.*pip install bitsandbytes"):
            attempt()


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_embedding_returns_its_rows_rounded_once(dtype: torch.dtype) -> None:
    weight = drawn(96, 32)
    weight[5] = 0
    embedding = Int8Embedding.like(nn.Embedding(96, 32), dtype)
    embedding.fill_(weight)
    ids = torch.tensor([[3, 95, 5], [0, 3, 3]])
    rows = embedding(ids)
    assert (rows.shape, rows.dtype, rows.requires_grad) == ((2, 3, 32), dtype, False)
    assert torch.equal(rows, embedding.dequantized()[ids].to(dtype))
    assert ((embedding.dequantized() - weight).abs() <= 0.5 * embedding.weight_scale[:, None] * (1 + 1e-4)).all()
    assert 0.001 < distance(embedding.dequantized(), weight) < 0.02


@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("description", [GPTJ, NEOX], ids=["gptj", "gptneox"])
def test_a_stage_is_quantised_under_its_names_and_computes_nearly_the_same(
    kind: type[QuantizedLinear], description: dict[str, Any], with_ends: bool
) -> None:
    config = read_model_config(description)
    plain = empty_stage(config, 0, 2)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(plain.named_parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed) * 0.2 + (parameter.ndim == 1 and name.endswith("weight")))
    stage, names = meta_stage(config, 0, 2), {name for name, _ in plain.named_parameters()}
    quantize_linears(stage, "int8" if kind is Int8Linear else "nf4", with_ends=with_ends, bias_dtype=torch.float32)
    parts = quantized_parts(stage)
    of_blocks = [name for name, part in plain.named_modules() if isinstance(part, Linear)]
    ends = ["transformer.wte", "lm_head"] if description is GPTJ else ["gpt_neox.embed_in", "embed_out"]
    assert sorted(parts) == sorted(of_blocks + (ends if with_ends else []))
    assert {name: type(parts[name]) for name in of_blocks} == dict.fromkeys(of_blocks, kind)
    assert not with_ends or (type(parts[ends[0]]), type(parts[ends[1]])) == (Int8Embedding, Int8Linear)
    assert {name for name, _ in stage.named_parameters()} == names | {f"{name}.weight_scale" for name in parts}
    assert {layer_key(f"{name}.weight_scale") for name in parts} == {layer_key(f"{name}.weight") for name in parts}
    assert all(parameter.is_meta for parameter in stage.parameters())

    stage.to_empty(device="cpu")
    values = dict(plain.named_parameters())
    with torch.no_grad():
        for name, part in parts.items():
            part.fill_(values[f"{name}.weight"], f"{name}.weight")
        for name, parameter in stage.named_parameters():
            if name.removesuffix(".weight_scale") == name and name.removesuffix(".weight") not in parts:
                parameter.copy_(values[name])
    tokens = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    segments = Segments.from_positions(torch.arange(8).expand(2, 8))
    one, other = (each.logits(each(tokens, segments)) for each in (stage, plain))
    assert 1e-3 < distance(one, other) < (0.05 if kind is Int8Linear else 0.4)


def test_a_quantised_linear_leaves_no_weight_gradient_over(kind: type[QuantizedLinear]) -> None:
    stage = nn.Sequential(Linear(64, 64), filled(kind, drawn(64, 64)))
    queue = WeightGradients(on_final=lambda parameter: None)
    for linear in linears(stage):
        linear.weight_gradients = queue
    stage(drawn(3, 64)).sum().backward()
    assert len(linears(stage)) == 1
    queue.add_next()
    assert queue.next_micro_batch is None
    assert stage[0].weight.grad is not None and stage[1].weight.grad is None


def test_filled_weights_are_not_quantised_by_accident_nor_scales_converted(kind: type[QuantizedLinear]) -> None:
    with pytest.raises(AssertionError, match="which would be lost"):
        quantize_linears(empty_stage(read_model_config(GPTJ), 0, 1), "int8", with_ends=False, bias_dtype=torch.float32)
    linear = filled(kind, drawn(8, 64)).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="scales are fp32"):
        linear(drawn(1, 64))
    with pytest.raises(AssertionError, match=r"lm_head.weight is"):
        kind(64, 8, bias_dtype=None).fill_(drawn(64, 8), "lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_of_peft_trains_on_top_as_on_the_dequantised_weight(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    base = filled(kind, drawn(48, 64) * 0.1, drawn(48))
    plain = nn.Linear(64, 48)
    plain.load_state_dict({"weight": base.dequantized(), "bias": base.bias})
    x, target = drawn(16, 64, seed=4, dtype=dtype), drawn(16, 48, seed=5)
    results = []
    for linear in (base, plain):
        model = nn.Sequential(nn.Identity(), linear)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["1"]), model)
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in adapters)
        optimizer, losses = torch.optim.SGD(adapters, lr=0.5), []
        for _ in range(20):
            entering = x.detach().to(linear.bias.dtype if linear is plain else dtype).requires_grad_()  # as behind a layer that is trained
            loss = (checkpoint(model, entering, use_reentrant=False).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        results.append((losses, entering.grad))
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert results[0][0] == pytest.approx(results[1][0], rel=close)
    assert distance(results[0][1], results[1][1]) < close
