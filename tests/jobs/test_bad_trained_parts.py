"""Mistakes around adapters, quantised bases and optimizers: one clear message on every rank, before any weight is loaded."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.models import make_model, make_tokenizer
from support.ranks import Process, eight_sequences, free_port, launch, steps_in, train, train_argv

from modules import quantized

LORA = {"train": "lora", "lora_rank": 2, "total_steps": 1}


@pytest.fixture(scope="module")
def flags(model_folder: Path, tasks: list[Path]) -> dict[str, Any]:
    return eight_sequences(model_folder, tasks)


def refused(folder: Path, *wanted: str, before: Callable[[int], None] | None = None, **flags: Any) -> list[Process]:
    """Both ranks say all of ``wanted`` and end soon, without a traceback."""
    processes = train(folder, stages=2, expect=None, timeout_s=30, before=before, **flags)
    for process in processes:
        text = " ".join(process.text.split())
        assert process.status not in (0, None) and "Traceback" not in text, text
        assert all(part in text for part in wanted), text
    return processes


def without(*packages: str) -> Callable[[int], None]:
    """The packages cannot be imported."""

    def before(_: int) -> None:
        for package in packages:
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                del sys.modules[name]
            sys.modules[package] = None  # type: ignore[assignment]

    return before


@pytest.mark.parametrize(
    ("package", "flag", "command"),
    [
        ("bitsandbytes", {"optimizer": "8bit-adam"}, "pip install bitsandbytes"),
        ("bitsandbytes", {**LORA, "base_quantization": "nf4"}, "pip install bitsandbytes"),
        ("peft", LORA, "pip install peft"),
        ("peft", {"train": "layernorm"}, "pip install peft"),
    ],
)
def test_a_missing_package_is_named_with_its_installation(
    package: str, flag: dict[str, Any], command: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    refused(tmp_path, package, command, checkpoint_path=tmp_path / "run", before=without(package), **{**flags, **flag})
    assert not list((tmp_path / "run").glob("*")), "nothing is written"


def test_a_bitsandbytes_that_cannot_quantise_here_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def broken(_: int) -> None:
        def no_kernel(*_: Any) -> Any:
            raise RuntimeError("no kernel image is available")

        quantized._quantize_nf4 = no_kernel

    wanted = ("--base-quantization nf4 needs a bitsandbytes that can quantise on cpu", "no kernel image", "int8")
    refused(tmp_path, *wanted, before=broken, checkpoint_path=tmp_path / "run", **{**flags, **LORA, "base_quantization": "nf4"})


@pytest.fixture(scope="module")
def adapter_run(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of LoRA."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    train(folder, checkpoint_path=folder / "run", **{**flags, **LORA})
    return folder / "run"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"lora_rank": 4}, ("--lora-rank 2, now it is 4",)),
        ({"lora_alpha": 3}, ("--lora-alpha 16.0, now it is 3.0",)),
        ({"lora_target_modules": "q_proj"}, ("--lora-target-modules all-linear, now it is q_proj",)),
        ({"train": "layernorm", "lora_rank": None}, ("--train lora, now it is layernorm",)),
        ({"train": "all", "lora_rank": None}, ("--train lora, now it is all",)),
        ({"optimizer": "8bit-adam"}, ("--optimizer adam, now it is 8bit-adam",)),
    ],
)
def test_a_run_goes_on_training_what_it_began_with(
    change: dict[str, Any], wanted: tuple[str, ...], flags: dict[str, Any], adapter_run: Path, tmp_path: Path
) -> None:
    if "optimizer" in change:
        pytest.importorskip("bitsandbytes")
    before = steps_in(adapter_run)
    refused(tmp_path, *wanted, "another --checkpoint-path", checkpoint_path=adapter_run, **{**flags, **LORA, "total_steps": 2, **change})
    assert steps_in(adapter_run) == before


def test_the_same_targets_in_other_words_are_the_same(flags: dict[str, Any], adapter_run: Path, tmp_path: Path) -> None:
    written_out = "fc_out,fc_in,q_proj,k_proj,v_proj,out_proj"
    (process,) = train(
        tmp_path,
        checkpoint_path=tmp_path / "run",
        resume=adapter_run,
        **{**flags, **LORA, "total_steps": 2, "lora_target_modules": written_out},
    )
    assert "starting at step 1 of 2" in process.text


def test_adapters_are_not_put_beside_another_model_of_the_same_shape(flags: dict[str, Any], adapter_run: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", seed=9)
    make_tokenizer(tmp_path / "other")
    own = {**flags, **LORA, "total_steps": 2, "model_name": tmp_path / "other"}
    refused(
        tmp_path / "ranks", "adapters belong to the model they were trained on", str(tmp_path / "other"), checkpoint_path=adapter_run, **own
    )


def test_adapters_go_on_beside_a_copy_of_their_model(flags: dict[str, Any], adapter_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Where it lies and how it is cut into files is no matter."""
    shutil.copytree(model_folder, tmp_path / "copy")
    own = {**flags, **LORA, "total_steps": 2, "model_name": tmp_path / "copy"}
    (process,) = train(tmp_path / "ranks", checkpoint_path=tmp_path / "run", resume=adapter_run, **own)
    assert "starting at step 1 of 2" in process.text


def test_a_base_that_is_not_finite_is_not_quantised(flags: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.0.mlp.fc_in.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    own = {**flags, **LORA, "base_quantization": "int8", "model_name": tmp_path / "model"}
    refused(tmp_path / "ranks", "fc_in", checkpoint_path=tmp_path / "run", **own)


def test_a_rank_that_reads_another_model_is_named_whatever_stage_it_is(flags: dict[str, Any], adapter_run: Path, tmp_path: Path) -> None:
    """Stages hold other layers, so no replica could notice."""
    make_model(tmp_path / "other", seed=9)
    make_tokenizer(tmp_path / "other")

    def model_of(rank: int) -> dict[str, Any]:
        return {"model_name": tmp_path / "other"} if rank else {}

    for own in ({**flags, "total_steps": 1}, {**flags, **LORA, "total_steps": 2, "resume": adapter_run}):
        common = {**own, "pipeline_group_size": 2, "world_size": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}", "num_threads": 1}
        common |= {"device": "cpu", "rendezvous_timeout": 30, "checkpoint_path": tmp_path / own.get("train", "all")}
        processes = launch(lambda rank, common=common: train_argv(**{**common, "rank": rank, **model_of(rank)}), 2, tmp_path / "ranks")
        for process in processes:
            assert process.wait(30) not in (0, None)
            assert "all ranks read the same model; rank 1 (stage 1 of 2" in " ".join(process.text.split()), process.text


def test_a_weight_that_fp16_cannot_hold_is_named(flags: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.3.mlp.fc_out.weight"][2, 1] = -1e5
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = ("--fp16 holds numbers up to 65504", "transformer.h.3.mlp.fc_out.weight has 100000", "--bf16")
    refused(tmp_path / "ranks", *wanted, checkpoint_path=tmp_path / "run", **{**flags, "fp16": "true", "model_name": tmp_path / "model"})


def test_an_adapter_is_no_model_to_train(flags: dict[str, Any], adapter_run: Path, tmp_path: Path) -> None:
    own = {**flags, **LORA, "model_name": adapter_run / "1"}
    refused(tmp_path / "ranks", "holds an adapter, and not the model that it changes", checkpoint_path=tmp_path / "run", **own)
