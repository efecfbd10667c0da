"""How two optional packages are imported: bitsandbytes where it is asked for, peft without it.

peft imports bitsandbytes wherever it finds it, for layers of its own in 4 and 8 bits, of which none
is used here: our frozen linears (quantized.py) are nn.Linear to it. That costs 3 s of every start,
and on a CPU with bf16 instructions a warning of a kernel that nobody calls.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_UNCALLED_KERNEL = "Failed to load CPU gemm_4bit_forward"
_PEFT_MEMORY = ("is_bnb_available", "is_bnb_4bit_available")


def import_bitsandbytes() -> Any:
    """The module ``bitsandbytes.functional``. Raises ImportError where it cannot be imported.

    What bitsandbytes says of its fused product of 4-bit weights, when that kernel cannot be loaded,
    is not shown: the kernel is never called here. Its other warnings are.
    """
    known = getattr(sys.modules.get("bitsandbytes"), "functional", None)
    if known is not None:
        return known
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_tells_of_a_called_kernel)
    try:
        from bitsandbytes import functional
    finally:
        logger.removeFilter(_tells_of_a_called_kernel)
    return functional


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within, an import of bitsandbytes fails, unless the process has imported it already.

    Afterwards peft asks anew whether it is there, so a program that calls training.run() and then
    peft with bitsandbytes finds both.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment] # an import of it fails then
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        for name in _PEFT_MEMORY:
            known: Any = getattr(sys.modules.get("peft.import_utils"), name, None)
            if hasattr(known, "cache_clear"):
                known.cache_clear()


def _tells_of_a_called_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_UNCALLED_KERNEL)
