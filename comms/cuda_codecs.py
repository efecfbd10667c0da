"""int8 and int4 messages on a CUDA device in one kernel each way, where the torch operations of codecs.py read and write the tensor several
times.

The kernels are compiled by cupy (optional: pip install cupy-cuda12x or cupy-cuda13x) when a codec is made. They are used, each
direction by itself, only if they give the same bytes as the torch operations on a tensor of the codec's shape and are faster on this
very device; otherwise the torch operations stay. One line in the log says which, and why. Imported by codecs.py for CUDA devices only.

Nothing is copied between the libraries: kernels get data_ptr() and run on torch's current stream of the device.
Legend: G values share a scale, N groups; the layout is described in codecs.py.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from comms.codecs import SMALLEST_SCALE, Codec, GroupCodec, check_message, check_tensor

logger = logging.getLogger("trainer")

# (kernel, number of blocks, arguments: addresses and 64-bit integers); every block has THREADS threads
Launch = Callable[[str, int, tuple[int, ...]], None]
THREADS = 256
GROUPS_PER_BLOCK = {"int8": 1, "int4": THREADS // 32}  # int4: a warp per group

# How the kernels read and write an element of the tensor. fp16 goes through instructions of the GPU, so that no header is needed.
FP16_CONVERSIONS = r"""
__device__ float fp16_to_float(unsigned short h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ unsigned short float_to_fp16(float f) { unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
"""
ELEMENTS = {
    torch.float32: ("float", "e", "f"),
    torch.float16: ("unsigned short", "fp16_to_float(e)", "float_to_fp16(f)"),
    torch.bfloat16: ("unsigned short", "bf16_to_float(e)", "float_to_bf16(f)"),
}

KERNELS = r"""
__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // nan is the largest; fmaxf would lose it

__device__ float largest_of_warp(float v) {  // the same in all 32 threads
    for (int mask = 16; mask > 0; mask /= 2) v = larger(v, __shfl_xor_sync(0xffffffffu, v, mask));
    return v;
}

extern "C" __global__ void encode_int8(
    const element* x, signed char* values, float* scales, long long num_groups, long long group_size
) {
    __shared__ float largest_of_warps[THREADS / 32];
    const long long group = blockIdx.x;
    x += group * group_size;
    values += group * group_size;
    float magnitude = 0;
    for (long long c = threadIdx.x; c < group_size; c += THREADS) magnitude = larger(magnitude, fabsf(load(x[c])));
    magnitude = largest_of_warp(magnitude);
    if (threadIdx.x % 32 == 0) largest_of_warps[threadIdx.x / 32] = magnitude;
    __syncthreads();
    for (int warp = 0; warp < THREADS / 32; ++warp) magnitude = larger(magnitude, largest_of_warps[warp]);
    const float scale = larger(magnitude * (float)(1.0 / 127), SMALLEST_SCALE);
    const float inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[group] = scale;
    for (long long c = threadIdx.x; c < group_size; c += THREADS) values[c] = (signed char)(int)rintf(load(x[c]) * inverse);
}

extern "C" __global__ void decode_int8(
    element* x, const signed char* values, const float* scales, long long num_groups, long long group_size
) {
    const long long group = blockIdx.x;
    const float scale = scales[group];
    x += group * group_size;
    values += group * group_size;
    for (long long c = threadIdx.x; c < group_size; c += THREADS) x[c] = store((float)values[c] * scale);
}

extern "C" __global__ void encode_int4(
    const element* x, signed char* values, unsigned short* scales, long long num_groups, long long group_size
) {
    const long long group = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int j = threadIdx.x % 32;
    if (group >= num_groups) return;  // a whole warp
    const float low = load(x[group * 64 + j]), high = load(x[group * 64 + 32 + j]);
    const float magnitude = largest_of_warp(larger(fabsf(low), fabsf(high)));
    const unsigned short scale = float_to_bf16(larger(magnitude * (float)(1.0 / 7), SMALLEST_SCALE));
    const float inverse = 1.0f / bf16_to_float(scale);
    if (j == 0) scales[group] = scale;
    values[group * 32 + j] = (signed char)(int)(rintf(low * inverse) + 16.0f * rintf(high * inverse));
}

extern "C" __global__ void decode_int4(
    element* x, const signed char* values, const unsigned short* scales, long long num_groups, long long group_size
) {
    const long long group = (long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int j = threadIdx.x % 32;
    if (group >= num_groups) return;
    const int both = values[group * 32 + j];
    const int high = (both + 8) >> 4;  // the low value is from -7 to 7
    const float scale = bf16_to_float(scales[group]);
    x[group * 64 + j] = store((float)(both - 16 * high) * scale);
    x[group * 64 + 32 + j] = store((float)high * scale);
}
"""


def kernel_source(dtype: torch.dtype, fp16_conversions: str = FP16_CONVERSIONS) -> str:
    """The four kernels as CUDA C++ without headers, for tensors of ``dtype``. Pure."""
    element, load, store = ELEMENTS[dtype]
    return f"""#define THREADS {THREADS}
#define SMALLEST_SCALE {SMALLEST_SCALE!r}f
typedef {element} element;
__device__ float bf16_to_float(unsigned short h) {{ return __uint_as_float((unsigned)h << 16); }}
__device__ unsigned short float_to_bf16(float f) {{  // to nearest, ties to even
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}}
{fp16_conversions}
__device__ float load(element e) {{ return {load}; }}
__device__ element store(float f) {{ return {store}; }}
{KERNELS}"""


class KernelCodec:
    """A GroupCodec whose work is done by the kernels above, through ``launch``."""

    def __init__(self, codec: GroupCodec, launch: Launch) -> None:
        self.num_bytes, self.is_lossless = codec.num_bytes, False
        self._layout, self._shape, self._dtype, self._launch = codec.layout, codec.shape, codec.dtype, launch
        self._device_type = codec.device.type
        self._num_blocks = -(-codec.layout.num_groups // GROUPS_PER_BLOCK[codec.layout.wire_dtype])

    def encode(self, x: Tensor, message: Tensor) -> None:
        check_tensor(x, shape=self._shape, dtype=self._dtype)
        check_message(message, self.num_bytes)
        self._run("encode", x.detach().contiguous(), message)
        self._layout.parts(message)[1].zero_()

    def decode(self, message: Tensor) -> Tensor:
        check_message(message, self.num_bytes)
        x = torch.empty(self._shape, dtype=self._dtype, device=message.device)
        self._run("decode", x, message)
        return x

    def _run(self, direction: str, x: Tensor, message: Tensor) -> None:
        assert x.device == message.device and x.device.type == self._device_type, f"x is on {x.device}, the message on {message.device}"
        layout, start = self._layout, message.data_ptr()
        arguments = (x.data_ptr(), start, start + layout.scales_at, layout.num_groups, layout.group_size)
        # x may be freed when this returns: torch gives its memory to later work of the same stream only
        self._launch(f"{direction}_{layout.wire_dtype}", self._num_blocks, arguments)


class PairedCodec:
    """Encodes with one codec and decodes with another of the same layout."""

    def __init__(self, encoder: Codec, decoder: Codec) -> None:
        self.num_bytes, self.is_lossless = encoder.num_bytes, encoder.is_lossless
        self._encoder, self._decoder = encoder, decoder

    def encode(self, x: Tensor, message: Tensor) -> None:
        self._encoder.encode(x, message)

    def decode(self, message: Tensor) -> Tensor:
        return self._decoder.decode(message)


def with_faster_kernels(codec: GroupCodec) -> Codec:
    """``codec``, or kernels in its place, each direction by itself. Called once per codec: compiles, compares, measures, logs one line."""
    name = codec.layout.wire_dtype
    try:
        launch = cupy_launch(codec.dtype, codec.device)
    except ImportError as error:
        logger.info(
            "%s messages: packed by torch operations, without cupy kernels (pip install cupy-cuda12x or cupy-cuda13x): %s", name, error
        )
        return codec
    except RuntimeError as error:
        logger.warning("%s messages: packed by torch operations, since cupy could not compile its kernels: %s", name, error)
        return codec
    kernels = KernelCodec(codec, launch)
    difference = first_difference(codec, kernels)
    if difference is not None:
        logger.warning("%s messages: packed by torch operations, since the cupy kernels differ from them: %s", name, difference)
        return codec
    x = sample(codec)
    slow, fast = directions_ms(codec, x), directions_ms(kernels, x)
    encoder, decoder = (kernels if fast[way] < slow[way] else codec for way in (0, 1))
    logger.info(
        "%s messages: packed by %s (%.3f ms; torch operations %.3f), unpacked by %s (%.3f ms; %.3f)",
        name,
        "a cupy kernel" if encoder is kernels else "torch operations, the faster",
        fast[0],
        slow[0],
        "a cupy kernel" if decoder is kernels else "torch operations, the faster",
        fast[1],
        slow[1],
    )
    return encoder if encoder is decoder else PairedCodec(encoder, decoder)


def cupy_launch(dtype: torch.dtype, device: torch.device) -> Launch:
    """Compile the kernels for this device. Raises ImportError without cupy, RuntimeError if it cannot compile or reach the device."""
    import cupy

    index = torch.cuda.current_device() if device.index is None else device.index
    module = cupy.RawModule(code=kernel_source(dtype))
    try:
        with cupy.cuda.Device(index):
            functions = {name: module.get_function(name) for name in ("encode_int8", "decode_int8", "encode_int4", "decode_int4")}
            functions["encode_int8"].compile()
    except (OSError, cupy.cuda.compiler.CompileException) as error:  # NVRTC is missing, or rejects the source
        raise RuntimeError(str(error)) from error

    def launch(kernel: str, num_blocks: int, arguments: tuple[int, ...]) -> None:
        stream = torch.cuda.current_stream(index)
        if hasattr(stream, "__cuda_stream__") and hasattr(cupy.cuda.Stream, "from_external"):
            same_stream = cupy.cuda.Stream.from_external(stream)
        else:  # deprecated by cupy 14; cupy 13 has nothing else
            same_stream = cupy.cuda.ExternalStream(stream.cuda_stream, index)
        with cupy.cuda.Device(index), same_stream:
            functions[kernel]((num_blocks,), (THREADS,), arguments)

    return launch


def sample(codec: GroupCodec) -> Tensor:
    """Normal numbers of the codec's shape whose rows differ in size by up to e^16. Leaves torch's own random numbers alone."""
    generator = torch.Generator(codec.device).manual_seed(0)
    rows = torch.rand((*codec.shape[:-1], 1), device=codec.device, generator=generator).mul_(16).sub_(8).exp_()
    return torch.randn(codec.shape, device=codec.device, generator=generator).mul_(rows).to(codec.dtype)


def first_difference(codec: GroupCodec, kernels: KernelCodec) -> str | None:
    """What the kernels do differently from the torch operations, in words; None if nothing."""
    x = sample(codec)
    x.view(-1)[: codec.layout.group_size] = 0
    expected, found = (torch.full((codec.num_bytes,), fill, dtype=torch.uint8, device=codec.device) for fill in (0, 255))
    codec.encode(x, expected)
    kernels.encode(x, found)
    num_different = int((expected != found).sum())
    if num_different:
        return f"{num_different} of {codec.num_bytes} bytes of a message"
    if not torch.equal(codec.decode(expected), kernels.decode(expected)):
        return "values read back from a message"
    for poison in (torch.inf, torch.nan):
        x.view(-1)[-1] = poison
        kernels.encode(x, found)
        if kernels.decode(found).view(-1)[-codec.layout.group_size :].isfinite().any():
            return f"{poison} is hidden"
    return None


def directions_ms(codec: Codec, x: Tensor, num_runs: int = 5) -> tuple[float, float]:
    """Milliseconds of the device for one encode and one decode of x: the least of ``num_runs``, after a warm-up."""
    message = torch.empty(codec.num_bytes, dtype=torch.uint8, device=x.device)

    def least_ms(work: Callable[[], object]) -> float:
        found = []
        for _ in range(1 + num_runs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        return min(found[1:])

    with torch.cuda.device(x.device):
        return least_ms(lambda: codec.encode(x, message)), least_ms(lambda: codec.decode(message))
