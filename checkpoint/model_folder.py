"""A model on disk, read as a whole: a Hugging Face folder (one file or shards, safetensors or torch), one of our own, which is the same, or
the layer shards of this trainer's relatives.

Promises: opening reads headers and never weights; names, shapes and files are proven before the first weight is copied; the legacy
buffers of old files do not exist for anyone who looks through a ModelFolder (``dropped`` lists them), 8-bit weights look like ordinary
ones, and a weight has one name whoever wrote it. Every defect of a folder is a UserError that names file and tensor.
Left to others: fetching from the hub's servers (huggingface_hub), the bytes of one file (weight_file.py), writing (layer_store.py).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.command import expanded
from checkpoint.hivemind_int8 import Int8File, dequantised
from checkpoint.legacy_layers import is_layer_shard_folder, open_layer_shards
from checkpoint.weight_file import FETCH_AGAIN, StoredWeight, TensorSpec, is_text, open_weight_file
from modules.families import canonical_name, is_legacy_buffer, read_model_config
from modules.model_config import ModelConfig
from modules.stage import Stage, meta_stage
from user_error import UserError

# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FINGERPRINT_ELEMENTS = 512
MAX_LISTED = 10
MAX_NESTING = 100  # of a JSON file; those that exist have less than ten
MAX_NAME_BYTES = 255  # of Linux's filesystems
HUB_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def resolve_model_folder(name: str, *, weights: bool = True) -> Path:
    """The folder that ``--model-name`` or ``--tokenizer-name`` means: a local one, else that name on the hub (or in its cache).

    ``weights`` False: configuration and tokenizer are enough. Raises UserError if it is neither. What cannot be a hub name (more than one
    '/', a leading '.', '/' or '~') is never looked up there.
    """
    if not name.strip():
        raise UserError("the name of a model or tokenizer is empty. Give a folder or a name on the hub.")
    path = expanded(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"a model is named by its folder, and {name} is a file. Give the folder that holds config.json.")
    if name[0] in "./~" or name.count("/") > 1 or name.endswith("/"):
        raise UserError(f"there is no model folder {name} (looked for {path.absolute()}). Check the path.")
    return _hub_snapshot(name, weights)


class ModelFolder:
    """An open model folder. Make it with ``ModelFolder.open``; ranks on different hosts compare ``digest()``."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        weights: Mapping[str, StoredWeight],
        *,
        dropped: Mapping[str, StoredWeight] | None = None,
        weights_path: Path | None = None,
    ) -> None:
        """path: where config.json and the tokenizer are; weights_path: where the weights are, if elsewhere, for messages.

        weights: by their Hugging Face names, wherever they lie and whatever they are called there. dropped: the same of old buffers.
        """
        self.path, self.config = path, config
        self.weights_path = weights_path or path
        self.weights, self.dropped = dict(weights), dict(dropped or {})

    @classmethod
    def open(cls, path: Path, *, config_path: Path | None = None) -> "ModelFolder":
        """Read config.json (of ``config_path``, for weights without one) and every header.

        Raises UserError for whatever is missing, unreadable or at odds with the index.
        """
        if not path.is_dir():
            raise UserError(f"there is no model folder {path}. Check the path.")
        config = read_json_object((config_path or path) / "config.json")
        present = [name for name in WEIGHT_FILES if (path / name).is_file()]
        if not any(name.startswith("model.") for name in present) and is_layer_shard_folder(path):
            found: Iterable[tuple[str, StoredWeight]] = open_layer_shards(path, read_model_config(config))
        elif not present:
            if (path / "adapter_config.json").is_file():
                what = f"{path} holds an adapter, and not the model that it changes"
                raise UserError(f"{what}. Give that model; a run goes on with its adapters by itself, from its --checkpoint-path")
            looked_for = f"none of {', '.join(WEIGHT_FILES)}, and no pytorch_0.pt"
            raise UserError(f"the model folder {path} holds no weights: {looked_for}. {FETCH_AGAIN}")
        elif present[0].endswith(".index.json"):
            found = _open_shards(path / present[0])
        else:
            found = _open_single(path / present[0])
        return cls.of(config_path or path, config, found, weights_path=path)

    @classmethod
    def of(
        cls, path: Path, config: dict[str, Any], found: Iterable[tuple[str, StoredWeight]], *, weights_path: Path | None = None
    ) -> "ModelFolder":
        """A folder of the tensors ``found``, as they are called where they lie (with the model's prefix): names made canonical, old buffers
        set aside, 8-bit weights put together. Raises UserError if two tensors are the same weight."""
        weights: dict[str, StoredWeight] = {}
        dropped: dict[str, StoredWeight] = {}
        for name, stored in found:
            if is_legacy_buffer(name):
                dropped[name] = stored
                continue
            canonical = canonical_name(name, config)
            if canonical in weights:
                both = f"{weights[canonical].name} in {weights[canonical].file.path} and {stored.name} in {stored.file.path}"
                raise UserError(f"every weight must be there once, and {canonical} is there twice: {both}. Keep the right one of the two.")
            weights[canonical] = stored
        return cls(path, config, dequantised(weights, weights_path or path), dropped=dropped, weights_path=weights_path)

    @classmethod
    def open_config(cls, path: Path) -> "ModelFolder":
        """A model whose weights are yet to be drawn: names and shapes follow from config.json alone, the dtype is what it says, else fp32.

        Weights that lie in the folder are not looked at; read() must not be called. Raises UserError.
        """
        config = read_json_object(path / "config.json")
        stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        dtype = getattr(torch, stated, None)
        if dtype not in WEIGHT_DTYPES:
            raise UserError(f"the dtype in {path / 'config.json'} must be that of weights, such as float16 or float32; it is {stated!r}")
        return cls(path, config, _undrawn(read_model_config(config), path, dtype))

    def names(self) -> list[str]:
        """Every weight, sorted."""
        return sorted(self.weights)

    def shape(self, name: str) -> torch.Size:
        return self.weights[name].spec.shape

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].spec.dtype

    def read(self, name: str) -> Tensor:
        """The weight as it lies in the mapped file (any alignment): copy what you keep, do not write into it."""
        weight = self.weights[name]
        return weight.file.read(weight.name)

    @property
    def is_int8(self) -> bool:
        """True if weights lie there in 8 bits; they look like float32."""
        return any(isinstance(weight.file, Int8File) for weight in self.weights.values())

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of all weights, or of those called ``names``."""
        return sum(self.weights[name].spec.num_bytes for name in (self.weights if names is None else names) if name in self.weights)

    def fingerprint(self, progress: Callable[[int], object] = lambda num_weights: None) -> str:
        """sha256 over every name, shape and dtype and some values of every weight (three runs of FINGERPRINT_ELEMENTS): other where the
        model was fine-tuned or converted to another dtype, equal where it was only cut into other files. progress: hears of every weight
        that was read."""
        found = hashlib.sha256()
        for name in self.names():
            values = self.read(name).reshape(-1)
            found.update(f"{name} {list(self.shape(name))} {self.dtype(name)}".encode())
            for start in (0, len(values) // 2, max(0, len(values) - FINGERPRINT_ELEMENTS)):
                found.update(values[start : start + FINGERPRINT_ELEMENTS].contiguous().view(torch.uint8).numpy().tobytes())
            progress(1)
        return found.hexdigest()

    def digest(self) -> str:
        """sha256 over the configuration and every (name, shape, dtype): equal where hosts see the same kind of model. Reads no weights."""
        table = [(name, list(self.shape(name)), str(self.dtype(name))) for name in self.names()]
        return hashlib.sha256(json.dumps([self.config, table], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _NoFile:
    """Stands where a file of weights would: specs only."""

    path: Path
    specs: Mapping[str, TensorSpec]

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} is drawn and not read")


def _undrawn(config: ModelConfig, path: Path, dtype: torch.dtype) -> dict[str, StoredWeight]:
    shapes = {name: tensor.shape for name, tensor in meta_stage(config, 0, config.num_layers).state_dict().items()}
    file = _NoFile(path=path, specs={name: TensorSpec(dtype=dtype, shape=shape) for name, shape in shapes.items()})
    return {name: StoredWeight(file, name) for name in shapes}


def check_model_folder(folder: ModelFolder, config: ModelConfig) -> None:
    """Prove from the headers that the folder holds exactly the weights of ``config``; else one UserError with all that is wrong."""
    expected = {name: tensor.shape for name, tensor in meta_stage(config, 0, config.num_layers).state_dict().items()}
    seen = set(folder.names())
    common = sorted(seen & set(expected))
    wrong_shapes = [f"{n} is {list(folder.shape(n))}, must be {list(expected[n])}" for n in common if folder.shape(n) != expected[n]]
    wrong_dtypes = [f"{name} is {folder.dtype(name)}" for name in common if folder.dtype(name) not in WEIGHT_DTYPES]
    problems = [
        *listed("missing", sorted(set(expected) - seen)),
        *listed("extra", sorted(seen - set(expected))),
        *listed("wrong shape", wrong_shapes),
        *listed("not a floating-point weight", wrong_dtypes),
    ]
    if problems:
        rule = (
            f"{folder.weights_path} must hold exactly the weights of its config.json ({config.num_layers} layers of width {config.width})"
        )
        raise UserError(f"{rule}, but: " + "; ".join(problems) + f". {FETCH_AGAIN}")


@torch.no_grad()
def load_stage(stage: Stage, folder: ModelFolder) -> None:
    """Copy the stage's own weights from ``folder`` into the stage's own storage, in the stage's dtype. Others are not read.

    Copies, because a mapped weight lies at whatever address its file gives it, and kernels round differently at other alignments.
    Raises UserError, before anything is copied, if one of the stage's weights is missing or has another shape.
    """
    parameters = dict(stage.named_parameters())
    load_weights(folder, {name: p.shape for name, p in parameters.items()}, lambda name, values: parameters[name].copy_(values))


def load_weights(
    folder: ModelFolder,
    shapes: Mapping[str, torch.Size],
    take: Callable[[str, Tensor], object],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Hand the weights of ``shapes`` to ``take`` one after the other, as they lie in the mapped files. ``progress`` hears the bytes just
    taken. Raises UserError, before the first, if one is missing or has another shape."""
    names = set(folder.names())
    missing = [name for name in shapes if name not in names]
    wrong = [name for name, shape in shapes.items() if name in names and folder.shape(name) != shape]
    if missing or wrong:
        raise UserError(f"{folder.path} does not fit this model: " + "; ".join(listed("missing", missing) + listed("wrong shape", wrong)))
    for name in shapes:
        take(name, folder.read(name))
        progress(folder.weights[name].spec.num_bytes)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; UserError if there is none."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} must be a file, and is a pipe or a device. {FETCH_AGAIN}")  # a pipe would be waited for
        content = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"the folder {path.parent} has no {path.name}. {FETCH_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions and its disk.") from error
    except ValueError as error:  # not JSON, or not even UTF-8
        raise UserError(f"{path} is not valid JSON: {error}. {FETCH_AGAIN}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid JSON of ours: it is nested too deeply. {FETCH_AGAIN}") from error
    if _is_nested_deeper(content, MAX_NESTING):  # what can be read can be written again and shown only if it is not nested as deep as that
        raise UserError(f"{path} is not valid JSON of ours: it is nested too deeply. {FETCH_AGAIN}")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(content).__name__}. {FETCH_AGAIN}")
    return content


