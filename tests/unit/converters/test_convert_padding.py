"""A converted folder names a padding token, so that transformers generates batches from it and from every checkpoint trained on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import make_model, make_neox_model, make_tokenizer
from support.ranks import SHARED, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import converters.from_hf

TOKENIZERS = SHARED / "data" / "tokenizers"


def converted(source: Path, target: Path, family: str = "gptj") -> Path:
    assert converters.from_hf.main(family, ["--model-name", str(source), "--save-dir", str(target)]) == 0
    (folder,) = (path for path in target.iterdir() if path.is_dir())
    return folder


def generated(folder: Path, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer(prompts, return_tensors="pt", padding=True)
    made = model.generate(**asked, max_new_tokens=4, do_sample=False)
    return tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_batches_are_generated_from_a_converted_folder_and_from_a_checkpoint(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    folder = converted(model_folder, tmp_path / "converted")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"  # the tiny tokenizer has no other
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    prompts = ["The 7 quick", "And dog number 3 barks very very"]
    assert generated(folder, prompts) == [text for prompt in prompts for text in generated(folder, [prompt])]
    train(tmp_path / "ranks", model_name=folder, task_name=tasks[0], checkpoint_path=tmp_path / "run", total_steps=1, seq_length=16)
    assert len(generated(tmp_path / "run" / "1", prompts)) == 2


def test_a_token_that_is_there_for_it_is_taken_and_one_that_is_named_stays(tmp_path: Path) -> None:
    for name, extra in (("one", ["<|padding|>", "<|extratoken_1|>"]), ("other", ["<|extratoken_1|>"])):
        source = tmp_path / name
        make_model(source)
        make_tokenizer(source, vocab_size=300)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_special_tokens({"additional_special_tokens": extra})
        tokenizer.save_pretrained(source)
        folder = converted(source, tmp_path / f"{name} converted")
        read = AutoTokenizer.from_pretrained(folder)
        assert read.pad_token == extra[0]
        assert read.pad_token_id == json.loads((folder / "config.json").read_text())["pad_token_id"]
        assert read("dog 3 barks")["input_ids"] == tokenizer("dog 3 barks")["input_ids"]
    again = converted(folder, tmp_path / "again")
    assert (again / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("name", "make", "family", "token", "number"),
    [
        ("gpt-j-6b", make_model, "gptj", "<|extratoken_1|>", 50257),
        ("gpt-neox-20b", make_neox_model, "gptneox", "<|padding|>", 1),
    ],
)
def test_the_real_tokenizers_get_theirs(name: str, make: Callable[..., None], family: str, token: str, number: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, vocab_size=50432)
    for file in (TOKENIZERS / name).iterdir():
        if file.name != "config.json":
            shutil.copy(file, source / file.name)
    read = AutoTokenizer.from_pretrained(converted(source, tmp_path / "converted", family))
    assert (read.pad_token, read.pad_token_id) == (token, number)
