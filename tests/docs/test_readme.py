"""The README's commands, run as they stand there, at toy size: only the model's name, the data and the numbers are made small."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import REPOSITORY, free_port, log_rows
from support.tiers import full

BLOCK = re.compile(r"<!-- tested: (?P<name>[\w ]+) -->\n```bash\n(?P<code>.*?)```", re.DOTALL)
SMALL = {
    r"--total-steps \d+": "--total-steps 4",
    r"TOTAL_STEPS=\d+": "TOTAL_STEPS=4",
    r"--checkpoint-steps \d+": "--checkpoint-steps 2",
    r"CHECKPOINT_STEPS=\d+": "CHECKPOINT_STEPS=2",
    r"--seq-length \d+": "--seq-length 32",
    r"--evaluation-steps \d+": "--evaluation-steps 2",
    r"SEQ_LENGTH=\d+": "SEQ_LENGTH=32",
    r"/2000\b": "/4",
}


def blocks() -> dict[str, str]:
    return {match["name"]: match["code"] for match in BLOCK.finditer((REPOSITORY / "README.md").read_text())}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, tasks: list[Path]) -> Path:
    """A copy of the checkout with this Python as its .venv, a tiny model in GPT-J's place and two data files."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    (copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copytree(model_folder, copy / "hub" / "EleutherAI_gpt-j-6b")
    shutil.copy(tasks[0], copy / "my_texts.jsonl")
    shutil.copy(tasks[1], copy / "my_chats.jsonl")
    for name, start in (("my_labels.csv", 0), ("my_held_out.csv", 40)):
        rows = [f"dog {n} barks,{'good' if n % 2 else 'bad'}" for n in range(start, start + 20)]
        (copy / name).write_text("\n".join(["text,label", *rows, ""]))
    return copy


def run(checkout: Path, name: str) -> str:
    code = blocks()[name].replace("EleutherAI/gpt-j-6b", "hub/EleutherAI_gpt-j-6b").replace(":9000", f":{free_port()}")
    for pattern, small in SMALL.items():
        code = re.sub(pattern, small, code)
    environment = {**os.environ, "PORT": str(free_port()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    environment |= {
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(["bash", "-euc", code], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@full
def test_the_readmes_commands_work_from_the_first_to_the_last(checkout: Path) -> None:
    assert list(blocks()) == ["convert", "script", "by hand", "torchrun", "back", "memory", "lora", "timeline", "evaluate"]
    run(checkout, "convert")
    assert (checkout / "pretrained_models" / "EleutherAI_gpt-j-6b" / "layer_03.safetensors").exists()
    for name, folder in (("script", "mine"), ("by hand", "by_hand"), ("torchrun", "torchrun")):
        run(checkout, name)
        assert log_rows(checkout / "model_checkpoints" / folder)[-1]["step"] == 4, name
        assert (checkout / "model_checkpoints" / folder / "4" / "manifest.json").exists(), name
    said = run(checkout, "back")
    assert "Once upon a time" in said
    assert (checkout / "my-gptj" / "model.safetensors").exists()
    assert "weights, quantised" in run(checkout, "memory")
    run(checkout, "lora")
    assert (checkout / "model_checkpoints" / "lora" / "4" / "adapter_model.safetensors").exists()
    assert (checkout / "my-gptj-lora" / "model.safetensors").exists()
    assert "exposed communication" in run(checkout, "timeline")
    assert (checkout / "timeline.png").stat().st_size > 1000
    assert "McNemar" in run(checkout, "evaluate")
    assert (checkout / "confusion.png").stat().st_size > 1000
    assert log_rows(checkout / "model_checkpoints" / "labels")[-1]["step"] == 4


def test_every_flag_setting_and_file_that_the_readme_names_exists() -> None:
    text = (REPOSITORY / "README.md").read_text()
    flags = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", text)) - {"--help", "--nproc-per-node"}
    help_texts = "".join((REPOSITORY / "docs" / name).read_text() for name in ("flags.md", "evaluation_flags.md")) + "--config"
    tools = [*(REPOSITORY / "converters").glob("*.py"), *(REPOSITORY / "checkpoint" / name for name in ("gather.py", "inspect.py"))]
    tools.append(REPOSITORY / "comms" / "wireguard.py")
    help_texts += "".join(path.read_text() for path in tools)
    assert not [flag for flag in flags if flag not in help_texts]
    for link in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (REPOSITORY / link).exists(), link
    settings = (REPOSITORY / "example_scripts" / "finetune_gptj.sh").read_text()
    for setting in re.findall(r"\b([A-Z_]{3,})=", blocks()["script"]):
        assert f'"${{{setting}:=' in settings, setting
