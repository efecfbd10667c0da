"""What travels with weights: configuration, generation configuration and tokenizer, copied from folder to folder.

config.json gains the dtype of the weights beside it, under the key of transformers 5 (``dtype``) and that of 4.x (``torch_dtype``): a
wrong one would make every load convert, or round. A GPT-NeoX's rotary settings are written for both, too. A conversion from Hugging Face
also names a padding token where the tokenizer names none, as neither family's does: without one, transformers generates no batches. The
other files are copied byte for byte.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint.model_folder import read_json_object
from checkpoint.tensor_file import FileRecord, json_bytes, write_file
from checkpoint.weight_file import FETCH_AGAIN
from modules.gptneox import GPTNeoXConfig, both_rotary_forms
from user_error import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
PADDING_TOKENS = ("<|padding|>", "<|extratoken_1|>")  # what GPT-NeoX's tokenizer has for it, and what users of GPT-J's take
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def read_companions(folders: Sequence[Path], *, dtypes: Iterable[torch.dtype], with_padding: bool = False) -> dict[str, bytes]:
    """File name -> content: both configurations from the first folder, the tokenizer from the last that has any (never mixed from two).

    ``dtypes``: those of the weights they will lie beside; where they are mixed, config.json names the one that holds all without loss.
    ``with_padding``: name a padding token where the tokenizer names none.
    """
    dtype = str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    config = {**read_json_object(folders[0] / CONFIG), "dtype": dtype, "torch_dtype": dtype}
    if config.get("model_type") == GPTNeoXConfig.hf_model_type:
        config = both_rotary_forms(config)
    contents = {CONFIG: _written_again(folders[0] / CONFIG, config)}
    if (folders[0] / GENERATION_CONFIG).is_file():
        contents[GENERATION_CONFIG] = (folders[0] / GENERATION_CONFIG).read_bytes()
    tokenizers = [files for folder in folders if (files := tokenizer_files(folder))]
    contents |= {file.name: file.read_bytes() for file in (tokenizers[-1] if tokenizers else [])}
    return contents | (_padding(tokenizers[-1][0].parent, config) if with_padding and tokenizers else {})


def _padding(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that say which token pads, where they say none: one that the tokenizer has for nothing else, or the end of text."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return {}
    settings = read_json_object(folder / TOKENIZER_CONFIG)
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    ids = _token_ids(folder)
    token = next((token for token in (*PADDING_TOKENS, eos) if isinstance(token, str) and token in ids), None)
    vocab_size = config.get("vocab_size")
    is_known = token is not None and isinstance(vocab_size, int) and 0 <= ids[token] < vocab_size
    if settings.get("pad_token") is not None or token is None or not is_known:
        return {}
    changed = {
        TOKENIZER_CONFIG: _written_again(folder / TOKENIZER_CONFIG, {**settings, "pad_token": token}),
        CONFIG: json_bytes({**config, "pad_token_id": ids[token]}),
    }
    if (folder / SPECIAL_TOKENS).is_file():
        special = read_json_object(folder / SPECIAL_TOKENS)
        changed[SPECIAL_TOKENS] = _written_again(folder / SPECIAL_TOKENS, {**special, "pad_token": token})
    return changed


def _written_again(path: Path, content: Mapping[str, Any]) -> bytes:
    """``content``, read from ``path``, as a file. Python reads more than JSON has: raises UserError for that."""
    try:
        return json_bytes(content)
    except ValueError as error:
        what = f"{path} holds what cannot be written again: a number that is not finite, or half of a UTF-16 pair"
        raise UserError(f"{what} ({error}). {FETCH_AGAIN}") from error


def _token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, as the tokenizer's files say; {} where none does in a way known here."""
    found: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json_object(folder / "tokenizer.json")
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        found = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        found |= {token["content"]: token.get("id") for token in tokens if isinstance(token.get("content"), str)}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            found |= read_json_object(folder / name)
    return {token: number for token, number in found.items() if type(number) is int}


def write_companions(contents: Mapping[str, bytes], target: Path) -> list[FileRecord]:
    """Write what read_companions gave into the folder ``target``."""
    return [write_file(target / name, content, relative_to=target) for name, content in contents.items()]


def copy_companions(
    folders: Sequence[Path], target: Path, *, dtypes: Iterable[torch.dtype], with_padding: bool = False
) -> list[FileRecord]:
    """read_companions, written into ``target``."""
    return write_companions(read_companions(folders, dtypes=dtypes, with_padding=with_padding), target)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in ``folder``; [] if it holds no tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
