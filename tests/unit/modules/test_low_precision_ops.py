"""Hidden states in bf16 and fp16: every operation of the model computes in fp32 and rounds once, and sums of gradients stay in fp32."""

from collections.abc import Callable

import pytest
import torch
from support.ranks import REPOSITORY
from support.tiers import sample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules import gemm
from modules.gptj import GPTJConfig
from modules.gptneox import GPTNeoXConfig
from modules.lm_ops import (
    IGNORED_TARGET,
    LayerNorm,
    Segments,
    chunked_cross_entropy,
    packed_causal_attention,
    rotary_table,
    rotate_halves,
    rotate_interleaved,
)
from modules.model_config import ModelConfig
from modules.quantized import Int8Linear

HAS_CUDA = torch.cuda.is_available()
SHORT = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU"))]
ONE_ROUNDING = 1.02  # in roundings of the exact result; fp32's own errors leave some of them on the other side
GPTJ = {"model_type": "gptj", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
NEOX = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.5, "hidden_act": "gelu"}
CONFIGS: dict[str, ModelConfig] = {
    "gptj": GPTJConfig.from_hf(GPTJ),
    "gptneox": GPTNeoXConfig.from_hf(NEOX),
    "gptneox sequential": GPTNeoXConfig.from_hf({**NEOX, "use_parallel_residual": False}),
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of the inputs for one fixed gradient of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, drawn(*y.shape, seed=9).bfloat16().to(y))


def distance(seen: Tensor, exact: Tensor) -> float:
    """Relative."""
    exact = exact.double()
    return ((seen.double() - exact).norm() / exact.norm()).item()


def roundings(seen: Tensor, exact: Tensor) -> float:
    """The error of ``seen`` in units of what rounding ``exact`` to the same dtype costs."""
    return distance(seen, exact) / distance(exact.to(seen.dtype), exact)


