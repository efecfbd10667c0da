"""What a run says of itself: log records tagged with their place, a live progress line, train_log.jsonl, Weights & Biases.

Promises: ``<checkpoint-path>/train_log.jsonl`` gets one complete line per optimizer step, flushed, with all digits of the loss (where
the disk is full, as soon as it takes it); rows of steps that are done again after a resume are appended, never rewritten. Only rank 0
writes it and talks to Weights & Biases."""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoint.tensor_file import explained_disk_errors
from comms.place import Place
from user_error import UserError

log = logging.getLogger("trainer")

LOOK_BACK_BYTES = 2**16


class _LinesAboveTheBar(logging.Handler):
    """Log lines through tqdm, so that the progress line stays the last one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every logging.Handler: a terminal that went away must not end the training
            self.handleError(record)


def set_up_logging(place: str) -> None:
    """Log records to stderr as "[dp0/pp1] text"; called again when the place is known."""
    if not isinstance(tqdm.get_lock(), type(threading.RLock())):
        # tqdm's own is a semaphore that all processes forked from one parent share: one that died writing would silence the others for ever
        tqdm.set_lock(threading.RLock())
    handler = _LinesAboveTheBar()
    handler.setFormatter(logging.Formatter(f"[{place}] %(message)s"))
    for name in ("trainer", "tasks"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)


class Report:
    """The report of rank 0, or of a rank that has nothing to say (every call is then free)."""

    def __init__(self, *, place: Place, folder: Path, first_step: int, total_steps: int, logging_steps: int) -> None:
        self._speaks = place.rank == 0
        self._total_steps, self._logging_steps, self._step = total_steps, logging_steps, first_step
        self._first_step, self._start = first_step, time.perf_counter()
        self._path = folder / "train_log.jsonl"
        self._file: FileIO | None = None
        self._unwritten = bytearray()
        self._has_complained = False
        self._bar: tqdm[Any] | None = None
        self._wandb: Any = None
        if self._speaks:
            with explained_disk_errors(self._path):
                self._file = _open_log(self._path)
            has_size = min(shutil.get_terminal_size(fallback=(0, 0))) > 0  # some terminals say 0, and tqdm would show nothing
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                bar_format="{desc}ETA {remaining} |{bar}|",  # a narrow terminal cuts the end off
                ncols=None if has_size else 100,
                nrows=None if has_size else 24,
                dynamic_ncols=has_size,
                disable=not sys.stderr.isatty(),
                file=sys.stderr,
            )

    def start_wandb(self, project: str, folder: Path, resolved: Mapping[str, Any]) -> None:
        """Open a Weights & Biases run (WANDB_NAME and WANDB_MODE are read by wandb itself). Raises UserError if the package is missing."""
        if not self._speaks:
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError("--train-log-backend wandb needs the package wandb; install it with: pip install wandb") from error
        try:
            self._wandb = wandb.init(project=project, dir=str(folder), config=dict(resolved))
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases must start for --train-log-backend wandb; it says: {error}. Cure that, or use print"
            ) from error

    def row(self, row: Mapping[str, Any]) -> None:
        """One optimizer step. ``row`` has at least step, optimizer_step, loss, lr, grad_norm, tokens_per_s, skipped and what is
        reported of the wire."""
        if not self._speaks:
            return
        assert self._bar is not None, "rank 0 opened it"
        self._unwritten += json.dumps(row).encode() + b"\n"
        self._write_log()
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["optimizer_step"])
        before, self._step = self._step, row["step"]
        progress = f"step {row['step']}/{self._total_steps}  loss {_number(row['loss'])}  {row['tokens_per_s']:,.0f} tokens/s  "
        self._bar.set_description_str(progress, refresh=False)
        self._bar.update(row["step"] - before)
        due = row["step"] // self._logging_steps > before // self._logging_steps or row["step"] >= self._total_steps
        if due:
            log.info(
                "step %d/%d  loss %s  lr %.3g  grad norm %s  %s tokens/s%s  ETA %s%s",
                row["step"],
                self._total_steps,
                _number(row["loss"]),
                row["lr"],
                _number(row["grad_norm"]),
                f"{row['tokens_per_s']:,.0f}",
                _wire(row),
                self._eta(),
                _waited(row) + ("  SKIPPED: loss or gradient not finite" if row["skipped"] else ""),
            )

    def evaluation(self, row: Mapping[str, Any], optimizer_step: int) -> None:
        """What an evaluation found, for Weights & Biases."""
        if self._wandb is not None:
            self._wandb.log({f"evaluation/{name}": value for name, value in row.items()}, step=optimizer_step)

    def _write_log(self) -> None:
        """All rows that are not in the file yet. A disk that is full does not end a training: it is said once, and tried again."""
        assert self._file is not None, "rank 0 opened it"
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
        except OSError as error:
            if not self._has_complained:
                log.warning(
                    "cannot write %s: %s. Training goes on; the rows are kept and written when there is room", self._path, error.strerror
                )
            self._has_complained = True
            return
        self._has_complained = False

    def _eta(self) -> str:
        seconds = (time.perf_counter() - self._start) / max(1, self._step - self._first_step) * (self._total_steps - self._step)
        return str(tqdm.format_interval(seconds))

    def close(self) -> None:
        """End the progress line and the Weights & Biases run."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._write_log()
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_log(path: Path) -> FileIO:
    """Append to the log, behind its last whole line: what a killed run, or a full disk, left of another one is cut off."""
    file = FileIO(path, "a+")
    begin = end = file.seek(0, os.SEEK_END)
    while begin > 0:
        begin = max(0, end - LOOK_BACK_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0 or begin == 0:
            file.truncate(begin + found + 1)
            break
        end = begin
    return file


def _wire(row: Mapping[str, Any]) -> str:
    """What the stages sent each other in this step; empty where there is one stage."""
    if not row["wire_bytes"]:
        return ""
    errors = [f"{kind} {row[key]:.2g}" for kind, key in (("activations", "wire_error"), ("gradients", "wire_error_grad")) if row[key]]
    return f"  wire {row['wire_bytes'] / 1e6:.3g} MB" + (f" (relative error: {', '.join(errors)})" if errors else "")


def _waited(row: Mapping[str, Any]) -> str:
    """Empty where the data is there in time, as it should be."""
    share = row.get("data_wait_share", 0.0)
    return f"  waited for data {share:.0%} of the time" if share >= 0.01 else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned columns, the first row being the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
