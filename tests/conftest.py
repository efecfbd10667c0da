"""Fixtures: a tiny random GPT-J and GPT-NeoX with a tokenizer, and data for them, made once per session with transformers and tokenizers.

No downloads.
"""

import json
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what the tests start is to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

torch.set_num_threads(1)  # forked ranks: OpenMP's threads do not survive a fork
transformers.AutoTokenizer  # noqa: B018 - imported for real here, so that forked ranks need not
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXTS = [
    f"The {n} quick brown foxes jump over {n * n} lazy dogs, and dog number {n % 7} barks {'very ' * (n % 5)}loudly." for n in range(300)
]


def make_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end).save_pretrained(folder)


def make_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: int) -> None:
    shape = {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "vocab_size": 320, **config}
    torch.manual_seed(seed)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**shape, bos_token_id=0, eos_token_id=0))
    roughen(model, embeddings="wte")
    model.to(dtype).save_pretrained(folder)


def make_neox_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """No size, no share of turned channels and no activation is the default of anybody, so that a default shows."""
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 320}
    kind = {"max_position_embeddings": 64, "rotary_pct": 0.5, "rotary_emb_base": 5000, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-3}
    torch.manual_seed(seed)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**shape, **kind, **config}, bos_token_id=0, eos_token_id=0))
    roughen(model, embeddings="embed_in")
    model.to(dtype).save_pretrained(folder)


@torch.no_grad()
def roughen(model: torch.nn.Module, *, embeddings: str) -> None:
    """Give ``model`` biases and norms that are not 0 and 1, so that a swap shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif embeddings not in name:
            parameter.mul_(3)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face GPT-J of 4 layers, width 32, 320 rows, 64 positions, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gptj"
    make_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face GPT-NeoX of 4 layers, width 32, 320 rows, 64 positions, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gptneox"
    make_neox_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three jsonl files of documents of unequal length."""
    folder = tmp_path_factory.mktemp("tasks")
    paths = []
    for place, size in enumerate((1, 3, 7)):
        path = folder / f"task{place}.jsonl"
        texts = [" ".join(TEXTS[i : i + 1 + i % size]) for i in range(place, 120, place + 1)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(path)
    return paths