def with_bf16_numbers(block: nn.Module, seed: int = 0) -> nn.Module:
    """``block`` with random numbers that every dtype here holds: no small ones, and of few bits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            values = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim == 2 else 0.3)
            parameter.copy_((values * 1024).round().clamp(-127, 127) / 1024 + (parameter.ndim == 1))
    return block


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
@pytest.mark.parametrize(("head_width", "rotary_dim"), [(16, 8), (16, 16), (15, 4)])
def test_a_rotation_is_rounded_once_and_so_is_its_gradient(
    rotate: Callable[[Tensor, Tensor], Tensor], head_width: int, rotary_dim: int, dtype: torch.dtype, device: str
) -> None:
    rotary = rotary_table(50, rotary_dim, device=device)[None, :, None]
    x = drawn(3, 50, 4, head_width, dtype=dtype, device=device)
    seen = gradients(lambda x: rotate(x, rotary), x)
    exact = gradients(lambda x: rotate(x, rotary.to(torch.complex128)), x.double())
    for one, other in zip(seen, exact, strict=True):
        assert one.dtype == dtype
        assert roundings(one[..., :rotary_dim], other[..., :rotary_dim]) <= ONE_ROUNDING
        assert torch.equal(one[..., rotary_dim:].double(), other[..., rotary_dim:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("starts", [(0,), (0, 20, 290)], ids=["whole", "packed"])
def test_attention_adds_up_in_fp32_also_over_many_tokens(starts: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """torch's own CPU kernel is 1.3 roundings off, and its gradients of k and v 2 to 3, more the longer the sequence is."""
    positions = torch.arange(400)[None].clone()
    for start in starts:
        positions[0, start:] = torch.arange(400 - start)
    segments = Segments.from_positions(positions)
    q, k, v = (drawn(1, 2, 400, 32, seed=seed, dtype=dtype, device=device) for seed in range(3))
    seen = gradients(lambda q, k, v: packed_causal_attention(q, k, v, segments), q, k, v)
    exact = gradients(lambda q, k, v: packed_causal_attention(q, k, v, segments), q.double(), k.double(), v.double())
    for one, other in zip(seen, exact, strict=True):
        assert one.dtype == dtype
        assert roundings(one, other) <= (ONE_ROUNDING if device == "cpu" else 4), "the kernels of a GPU round the probabilities"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("weight_dtype", ["same", torch.float32])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_layernorm_adds_up_in_fp32_and_so_do_the_gradients_of_its_weights(
    is_recomputed: bool, weight_dtype: torch.dtype | str, dtype: torch.dtype, device: str
) -> None:
    """torch's own adds these up in the dtype of x on a CPU: 7 % wrong after 4096 rows of bf16."""
    norm = with_bf16_numbers(LayerNorm(64)).to(device, dtype if isinstance(weight_dtype, str) else weight_dtype)
    for parameter in norm.parameters():
        parameter.grad_dtype = torch.float32
    x = (drawn(4096, 64, device=device) + 1).to(dtype).requires_grad_()
    y_grad = drawn(4096, 64, seed=1, dtype=dtype, device=device)
    y = checkpoint(norm, x, use_reentrant=False) if is_recomputed else norm(x)
    y.backward(y_grad)
    exact_norm = nn.LayerNorm(64).to(device)
    exact_norm.load_state_dict(norm.state_dict())
    exact_x, exact_norm = x.detach().double().requires_grad_(), exact_norm.double()
    exact = exact_norm(exact_x)
    exact.backward(y_grad.double())
    assert x.grad is not None and y.dtype == x.grad.dtype == dtype
    assert roundings(y, exact) <= ONE_ROUNDING
    is_native = device == "cuda" and weight_dtype == "same"  # its kernel adds up in fp32 and rounds to the dtype of the weight
    assert roundings(x.grad, exact_x.grad) <= (2 if is_native else ONE_ROUNDING)  # type: ignore[arg-type]
    for parameter, other in zip(norm.parameters(), exact_norm.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert distance(parameter.grad, other.grad) <= (3e-3 if is_native else 1e-5)  # type: ignore[arg-type]


def test_a_layernorm_in_fp32_is_torchs_to_the_bit_and_a_weight_in_fp16_is_only_stored_so() -> None:
    x, norm, plain = drawn(70, 64), with_bf16_numbers(LayerNorm(64)), nn.LayerNorm(64)
    plain.load_state_dict(norm.state_dict())
    expected = [x.clone() for x in gradients(plain, x)]
    assert all(torch.equal(one, other) for one, other in zip(gradients(norm, x), expected, strict=True))
    stored = with_bf16_numbers(LayerNorm(64)).half()
    assert all(torch.equal(one, other) for one, other in zip(gradients(stored, x), expected, strict=True))
    plain(x).sum().backward()
    stored(x).sum().backward()
    assert stored.weight.grad is not None and stored.weight.grad.dtype == torch.float16, "grad_dtype has not been set"
    torch.testing.assert_close(stored.weight.grad.float(), plain.weight.grad, rtol=1e-3, atol=1e-2)


def test_a_frozen_layernorm_forms_the_gradient_of_its_input_alone() -> None:
    norm = with_bf16_numbers(LayerNorm(64)).bfloat16().requires_grad_(False)
    x = drawn(5, 64, dtype=torch.bfloat16).requires_grad_()
    norm(x).float().square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and norm.weight.grad is None and norm.bias.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("norms", ["same", "fp32"])
@pytest.mark.parametrize("dtype", SHORT)
def test_a_block_in_a_short_dtype_is_near_the_one_in_fp32(dtype: torch.dtype, norms: str, name: str, device: str) -> None:
    config = CONFIGS[name]
    block, exact = (with_bf16_numbers(config.block()).to(device) for _ in range(2))
    block.to(dtype)
    for part in block.modules():
        if norms == "fp32" and isinstance(part, nn.LayerNorm):
            part.float()
    x = drawn(2, 24, 64, dtype=dtype, device=device)
    segments = Segments.from_positions(torch.cat((torch.arange(9), torch.arange(15))).expand(2, 24))
    rotary = rotary_table(24, config.rotary_dim, device=device)[segments.positions.to(device)][:, :, None]
    y, x_grad = gradients(lambda x: block(x, segments, rotary), x)
    expected, expected_grad = gradients(lambda x: exact(x, segments, rotary), x.float())
    assert y.dtype == x_grad.dtype == dtype
    for one, other in ((y, expected), (x_grad, expected_grad)):
        assert 0 < roundings(one, other) < 8, "ten roundings or so, one after another"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_stored_in_fp16_computes_what_the_same_numbers_in_fp32_compute(name: str) -> None:
    config = CONFIGS[name]
    block, wide = with_bf16_numbers(config.block()).half(), with_bf16_numbers(config.block())
    for parameter in block.parameters():
        parameter.grad_dtype = torch.float32
    segments = Segments.from_positions(torch.arange(24).expand(2, 24))
    rotary = rotary_table(24, config.rotary_dim)[segments.positions][:, :, None]
    for model in (block, wide):
        model(drawn(2, 24, 64), segments, rotary).square().sum().backward()
    for one, other in zip(block.parameters(), wide.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def head_problem(
    rows: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, nn.Parameter, nn.Parameter]:
    weight = nn.Parameter(drawn(333, 48, seed=1, dtype=torch.bfloat16, device=device).mul_(0.25).to(weight_dtype))
    bias = nn.Parameter(drawn(333, seed=2, dtype=torch.bfloat16, device=device).to(weight_dtype))
    weight.grad_dtype = bias.grad_dtype = torch.float32
    return drawn(rows, 48, dtype=dtype, device=device).requires_grad_(), weight, bias


def some_targets(rows: int, device: str = "cpu") -> Tensor:
    targets = torch.randint(0, 333, (rows,), generator=torch.Generator().manual_seed(3))
    targets[::7] = IGNORED_TARGET
    return targets.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1 / 600, 65536 / 600])
