"""A GPT-J small enough for a laptop, with random weights and a tokenizer of its own, as an ordinary Hugging Face folder.

The demo starts from it as a user starts from EleutherAI/gpt-j-6b: nothing later in the chain knows that this one is a toy.
Heavy imports are inside the functions, so that `demo.py --help` answers at once.
"""

import json
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"  # GPT-J's own: begins, ends and, for want of another, pads
NUM_POSITIONS = 256


def texts_of(files: list[Path]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def train_tokenizer(files: list[Path], folder: Path, *, vocab_size: int = 2048) -> int:
    """Train a byte-level BPE on the texts of jsonl ``files``, save it to ``folder`` as a Hugging Face tokenizer; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text of the user can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(files), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=NUM_POSITIONS,
    )
    fast.save_pretrained(folder)
    return len(fast)


def make_model(folder: Path, *, num_ids: int, seed: int = 0) -> int:
    """Save a random GPT-J for ``num_ids`` token ids to ``folder``; returns its number of parameters."""
    import torch
    from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=-(-num_ids // 64) * 64,  # rounded up, as GPT-J's own 50400 rows for 50257 ids
        n_positions=NUM_POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        rotary_dim=16,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    model = GPTJForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def generate(folder: Path, prompts: list[str], *, max_new_tokens: int = 48, seed: int = 0) -> list[str]:
    """What any user of transformers would do with the exported folder; returns prompt and continuation of each."""
    import torch
    import transformers

    torch.manual_seed(seed)  # transformers' own set_seed imports its trainer, and with that peft and bitsandbytes
    generator = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    answers = generator(prompts, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_k=50)
    return [answer[0]["generated_text"] for answer in answers]
