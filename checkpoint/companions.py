"""What travels with weights: configuration, generation configuration and tokenizer, copied from folder to folder.

config.json gains the dtype of the weights beside it, under the key of transformers 5 (``dtype``) and that of 4.x (``torch_dtype``): a
wrong one would make every load convert, or round. A GPT-NeoX's rotary settings are written for both, too. The other files are copied
byte for byte.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import FileRecord, json_bytes, write_file
from modules.gptneox import GPTNeoXConfig, both_rotary_forms

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def read_companions(folders: Sequence[Path], *, dtypes: Iterable[torch.dtype]) -> dict[str, bytes]:
    """File name -> content: both configurations from the first folder, the tokenizer from the last that has any (never mixed from two).

    ``dtypes``: those of the weights they will lie beside; where they are mixed, config.json names the one that holds all without loss.
    """
    dtype = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    config = {**read_json_object(folders[0] / CONFIG), "dtype": dtype, "torch_dtype": dtype}
    if config.get("model_type") == GPTNeoXConfig.hf_model_type:
        config = both_rotary_forms(config)
    contents = {CONFIG: json_bytes(config)}
    if (folders[0] / GENERATION_CONFIG).is_file():
        contents[GENERATION_CONFIG] = (folders[0] / GENERATION_CONFIG).read_bytes()
    tokenizers = [files for folder in folders if (files := tokenizer_files(folder))]
    return contents | {file.name: file.read_bytes() for file in (tokenizers[-1] if tokenizers else [])}


def write_companions(contents: Mapping[str, bytes], target: Path) -> list[FileRecord]:
    """Write what read_companions gave into the folder ``target``."""
    return [write_file(target / name, content, relative_to=target) for name, content in contents.items()]


def copy_companions(folders: Sequence[Path], target: Path, *, dtypes: Iterable[torch.dtype]) -> list[FileRecord]:
    """read_companions, written into ``target``."""
    return write_companions(read_companions(folders, dtypes=dtypes), target)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``; [] if it holds no tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
