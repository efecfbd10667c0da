"""The layer shards of this trainer's public relatives (OpenChatKit, CocktailSGD): their names, and how a folder of them is read.

    pytorch_embs.pt      wte.weight
    pytorch_17.pt        ln_1.weight, attn.q_proj.weight ..          one file per layer, no zero padding
    pytorch_lm_head.pt   ln_f.weight, ln_f.bias, lm_head.weight ..

Each is torch.save(dict) with the names of one part alone, without the model's prefix; old writers add causal masks and rotary tables.
Their training checkpoints (stage_checkpoints.py) use the same short names. Promises: every weight has one place; which files there must be
is proven here, names and shapes in check_model_folder. Left to others: writing such a folder (legacy_folder.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from checkpoint.weight_file import StoredWeight, open_weight_file
from modules.model_config import ModelConfig, ModelNames
from modules.stage import EMBEDDINGS, LM_HEAD, layer_key, layer_keys
from user_error import UserError

EMBEDDINGS_FILE, HEAD_FILE = "pytorch_embs.pt", "pytorch_lm_head.pt"
_LAYER_FILE = re.compile(r"pytorch_(\d+)\.pt")


def legacy_files(num_layers: int) -> dict[str, str]:
    """File name -> layer key (modules/stage.py), in model order."""
    files = [EMBEDDINGS_FILE, *(f"pytorch_{i}.pt" for i in range(num_layers)), HEAD_FILE]
    return dict(zip(files, layer_keys(num_layers), strict=True))


def legacy_place(name: str, names: ModelNames) -> tuple[str, str]:
    """Hugging Face name -> (file, name in it)."""
    key, index = layer_key(name), names.layer_index(name)
    if index is not None:
        return f"pytorch_{index}.pt", name.removeprefix(f"{names.trunk}.{names.layers}.{index}.")
    return EMBEDDINGS_FILE if key == EMBEDDINGS else HEAD_FILE, name.removeprefix(f"{names.trunk}.")


def hugging_face_name(key: str, short: str, names: ModelNames) -> str:
    """The other way: what ``short`` in the part ``key`` (embeddings, layer_17, lm_head) is called in Hugging Face's files."""
    if key == EMBEDDINGS or (key == LM_HEAD and short.startswith(f"{names.final_norm}.")):
        return f"{names.trunk}.{short}"
    if key == LM_HEAD:
        return names.canonical(short)
    return f"{names.trunk}.{names.layers}.{int(key.rpartition('_')[2])}.{short}"


def is_layer_shard_folder(folder: Path) -> bool:
    """True if ``folder`` holds any file of this layout."""
    return any(entry.name in (EMBEDDINGS_FILE, HEAD_FILE) or _LAYER_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def open_layer_shards(folder: Path, config: ModelConfig) -> Iterator[tuple[str, StoredWeight]]:
    """(Hugging Face name, where it lies) of every tensor, old buffers too.

    Raises UserError if a file of the ``config.num_layers`` layers is missing, or one of a further layer is there.
    """
    files = legacy_files(config.num_layers)
    missing = [file for file in files if not (folder / file).is_file()]
    further = [entry.name for entry in folder.iterdir() if _LAYER_FILE.fullmatch(entry.name) and entry.name not in files]
    if missing or further:
        seen = "; ".join(f"{what}: {', '.join(some[:10])}" for what, some in (("missing", missing), ("too many", sorted(further))) if some)
        rule = (
            f"{folder} must hold one file for each of the {config.num_layers} layers of its config.json, {EMBEDDINGS_FILE} and {HEAD_FILE}"
        )
        raise UserError(f"{rule}; {seen}. Copy or write the folder again.")
    for file_name, key in files.items():
        file = open_weight_file(folder / file_name)
        for short in file.specs:
            yield hugging_face_name(key, short, config.names), StoredWeight(file, short)
