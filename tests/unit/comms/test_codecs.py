"""What lossy messages promise: how small, how close, never equal by accident, nothing non-finite hidden, the same bytes every time.

The CUDA kernels run here too, without a GPU: compiled as C++ (g++), a thread of the host for every thread of a block."""

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.tiers import sample
from torch import Tensor

from comms import cuda_codecs
from comms.codecs import SMALLEST_SCALE, Codec, GroupCodec, WireDtype, check_width, group_layout, make_codec, relative_error_sums
from comms.cuda_codecs import THREADS, KernelCodec, Launch, PairedCodec, first_difference, kernel_source, with_faster_kernels
from user_error import UserError

LOSSY: tuple[WireDtype, ...] = ("bf16", "fp16", "int8", "int4")
ALL: tuple[WireDtype, ...] = get_args(WireDtype)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 64), (1, 3, 64), (2, 5, 192), (3, 7, 2048), (1, 130, 1024)]


def encoded(codec: Codec, x: Tensor, *, fill: int = 0) -> Tensor:
    message = torch.full((codec.num_bytes,), fill, dtype=torch.uint8)
    codec.encode(x, message)
    return message


def there_and_back(wire_dtype: WireDtype, x: Tensor) -> Tensor:
    codec = make_codec(wire_dtype, shape=tuple(x.shape), dtype=x.dtype)
    return codec.decode(encoded(codec, x))


def relative_error(x: Tensor, decoded: Tensor) -> float:
    error, square = relative_error_sums(x, decoded)
    return (error / square) ** 0.5