@pytest.mark.parametrize("weight_dtype", ["same", torch.float32])
@pytest.mark.parametrize("dtype", SHORT)
def test_the_loss_and_the_gradients_of_a_head_in_a_short_dtype(
    dtype: torch.dtype, weight_dtype: torch.dtype | str, scale: float, device: str
) -> None:
    hidden, weight, bias = head_problem(700, dtype, dtype if isinstance(weight_dtype, str) else weight_dtype, device)
    targets = some_targets(700, device)
    loss = chunked_cross_entropy(hidden, weight, bias, targets, scale)
    loss.backward()
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), targets, reduction="sum", ignore_index=IGNORED_TARGET)
    (exact * scale).backward()
    assert loss.item() == pytest.approx(exact.item() * scale, rel=1e-4), "logits are rounded, what follows is not"
    # rounded: the logits, their gradients, and the product of a chunk. In fp16 what is unscaled is lost below 2**-24.
    bound = 0.006 if dtype == torch.bfloat16 else 0.001 if scale > 1 else 0.02
    for one, other in zip((hidden, weight, bias), leaves, strict=True):
        assert one.grad is not None and other.grad is not None
        assert distance(one.grad, other.grad) <= bound
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    assert weight.grad is not None and bias.grad is not None and weight.grad.dtype == bias.grad.dtype == torch.float32