def _is_nested_deeper(content: Any, limit: int) -> bool:
    """True if there are more than ``limit`` containers inside each other."""
    level = [content]
    for _ in range(limit + 1):
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return False
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return True


def listed(what: str, items: list[str]) -> list[str]:
    """[] or one clause: what, how many, the first few."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return [f"{what} ({len(items)}): {', '.join(items[:MAX_LISTED])}{more}"] if items else []


def _open_single(path: Path) -> list[tuple[str, StoredWeight]]:
    file = open_weight_file(path)
    parts = [name for name in file.specs if re.match(r"(model\.)?\d+\.", name)]
    if parts:
        what = f"{path} is no model but one stage of a training run of another trainer: it holds {parts[0]}"
        raise UserError(f"{what}. Give the run's checkpoint folder, with its prank_0_checkpoint.pt, to the converter.")
    return [(name, StoredWeight(file, name)) for name in file.specs]


def _open_shards(index: Path) -> list[tuple[str, StoredWeight]]:
    """(name, where it lies), after the index and the shards have been compared both ways. Buffers may lack on either side."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(is_file_name(file) and is_text(name) for name, file in weight_map.items()):
        raise UserError(f"{index} must hold a weight_map from tensor names to files beside it. {FETCH_AGAIN}")
    weight_map = {name: file for name, file in weight_map.items() if not is_legacy_buffer(name)}
    shards = {file: open_weight_file(index.parent / file) for file in sorted(set(weight_map.values()))}
    lacking = [f"{name} in {file}" for name, file in sorted(weight_map.items()) if name not in shards[file].specs]
    found = [(name, file) for file, shard in shards.items() for name in sorted(shard.specs)]
    unlisted = [f"{name} in {file}" for name, file in found if weight_map.get(name) != file and not is_legacy_buffer(name)]
    problems = listed("the index names what the file lacks", lacking) + listed("extra, not in the index", unlisted)
    if problems:
        raise UserError(f"{index} and its files disagree: " + "; ".join(problems) + f". {FETCH_AGAIN}")
    return [(name, StoredWeight(shards[file], name)) for name, file in found]


def is_file_name(name: object) -> bool:
    """True for what can name a file beside the one that it is read from."""
    if not is_text(name) or name in ("", ".."):
        return False
    return Path(name).name == name and len(name.encode()) <= MAX_NAME_BYTES


def _hub_snapshot(name: str, weights: bool) -> Path:
    """Download (or find in the cache) configuration, tokenizer and weights of a hub repository; ``.bin`` only without safetensors."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=HUB_TEXT_FILES, ignore_patterns=["*/*"]))
        folder = Path(snapshot_download(name, allow_patterns=[*HUB_TEXT_FILES, "*.safetensors"], ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_TEXT_FILES, "*.bin"], ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        tried = f"{Path(name).absolute()} is no folder, and the hub's {name!r} could be had neither from the network nor from the cache"
        cure = "Check the name, the network and HF_HUB_OFFLINE, or give a local folder."
        raise UserError(f"there is no model {name}: {tried} ({reason}). {cure}") from error
    return folder