@pytest.mark.parametrize(
    ("wire_dtype", "bytes_ratio", "least_error", "largest_error"),
    [("bf16", 0.5, 0.0005, 0.004), ("fp16", 0.5, 0.00005, 0.0005), ("int8", 0.2505, 0.003, 0.01), ("int4", 0.1329, 0.05, 0.12)],
)
def test_lossy_messages_are_smaller_and_close_but_not_equal(
    wire_dtype: WireDtype, bytes_ratio: float, least_error: float, largest_error: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 2048) * torch.rand(2, 40, 1)
    codec = make_codec(wire_dtype, shape=(2, 40, 2048), dtype=torch.float32)
    decoded = codec.decode(encoded(codec, x))
    assert codec.num_bytes / x.nbytes == pytest.approx(bytes_ratio, rel=1e-3)
    assert not codec.is_lossless
    assert least_error < relative_error(x, decoded) < largest_error
    assert decoded.shape == x.shape and decoded.dtype == x.dtype and decoded.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_is_bit_exact_and_owns_its_storage(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64).to(dtype)
    x[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    codec = make_codec("none", shape=(2, 3, 64), dtype=dtype)
    assert codec.is_lossless and codec.num_bytes == x.nbytes
    message = encoded(codec, x)
    decoded = codec.decode(message)
    message.zero_()
    assert torch.equal(decoded.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("wire_dtype", ALL)
def test_what_is_decoded_owns_aligned_storage_and_ignores_what_the_buffer_held(wire_dtype: WireDtype) -> None:
    codec = make_codec(wire_dtype, shape=(3, 5, 64), dtype=torch.float32)
    x = torch.randn(3, 5, 64)
    messages = [encoded(codec, x, fill=fill) for fill in (0, 255)] + [encoded(codec, x.requires_grad_())]
    assert all(torch.equal(message, messages[0]) for message in messages)
    decoded = codec.decode(messages[0])
    again = codec.decode(messages[1])
    messages[0].zero_()
    assert torch.equal(decoded, again) and decoded.data_ptr() != again.data_ptr()
    assert decoded.data_ptr() % 64 == 0 and decoded.untyped_storage().nbytes() == x.nbytes and not decoded.requires_grad


@pytest.mark.parametrize("wire_dtype", ALL)
def test_tensors_that_are_not_contiguous_give_the_same_bytes(wire_dtype: WireDtype) -> None:
    x = torch.randn(64, 6, 2).permute(2, 1, 0)
    codec = make_codec(wire_dtype, shape=(2, 6, 64), dtype=torch.float32)
    assert not x.is_contiguous() and torch.equal(encoded(codec, x), encoded(codec, x.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wire_dtype", ["int8", "int4"])
def test_no_value_is_further_off_than_half_a_level(wire_dtype: WireDtype, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(20).sub(10).exp()).to(dtype)
    decoded = there_and_back(wire_dtype, x)
    group, largest = (shape[-1], 127) if wire_dtype == "int8" else (64, 7)
    x, decoded = x.double().view(-1, group), decoded.double().view(-1, group)
    scale = x.abs().amax(-1, keepdim=True) / largest
    scale_off = 2.0**-8 if wire_dtype == "int4" else 1e-6
    decoded_off = torch.finfo(dtype).eps * x.abs()
    assert ((x - decoded).abs() <= scale * (0.5 + scale_off) + decoded_off + 1e-7).all()
    assert ((x - decoded).abs() > scale * 0.3).any(), "a level is not finer than promised"


@pytest.mark.parametrize(("wire_dtype", "relative"), [("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_casts_round_to_nearest(wire_dtype: WireDtype, relative: float) -> None:
    x = torch.randn(3, 7, 64) + 3
    assert ((x - there_and_back(wire_dtype, x)).abs() <= relative * x.abs()).all()


@pytest.mark.parametrize(("wire_dtype", "group", "bound"), [("int8", 256, 1e-6), ("int4", 64, 2.0**-8)])
def test_the_largest_values_of_a_group_survive_any_scale(wire_dtype: WireDtype, group: int, bound: float) -> None:
    """A scale that was rounded down must not push the largest value beyond 7 (in four bits, 8 would be read back as -8)."""
    torch.manual_seed(2)
    magnitude = torch.rand(1, 4000, 1).mul(160).sub(80).exp()
    x = (magnitude * torch.randint(0, 2, (1, 4000, group)).mul(2).sub(1)).view(1, -1, 256)
    decoded = there_and_back(wire_dtype, x)
    assert ((decoded - x).abs() <= bound * x.abs()).all()


def test_bf16_fp16_and_int4_of_what_they_gave_changes_nothing_and_int8_only_the_last_bits() -> None:
    x = torch.randn(3, 7, 256) * torch.rand(3, 7, 1).mul(40).sub(20).exp()
    for wire_dtype in LOSSY:
        once = there_and_back(wire_dtype, x.clamp(-60000, 60000))
        twice = there_and_back(wire_dtype, once)
        torch.testing.assert_close(twice, once, rtol=3e-7 if wire_dtype == "int8" else 0, atol=0)


def test_an_outlier_harms_its_own_group_alone() -> None:
    x = torch.randn(1, 4, 256)
    for wire_dtype, harmed in (("int8", 256), ("int4", 64)):
        before = there_and_back(wire_dtype, x).view(-1)
        with_outlier = x.clone()
        with_outlier[0, 1, 70] = 1e6
        after = there_and_back(wire_dtype, with_outlier).view(-1)
        changed = (after != before).nonzero()
        assert changed.min() >= 256 and changed.max() < 512 and 0 < len(changed) <= harmed
        assert after[256 + 70] == pytest.approx(1e6, rel=0.004)


@pytest.mark.parametrize("wire_dtype", ALL)
def test_zeros_stay_zeros(wire_dtype: WireDtype) -> None:
    x = torch.randn(1, 3, 64)
    x[0, 1] = 0
    decoded = there_and_back(wire_dtype, x)
    assert (decoded[0, 1] == 0).all() and (decoded[0, ::2] != 0).any()
    assert (there_and_back(wire_dtype, torch.zeros(2, 3, 64)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("wire_dtype", ALL)
def test_inf_and_nan_are_never_hidden_and_stay_in_their_group(wire_dtype: WireDtype, poison: float, dtype: torch.dtype) -> None:
    for j in (0, 31, 32, 63, 100):
        x = torch.randn(2, 3, 128).to(dtype)
        x[1, 1, j] = poison
        finite = there_and_back(wire_dtype, x).isfinite()
        assert not finite[1, 1, j]
        group = {"int8": slice(None), "int4": slice(j // 64 * 64, j // 64 * 64 + 64)}.get(wire_dtype, slice(j, j + 1))
        assert not finite[1, 1, group].any()
        finite[1, 1, group] = True
        assert finite.all()


def test_fp16_turns_what_it_cannot_hold_into_inf() -> None:
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e9]).repeat(16).view(1, 1, 64)
    assert there_and_back("fp16", x)[0, 0, :4].tolist() == [65504.0, 65504.0, torch.inf, -torch.inf]


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-36, 3e38])
@pytest.mark.parametrize("wire_dtype", ["bf16", "int8", "int4"])
def test_tiny_and_huge_gradients_keep_their_precision(wire_dtype: WireDtype, size: float) -> None:
    x = torch.rand(1, 9, 256).sub(0.5).mul(2).mul(size)
    decoded = there_and_back(wire_dtype, x)
    assert decoded.isfinite().all()
    assert relative_error(x, decoded) < {"bf16": 0.004, "int8": 0.01, "int4": 0.12}[wire_dtype]


@pytest.mark.parametrize("wire_dtype", ["int8", "int4"])
def test_below_the_smallest_scale_values_are_rounded_to_multiples_of_it(wire_dtype: WireDtype) -> None:
    x = torch.rand(1, 1, 64).sub(0.5).mul(4 * SMALLEST_SCALE)
    decoded = there_and_back(wire_dtype, x)
    assert ((decoded - x).double().abs() <= 0.5001 * SMALLEST_SCALE).all() and (decoded != 0).any()


def test_the_layouts_are_as_written() -> None:
    codec = make_codec("int8", shape=(1, 2, 4), dtype=torch.float32)
    message = encoded(codec, torch.tensor([[[127.0, -64.0, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]]), fill=99)
    assert codec.num_bytes == 64 + 2 * 4
    assert message[:64].tolist() == [127, 256 - 64, 0, 2, 0, 0, 0, 0] + 56 * [0]
    assert message[64:].view(torch.float32).tolist() == [1.0, 2.0**-126]

    codec = make_codec("int4", shape=(1, 1, 64), dtype=torch.float32)
    x = torch.zeros(1, 1, 64)
    x[0, 0, [0, 32, 1, 33, 31]] = torch.tensor([7.0, -7.0, -3.0, 5.0, 1.0])
    message = encoded(codec, x, fill=99)
    assert codec.num_bytes == 64 + 2
    assert message[:64].view(torch.int8).tolist() == [7 - 7 * 16, -3 + 5 * 16, *29 * [0], 1] + 32 * [0]
    assert message[64:].tolist() == [0x80, 0x3F], "1.0 as bf16"
    assert torch.equal(codec.decode(message), x)

    message = encoded(make_codec("bf16", shape=(1, 1, 2), dtype=torch.float32), torch.tensor([[[1.0, -2.0]]]))
    assert message.tolist() == [0x80, 0x3F, 0x00, 0xC0]


def test_int4_refuses_widths_that_groups_do_not_fill() -> None:
    for refused in (lambda: check_width("int4", 96), lambda: make_codec("int4", shape=(1, 2, 96), dtype=torch.float32)):
        with pytest.raises(UserError, match=r"must be a multiple of 64, but it is 96: use int8"):
            refused()
    for wire_dtype in ALL:
        check_width(wire_dtype, 128)
        if wire_dtype != "int4":
            check_width(wire_dtype, 7)
            x = torch.randn(1, 3, 7)
            torch.testing.assert_close(there_and_back(wire_dtype, x), x, rtol=0.01, atol=0.02)


def test_error_sums_add_up_and_are_exact() -> None:
    x, decoded = torch.full((1, 3, 100_000), 1.0), torch.full((1, 3, 100_000), 0.9)
    error, square = relative_error_sums(x, decoded)
    assert square == 300_000 and error == pytest.approx(300_000 * (1 - float(torch.tensor(0.9))) ** 2, rel=1e-12)
    halves = [relative_error_sums(x[..., half], decoded[..., half]) for half in (slice(0, 50_000), slice(50_000, None))]
    assert sum(e for e, _ in halves) == pytest.approx(error, rel=1e-12) and sum(s for _, s in halves) == square


# The kernels without a GPU

EMULATED_FP16 = """
static float fp16_to_float(unsigned short h) { _Float16 f; std::memcpy(&f, &h, 2); return (float)f; }
static unsigned short float_to_fp16(float f) { _Float16 g = (_Float16)f; unsigned short h; std::memcpy(&h, &g, 2); return h; }
"""
EMULATED_DEVICE = """
#include <barrier>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#define __global__
#define __device__ static
#define __shared__ static
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> block, warps[32];
static float exchanged[1024];
static void __syncthreads() { block->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float v, int mask) {
    auto& warp = *warps[threadIdx.x / 32];
    exchanged[threadIdx.x] = v;
    warp.arrive_and_wait();
    const float other = exchanged[threadIdx.x ^ mask];
    warp.arrive_and_wait();
    return other;
}
static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
"""
EMULATED_LAUNCH = """
template <class Scale> using Encode = void (*)(const element*, signed char*, Scale*, long long, long long);
template <class Scale> using Decode = void (*)(element*, const signed char*, const Scale*, long long, long long);
template <class Scale> std::function<void()> bind(Encode<Scale> kernel, const long long* a) {
    return [=] { kernel((const element*)a[0], (signed char*)a[1], (Scale*)a[2], a[3], a[4]); };
}
template <class Scale> std::function<void()> bind(Decode<Scale> kernel, const long long* a) {
    return [=] { kernel((element*)a[0], (const signed char*)a[1], (const Scale*)a[2], a[3], a[4]); };
}
extern "C" void launch(const char* name, long long num_blocks, const long long* a) {
    const std::string kernel = name;
    const auto work = kernel == "encode_int8"   ? bind<float>(encode_int8, a)
                      : kernel == "decode_int8" ? bind<float>(decode_int8, a)
                      : kernel == "encode_int4" ? bind<unsigned short>(encode_int4, a)
                                                : bind<unsigned short>(decode_int4, a);
    block = std::make_unique<std::barrier<>>(THREADS);
    for (auto& warp : warps) warp = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < THREADS; ++t)
        threads.emplace_back([=] {
            threadIdx.x = t;
            for (long long b = 0; b < num_blocks; ++b) {
                blockIdx.x = (unsigned)b;
                work();
                block->arrive_and_wait();
            }
        });
    for (auto& thread : threads) thread.join();
}
"""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What cuda_codecs logs, also after a test that told the trainer's own logger not to propagate."""
    monkeypatch.setattr(cuda_codecs, "logger", logging.getLogger("codecs_under_test"))
    caplog.set_level(logging.INFO, logger="codecs_under_test")
    return caplog


def gpp_version() -> int:
    found = shutil.which("g++")
    return int(subprocess.run([found, "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0]) if found else 0


def emulated_launch(folder: Path, dtype: torch.dtype) -> Launch:
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(EMULATED_DEVICE + kernel_source(dtype, EMULATED_FP16) + EMULATED_LAUNCH)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fwrapv", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run(["g++", *flags, "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).launch

    def launch(kernel: str, num_blocks: int, arguments: tuple[int, ...]) -> None:
        run(kernel.encode(), ctypes.c_longlong(num_blocks), (ctypes.c_longlong * len(arguments))(*arguments))

    return launch


@sample(1)
@pytest.mark.skipif(gpp_version() < 12, reason="needs g++ 12 or newer to compile the kernels for the host")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_give_the_bytes_of_the_torch_operations(dtype: torch.dtype, tmp_path: Path) -> None:
    launch = emulated_launch(tmp_path, dtype)
    for wire_dtype in ("int8", "int4"):
        for shape in ((1, 1, 64), (1, 3, 192), (1, 2, 3 * THREADS + 64)):
            codec = GroupCodec(group_layout(wire_dtype, shape), shape=shape, dtype=dtype, device=torch.device("cpu"))
            assert first_difference(codec, KernelCodec(codec, launch)) is None
            x = torch.randn(shape[::-1]).to(dtype).permute(2, 1, 0)
            assert torch.equal(encoded(KernelCodec(codec, launch), x, fill=99), encoded(codec, x))


def test_kernels_that_differ_are_noticed_and_not_used(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    codec = GroupCodec(group_layout("int8", (1, 2, 64)), shape=(1, 2, 64), dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(cuda_codecs, "cupy_launch", lambda dtype, device: lambda kernel, num_blocks, arguments: None)
    assert with_faster_kernels(codec) is codec
    assert len(log.records) == 1 and "the cupy kernels differ" in log.text and "of 136 bytes of a message" in log.text


def test_without_cupy_the_torch_operations_do_it_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    codec = GroupCodec(group_layout("int4", (1, 2, 64)), shape=(1, 2, 64), dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert with_faster_kernels(codec) is codec
    assert len(log.records) == 1 and "pip install cupy-cuda12x" in log.text


@pytest.mark.parametrize(("kernels_ms", "used"), [((1.0, 1.0), KernelCodec), ((1.0, 3.0), PairedCodec), ((3.0, 3.0), GroupCodec)])
def test_each_direction_uses_what_was_measured_to_be_faster(
    kernels_ms: tuple[float, float], used: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = GroupCodec(group_layout("int8", (1, 2, 64)), shape=(1, 2, 64), dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(cuda_codecs, "cupy_launch", lambda dtype, device: None)
    monkeypatch.setattr(cuda_codecs, "first_difference", lambda codec, kernels: None)
    monkeypatch.setattr(cuda_codecs, "directions_ms", lambda codec, x: kernels_ms if isinstance(codec, KernelCodec) else (2.0, 2.0))
    chosen = with_faster_kernels(codec)
    assert type(chosen) is used and chosen.num_bytes == codec.num_bytes and not chosen.is_lossless
    if used is PairedCodec:
        x = torch.randn(1, 2, 64)
        assert torch.equal(chosen.decode(encoded(codec, x)), codec.decode(encoded(codec, x))), "decodes by torch operations"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire_dtype", ["int8", "int4"])
def test_a_gpu_gives_the_bytes_of_a_cpu(wire_dtype: WireDtype, dtype: torch.dtype, log: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("cupy", reason="needs cupy (pip install cupy-cuda12x or cupy-cuda13x)")
    shape = (2, 33, 4096)
    x = torch.randn(shape).to(dtype)
    on_cpu = make_codec(wire_dtype, shape=shape, dtype=dtype)
    chosen = make_codec(wire_dtype, shape=shape, dtype=dtype, device=torch.device("cuda"))
    assert "cupy kernel (" in log.text and "differ" not in log.text
    with torch.cuda.stream(torch.cuda.Stream()):
        message = torch.empty(on_cpu.num_bytes, dtype=torch.uint8, device="cuda")
        chosen.encode(x.cuda(), message)
        assert torch.equal(message.cpu(), encoded(on_cpu, x))
        assert torch.equal(chosen.decode(message).cpu(), on_cpu.decode(message.cpu()))
