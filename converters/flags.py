"""The flags that both directions share, and the steps of work behind them: dtype, plan, verification."""

import argparse
from pathlib import Path

import torch

from checkpoint.conversion import Plan, verify_copy
from checkpoint.model_folder import ModelFolder
from comms.progress import counted

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FAMILY_TITLES = {"gptj": "GPT-J", "gptneox": "GPT-NeoX"}


def add_shared_flags(parser: argparse.ArgumentParser, *names_of_config: str) -> None:
    """names_of_config: the spellings of --config-name."""
    parser.add_argument(
        *names_of_config,
        dest="config_name",
        help="folder or hub name that holds config.json and tokenizer; needed only where the source has no config.json of its own",
    )
    parser.add_argument(
        "--dtype",
        choices=["keep", *DTYPES],
        help="dtype of the written weights (default: keep, each weight's own; of hivemind's 8-bit format: fp16)",
    )
    parser.add_argument("--verify", action="store_true", help="read back what was written and compare every tensor with the source")
    parser.add_argument("--plan", action="store_true", help="print where every tensor would come from and go to, and write nothing")


def chosen_dtype(source: ModelFolder, choice: str | None) -> torch.dtype | None:
    """What --dtype says, None to keep every weight's own. The formula of 8-bit weights gives float32, which is more than they hold."""
    if choice is None:
        return torch.float16 if source.is_int8 else None
    return DTYPES.get(choice)


def print_plan(plan: Plan) -> None:
    """To stdout."""
    for line in plan.lines():
        print(line)


def verify(source: ModelFolder, target: Path, plan: Plan) -> None:
    """Compare ``target`` with ``source`` and say so. Raises UserError if they differ."""
    with counted("verifying", plan.num_bytes) as progress:
        count = verify_copy(source, target, plan, progress)
    print(f"verified {count} tensors")