def test_a_head_stored_in_fp16_computes_what_the_same_numbers_in_fp32_compute() -> None:
    targets, results = some_targets(700), []
    for weight_dtype in (torch.float16, torch.float32):
        hidden, weight, bias = head_problem(700, torch.float32, weight_dtype)
        loss = chunked_cross_entropy(hidden, weight, bias, targets, 1 / 600)
        loss.backward()
        results.append((loss, hidden.grad, weight.grad, bias.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def test_chunks_and_micro_batches_add_up_in_fp32() -> None:
    """64 equal chunks: what a bf16 sum makes of them is not 64 times one of them."""
    hidden, weight, bias = head_problem(256, torch.bfloat16, torch.bfloat16)
    targets = some_targets(256)
    chunked_cross_entropy(hidden, weight, bias, targets).backward()
    assert weight.grad is not None and bias.grad is not None
    one_weight, one_bias = weight.grad.clone(), bias.grad.clone()
    assert not torch.equal(one_bias, one_bias.bfloat16().float()), "the rows of a chunk are added up in fp32 too"
    in_bf16 = torch.zeros_like(weight)
    for _ in range(64):
        in_bf16 = in_bf16 + one_weight.bfloat16()
    assert not torch.equal(in_bf16.float(), 64 * one_weight)
    weight.grad = bias.grad = None
    for part in hidden.detach().repeat(64, 1).split(32 * 256):  # two micro-batches of 32 chunks
        chunked_cross_entropy(part, weight, bias, targets.repeat(32)).backward()
    assert torch.equal(weight.grad, 64 * one_weight)  # type: ignore[arg-type]
    torch.testing.assert_close(bias.grad, 64 * one_bias, rtol=1e-5, atol=1e-4)


def test_a_gradient_that_comes_to_the_loss_is_multiplied_in() -> None:
    hidden, weight, bias = head_problem(300, torch.bfloat16, torch.bfloat16)
    targets, seen = some_targets(300), []
    for factor in (1.0, 4.0):
        loss = chunked_cross_entropy(hidden, weight, bias, targets) * factor
        seen.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    assert all(torch.equal(one * 4, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_a_quantised_head_gives_the_loss_of_the_weights_it_stands_for(dtype: torch.dtype, device: str) -> None:
    hidden, weight, bias = head_problem(300, dtype, torch.float32, device)
    head = Int8Linear(48, 333, bias_dtype=torch.float32).to(device)
    head.fill_(weight.detach())
    head.bias.data.copy_(bias.detach())
    targets = some_targets(300, device)
    loss = chunked_cross_entropy(hidden, None, None, targets, 65536 / 250, head)
    loss.backward()
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact_hidden, head.dequantized().double(), bias.detach().double())
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET) * 65536 / 250
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6 if dtype == torch.float32 else 1e-4)
    assert hidden.grad is not None and hidden.grad.dtype == dtype and exact_hidden.grad is not None
    assert distance(hidden.grad, exact_hidden.grad) <= {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@sample(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_the_peak_memory_of_the_head_does_not_depend_on_the_number_of_tokens(
    is_trained: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from head import draw_problem, naive, peak_bytes

    rows, width, vocab = (256, 1024, 4096), 32, 4096
    beyond: dict[str, list[int]] = {"chunked": [], "naive": []}
    for num_rows in rows:
        problem = draw_problem(rows=num_rows, width=width, vocab=vocab, dtype=dtype, device=device, is_trained=is_trained)
        problem.run(chunked_cross_entropy)  # what is allocated once
        for name, loss in (("chunked", chunked_cross_entropy), ("naive", naive)):
            peak = peak_bytes(lambda loss=loss, problem=problem: problem.run(loss), device)  # type: ignore[misc]
            beyond[name].append(peak - problem.hidden.nbytes)
    one_chunk, weight = 256 * vocab * 4, vocab * width * 4
    slack = 64 << 10  # what belongs to the rows of a chunk
    if device == "cpu" and dtype == torch.bfloat16 and not gemm._HAS_BF16:
        slack += min(gemm.WIDENED_BYTES, one_chunk + weight)  # a block of the weight and its logits, in fp32
    first, *others = beyond["chunked"]
    assert max(others) - min(others) <= slack, beyond
    assert first <= min(others) + slack, beyond
    assert max(others) <= (1.5 * one_chunk if not is_trained else 2.5 * one_chunk + 3 * weight) + slack, beyond
    assert beyond["naive"][-1] > 8 * one_chunk, "what is measured is there"
