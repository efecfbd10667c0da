"""A tiny random GPT-J and GPT-NeoX of transformers, a tokenizer and texts for them. No downloads, and nothing of this project."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
