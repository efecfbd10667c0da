"""Turn a checkpoint or a layer-sharded model folder into a plain Hugging Face folder: convert_to_hf_gptj.py and convert_to_hf_gptneox.py.

Every checkpoint of ours can be loaded with ``from_pretrained`` as it lies; this leaves the training state behind and uses the usual file
names. The checkpoints of this trainer's relatives need it, and so does who wants an adapter and its model as one.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint.adapter_folder import Adapter
from checkpoint.adapter_merge import MergedModel
from checkpoint.atomic_folder import check_target
from checkpoint.command import exit_status, expanded
from checkpoint.companions import tokenizer_files
from checkpoint.conversion import plan_conversion
from checkpoint.hf_folder import write_hf_folder
from checkpoint.manifest import TRAINER_FILE
from checkpoint.model_folder import ModelFolder, read_json_object, resolve_model_folder
from comms.progress import counted
from converters.flags import FAMILY_TITLES, add_shared_flags, chosen_dtype, print_plan, verify
from converters.sources import open_adapter, open_source
from modules.model_config import ModelConfig
from user_error import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
    parser = argparse.ArgumentParser(description=f"Turn a checkpoint of a {title} into a plain Hugging Face folder.")
    source_help = "a step's folder, a model folder, or a --checkpoint-path (its newest complete step is taken)"
    parser.add_argument("--ckpt-path", required=True, help=source_help)
    parser.add_argument("--save-path", required=True, type=Path, help="folder to write; must be missing or empty")
    adapter_help = "peft folder (LoRA, LayerNorms), or the --checkpoint-path it was trained into, to merge into the model of --ckpt-path, "
    adapter_help += "which may then also be a name on the hub"
    parser.add_argument("--merge-adapter", type=Path, metavar="DIR", help=adapter_help)
    parser.add_argument("--n-stages", type=int, help="pipeline stages of the training; only checked")
    parser.add_argument("--n-layer-per-stage", type=int, help="layers per stage of it; only checked")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="bytes per file, as a number with KB, MB, GB, KiB, MiB or GiB (default 5GB)"
    )
    add_shared_flags(parser, "--config-name", "--model-name")
    return parser.parse_args(argv)


def parse_size(text: str) -> int:
    """'5GB' -> 5_000_000_000. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size must be a positive number of bytes such as 5GB or 500MB; it is {text!r}")
    return size


def check_stages(num_layers: int, found: tuple[int, ...] | None, num_stages: int | None, layers_per_stage: int | None) -> None:
    """Raise UserError if the two flags are given and do not describe the cut ``found`` in the files; where nothing is found there
    (None), if they describe no cut of this model in which every stage has a layer."""
    if num_stages is None and layers_per_stage is None:
        return
    if num_stages is None or layers_per_stage is None:
        raise UserError("--n-stages and --n-layer-per-stage are checked together: give both or neither (they are not needed)")
    given = f"--n-stages {num_stages} --n-layer-per-stage {layers_per_stage}"
    cure = "Correct the numbers or leave both out."
    if num_stages < 1 or layers_per_stage < 1 or num_stages * layers_per_stage < num_layers:
        raise UserError(f"the stages must cover all {num_layers} layers of this model, and {given} do not. {cure}")
    if num_stages > num_layers + 2:  # embeddings and head may have stages of their own
        raise UserError(f"{num_layers} layers, embeddings and head are in at most {num_layers + 2} stages, and {given}. {cure}")
    if found is not None:
        said = tuple(min(layers_per_stage, max(0, num_layers - s * layers_per_stage)) for s in range(num_stages))
        if said != found:
            cut = f"{len(found)} stage(s) of {' + '.join(map(str, found))} layers"
            raise UserError(f"the checkpoint holds {cut}, and {given} say {' + '.join(map(str, said))}. {cure}")
    elif (num_stages - 1) * layers_per_stage >= num_layers:
        raise UserError(f"every stage must hold a layer, and the {num_layers} layers of this model end early with {given}. {cure}")


def with_adapter(base: ModelFolder, config: ModelConfig, path: Path) -> MergedModel:
    """``base`` with the adapter of ``path`` in it, after saying what that is. Raises UserError if they do not fit."""
    adapter = open_adapter(path, config)
    merged = MergedModel(base, adapter)
    print(f"merging {adapter.path}: {describe(adapter)}, into {merged.num_merged} tensors of {base.weights_path}")
    beside = trained_beside(adapter.path)
    if beside is not None and beside == base.fingerprint():
        print("these are the very weights that the adapter was trained beside")
    elif beside is not None:
        rule = "warning: these are not the weights that the adapter was trained beside"
        print(f"{rule} ({adapter.base_model}): in another dtype they do, other values make a model that is worth nothing", file=sys.stderr)
    elif adapter.base_model is not None:
        print(f"the adapter was trained on {adapter.base_model}, it says: merged into other weights of the same shapes it is worth nothing")
    return merged


def trained_beside(adapter: Path) -> str | None:
    """The fingerprint of the model that one of our steps was trained beside; None where it is not known."""
    if not (adapter / TRAINER_FILE).is_file():
        return None
    fingerprint = read_json_object(adapter / TRAINER_FILE).get("base_model")
    return fingerprint if isinstance(fingerprint, str) else None


def describe(adapter: Adapter) -> str:
    """'LoRA of rank 8, scaling 2 (q_proj, v_proj)', say."""
    if adapter.lora is None:
        return "trained LayerNorms"
    targets = adapter.lora.target_modules
    return f"LoRA of rank {adapter.lora.rank}, scaling {adapter.scaling:g} ({', '.join(targets[:8])}{' ..' if len(targets) > 8 else ''})"


def convert(model_type: str, arguments: argparse.Namespace) -> None:
    """The whole job; raises UserError for whatever the user can cure, and then has written nothing."""
    max_shard_bytes = parse_size(arguments.max_shard_size)
    target = expanded(arguments.save_path)
    if not arguments.plan:
        check_target(target)
    folder = expanded(arguments.ckpt_path) if arguments.merge_adapter is None else resolve_model_folder(arguments.ckpt_path)
    opened = open_source(folder, model_type, "to_hf", arguments.config_name)
    config, source = opened.config, opened.folder
    dtype = chosen_dtype(source, arguments.dtype)
    check_stages(config.num_layers, opened.layers_per_stage, arguments.n_stages, arguments.n_layer_per_stage)
    if arguments.merge_adapter is not None:
        source = with_adapter(source, config, expanded(arguments.merge_adapter))
    plan = plan_conversion(source, config, "hugging face", dtype=dtype, max_shard_bytes=max_shard_bytes)
    if arguments.plan:
        print_plan(plan)
        return
    with counted("writing the weights", plan.num_bytes) as progress:
        write_hf_folder(source, target, config, max_shard_bytes=max_shard_bytes, progress=progress, dtype=dtype)
    if arguments.verify:
        verify(source, target, plan)
    if not tokenizer_files(source.path):
        print(f"note: {source.path} holds no tokenizer, so {target} holds none either")
    print(f"wrote {target}: {len(plan.tensors)} tensors in {len(plan.files)} file(s), {plan.num_bytes / 1e9:.3f} GB")
    print("next:")
    path = json.dumps(str(target), ensure_ascii=False)
    code = f'from transformers import pipeline; print(pipeline("text-generation", {path})("Hello"))'
    print(f"  python -c {shlex.quote(code)}")
