"""The model's own arithmetic is that of plain autograd: products, rotation, and what the allocator is told about them."""

import resource
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.ranks import fork
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules import gemm
from modules.linear import Linear
from modules.lm_ops import rotary_table, rotate_interleaved
from training.memory.allocator import keep_freed_memory


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, drawn(*y.shape, seed=9, dtype=y.dtype))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_and_its_gradients_are_those_of_torch(has_bias: bool, dtype: torch.dtype) -> None:
    ours = Linear(24, 40, bias=has_bias).to(dtype)
    inputs = (drawn(2, 7, 24, dtype=dtype).requires_grad_(), *ours.parameters())
    expected = gradients(lambda x, *parameters: F.linear(x, *parameters), *inputs)
    for seen in (gradients(lambda x, *_: ours(x), *inputs), gradients(lambda x, *_: checkpoint(ours, x, use_reentrant=False), *inputs)):
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            assert one.is_contiguous()


def test_a_frozen_linear_forms_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[torch.Size] = []
    plain = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda x, weight, bias=None: (products.append(weight.shape), plain(x, weight, bias))[1])
    ours = Linear(24, 40).requires_grad_(False)
    x = drawn(3, 24).requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None
    assert len(products) == 2, "one forward, one gradient of x"


@pytest.mark.skipif(not gemm._HAS_ONEDNN, reason="this torch computes fp32 products elsewhere")
@pytest.mark.parametrize("shape", [(70, 48, 100), (17, 337, 45), (512, 64, 64), (1, 4096, 33), (16, 5000, 16)], ids=str)
def test_the_bits_of_a_product_do_not_depend_on_where_its_factors_lie(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    x, weight = drawn(rows, inner), drawn(columns, inner, seed=1)
    expected = gemm.linear(x, weight)
    for offset in (1, 5, 16):
        moved = torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x)
        moved_weight = torch.empty(weight.numel() + offset)[offset:].view_as(weight).copy_(weight)
        assert torch.equal(gemm.linear(moved, moved_weight), expected)
    assert torch.equal(gemm.linear(x.t().contiguous().t(), weight), expected)
    exact = x.double() @ weight.double().t()
    assert (expected - exact).norm() / exact.norm() < 1e-6, "fp32, not a shorter format"


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_bf16_on_a_processor_without_units_for_it_is_summed_in_fp32_and_rounded_once(
    is_transposed: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own loops for it took 260 times as long as fp32 for the product of a backward: GPT-J's first step never ended."""
    monkeypatch.setattr(gemm, "_HAS_BF16", False)
    monkeypatch.setattr(gemm, "WIDENED_BYTES", 4 * 7 * (48 + 10))  # seven rows of the weight: the last block is a part
    x = drawn(2, 5, 48).bfloat16()
    weight = drawn(48, 100, seed=1).bfloat16().t() if is_transposed else drawn(100, 48, seed=1).bfloat16()
    bias = drawn(100, seed=2).bfloat16() if has_bias else None
    blocks: list[int] = []
    product = gemm._in_fp32
    monkeypatch.setattr(gemm, "_in_fp32", lambda x, weight, bias: (blocks.append(len(weight)), product(x, weight, bias))[1])
    seen = gemm.linear(x, weight, bias)
    assert blocks == [7] * 14 + [2]
    assert (seen.dtype, seen.shape, seen.is_contiguous()) == (torch.bfloat16, (2, 5, 100), True)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert ((seen.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001 + 1e-5).all(), "half a place of bf16"


@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_rotation_turns_pairs_by_position_times_frequency(rotary_dim: int) -> None:
    x, positions = drawn(2, 5, 3, 16), torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    seen = rotate_interleaved(x, rotary_table(5, rotary_dim)[positions][:, :, None])
    for i in range(rotary_dim // 2):
        angle = (positions / 10000.0 ** (2 * i / rotary_dim))[:, :, None]
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        torch.testing.assert_close(seen[..., 2 * i], even * angle.cos() - odd * angle.sin())
        torch.testing.assert_close(seen[..., 2 * i + 1], odd * angle.cos() + even * angle.sin())
    assert torch.equal(seen[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("head_width", [15, 16])
def test_heads_of_odd_width_are_turned_too(head_width: int) -> None:
    """Their pairs do not all start at even places, which complex numbers must; torch then refuses to view them as such."""
    projected, rotary = drawn(2, 5, 3 * head_width).requires_grad_(), rotary_table(5, 4)[None, :, None]
    seen = rotate_interleaved(projected.view(2, 5, 3, head_width), rotary)
    for head in range(3):
        alone = rotate_interleaved(projected[..., head * head_width : (head + 1) * head_width].reshape(2, 5, 1, head_width), rotary)
        torch.testing.assert_close(seen[:, :, head : head + 1], alone)
    seen.sum().backward()
    assert projected.grad is not None and projected.grad.isfinite().all()


@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_the_gradient_of_the_rotation_is_the_rotation_back(rotary_dim: int) -> None:
    x, y_grad, rotary = drawn(1, 5, 3, 16).requires_grad_(), drawn(1, 5, 3, 16, seed=1), rotary_table(5, rotary_dim)[None, :, None]
    (x_grad,) = torch.autograd.grad(rotate_interleaved(x, rotary), x, y_grad)
    torch.testing.assert_close(x_grad, rotate_interleaved(y_grad, rotary.conj()))


def test_freed_memory_is_used_again_without_page_faults(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def work() -> int:
        keep_freed_memory()
        faults = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(2**20) for _ in range(16)]  # 64 MiB in all
            del blocks
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(faults)
        return 0 if faults[-1] < faults[0] / 4 else 1  # a block may find no place of its size

    process = fork(work, tmp_path / "output")
    assert process.wait(30) == 0, process.text
