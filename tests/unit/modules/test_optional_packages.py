"""bitsandbytes is imported where 4 or 8 bits of it are asked for, and nowhere else; peft is, without it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import REPOSITORY, train_argv

from modules.optional import import_bitsandbytes, without_bitsandbytes

# Each of the scripts' own functions once, in one process: an import takes seconds.
EVERYTHING_BUT_4_BITS = """
import json, sys
sys.path.insert(0, "example_scripts")
import convert_from_hf_gptj, convert_to_hf_gptj, demo_model, dist_clm_eval, dist_clm_train
from pathlib import Path
given = json.loads(sys.argv[1])
for script in (convert_from_hf_gptj, dist_clm_train, dist_clm_eval, convert_to_hf_gptj):
    for argv in given[script.__name__]:
        is_converter = script.__name__.startswith("convert")
        assert script.main(*(["gptj"] if is_converter else []), argv) == 0, argv
        assert "bitsandbytes" not in sys.modules, argv
demo_model.generate(Path(given["exported"]), ["The"], max_new_tokens=2)
assert "bitsandbytes" not in sys.modules, "generate"
"""


def test_no_script_imports_bitsandbytes_unless_it_is_asked_for(model_folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    """It took 3 s of every start with LoRA, and on some CPUs complained of a package ``kernels``."""
    pytest.importorskip("peft")
    small = {"model_name": model_folder, "task_name": tasks[0], "total_steps": 1, "batch_size": 1}
    small |= {"seq_length": 32, "device": "cpu", "num_threads": 1}
    lora = {"train": "lora", "base_quantization": "int8"}
    evaluation = {"evaluation_data": tasks[0], "max_eval_samples": 2, "device": "cpu"}
    plain, adapted, exported = tmp_path / "plain", tmp_path / "adapted", tmp_path / "exported"
    commands = {
        "convert_from_hf_gptj": [train_argv(model_name=model_folder, save_dir=tmp_path / "cut")],
        "dist_clm_train": [
            train_argv(**small, checkpoint_path=plain),
            train_argv(**small, **lora, checkpoint_path=adapted),
        ],
        "dist_clm_eval": [train_argv(**evaluation, model_name=folder) for folder in (plain, adapted)],
        "convert_to_hf_gptj": [
            train_argv(ckpt_path=plain, save_path=exported),
            train_argv(ckpt_path=model_folder, merge_adapter=adapted, save_path=tmp_path / "merged"),
        ],
        "exported": str(exported),
    }
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING_BUT_4_BITS, json.dumps(commands)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gemm_4bit" not in done.stdout + done.stderr


@pytest.fixture
def other_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name which says at its import what the real one says on some CPUs."""
    folder = tmp_path / "bitsandbytes"
    (folder / "backends" / "cpu").mkdir(parents=True)
    for package in (folder, folder / "backends", folder / "backends" / "cpu"):
        (package / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("from . import functional\nfrom .backends.cpu import ops\n")
    (folder / "functional.py").write_text("")
    (folder / "backends" / "cpu" / "ops.py").write_text(
        "import logging\n"
        "log = logging.getLogger(__name__)\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s.', 'no kernels')\n"
        "log.warning('The native library is broken')\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("other_bitsandbytes")
def test_what_bitsandbytes_says_of_a_kernel_that_is_never_called_is_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert import_bitsandbytes().__name__ == "bitsandbytes.functional"
    assert [record.getMessage() for record in caplog.records] == ["The native library is broken"]
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        del sys.modules[name]


@pytest.mark.usefixtures("other_bitsandbytes")
def test_bitsandbytes_is_there_again_behind_the_import_of_peft() -> None:
    with without_bitsandbytes(), pytest.raises(ImportError):
        import bitsandbytes
    import bitsandbytes

    known = bitsandbytes
    with without_bitsandbytes():
        import bitsandbytes

        assert bitsandbytes is known, "what is imported already stays"
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        del sys.modules[name]
