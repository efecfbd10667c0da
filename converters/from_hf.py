"""Cut a model into the folder that the trainer's ranks load their own layers from: convert_from_hf_gptj.py and convert_from_hf_gptneox.py.

The result is a Hugging Face folder too: ``from_pretrained`` reads it. The trainer also takes the original folder as it is; cutting it
once spares every later start from reading ``.bin`` files, and proves that the model is whole before any machine is rented for it.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from checkpoint.atomic_folder import check_target
from checkpoint.command import exit_status, expanded
from checkpoint.companions import tokenizer_files
from checkpoint.conversion import plan_conversion
from checkpoint.layered_folder import write_model_folder
from checkpoint.legacy_folder import write_legacy_folder
from checkpoint.model_folder import resolve_model_folder
from comms.progress import counted
from converters.flags import FAMILY_TITLES, add_shared_flags, chosen_dtype, print_plan, verify
from converters.sources import open_source


def main(model_type: str, argv: Sequence[str] | None = None) -> int:
    """The script for ``model_type``; returns its exit status."""
    arguments = parse_arguments(model_type, argv)

    def work() -> int:
        convert(model_type, arguments)
        return 0

    return exit_status(work)


def parse_arguments(model_type: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 on one that it does not know."""
    title = FAMILY_TITLES[model_type]
    parser = argparse.ArgumentParser(description=f"Cut a {title} into one file per layer, for dist_clm_train.py.")
    model_help = "local folder (Hugging Face, layer shards, a checkpoint), or a name on the hub"
    parser.add_argument("--model-name", required=True, help=model_help)
    parser.add_argument("--save-dir", required=True, type=Path, help="folder to write into, as SAVE_DIR/<model name with / as _>")
    parser.add_argument(
        "--legacy-layout", action="store_true", help="write pytorch_embs.pt, pytorch_0.pt .. pytorch_lm_head.pt instead of safetensors"
    )
    add_shared_flags(parser, "--config-name")
    return parser.parse_args(argv)


def target_folder(model_name: str, save_dir: Path) -> Path:
    """``save_dir``/<hub name with / as _>, or for a local folder <its last path component>."""
    if expanded(model_name).is_dir():
        return save_dir / Path(os.path.abspath(expanded(model_name))).name
    return save_dir / model_name.replace("/", "_")


def convert(model_type: str, arguments: argparse.Namespace) -> None:
    """The whole job; raises UserError for whatever the user can cure, and then has written nothing."""
    target = target_folder(arguments.model_name, expanded(arguments.save_dir))
    if not arguments.plan:
        check_target(target)  # before anything is downloaded
    opened = open_source(resolve_model_folder(arguments.model_name), model_type, "from_hf", arguments.config_name)
    config, source = opened.config, opened.folder
    dtype = chosen_dtype(source, arguments.dtype)
    plan = plan_conversion(source, config, "legacy layers" if arguments.legacy_layout else "layers", dtype=dtype)
    if arguments.plan:
        print_plan(plan)
        return
    write = write_legacy_folder if arguments.legacy_layout else write_model_folder
    with counted("writing the layers", plan.num_bytes) as progress:
        write(source, target, config, lambda key, num_bytes: progress(num_bytes), dtype=dtype)
    if arguments.verify:
        verify(source, target, plan)
    if not tokenizer_files(source.path):
        print(f"note: {source.path} holds no tokenizer, so {target} holds none either: give the trainer --tokenizer-name")
    size = f"{len(plan.tensors)} tensors, {plan.num_bytes / 1e9:.3f} GB"
    print(f"wrote {target}: {config.num_layers} layers, embeddings and head, {size}")
    print("next, once per device, with that device's rank R of N:")
    print(
        f"  python dist_clm_train.py --model-name {shlex.quote(str(target))} --task-name DATA.jsonl "
        f"--checkpoint-path {shlex.quote(f'model_checkpoints/{target.name}')} "
        "--total-steps STEPS --dist-url tcp://HOST:PORT --world-size N --rank R --pipeline-group-size STAGES --data-group-size REPLICAS"
    )
