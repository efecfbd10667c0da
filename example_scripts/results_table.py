"""One table of many evaluations, made from the files that ``dist_clm_eval.py --json`` wrote. Needs nothing but Python.

    python example_scripts/results_table.py results/*.json            aligned, for the terminal
    python example_scripts/results_table.py --markdown results/*.json  for a page

A row is named as its file is; dots part the columns (``lora-all.raw.json``: way "lora-all", prompt "raw"). Rows are sorted by accuracy,
the best first. `majority` is what answering the commonest label always would have reached on the same examples. Exit status: 0, or 1
with a message where a file cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("way", "prompt", "examples", "accuracy", "badly formed", "likeliest label", "macro-F1", "perplexity", "majority")


def row_of(path: Path) -> dict[str, str]:
    """The cells of one file by column; those it has nothing for are left out. Raises ValueError for what --json did not write."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a file of dist_clm_eval.py --json: {error}") from error
    if not isinstance(found, dict) or "num_examples" not in found:
        raise ValueError(f"{path} must be a file of dist_clm_eval.py --json; it has no num_examples. Evaluate again with --json {path}")
    way, _, prompt = path.name.removesuffix(".json").partition(".")
    cells = {"way": way, "prompt": prompt, "examples": str(found["num_examples"])}
    generated, likeliest = found.get("accuracy"), found.get("labels")
    if generated is not None:
        cells["accuracy"] = percent(generated["accuracy"])
        cells["badly formed"] = str(generated["badly_formed"])
    if likeliest is not None:
        cells["likeliest label"] = percent(likeliest["accuracy"])
    if "perplexity" in found:
        cells["perplexity"] = f"{found['perplexity']:.4g}"
    confusion = next((answers["confusion"] for answers in (generated, likeliest) if answers and "confusion" in answers), None)
    if confusion is not None:
        cells["macro-F1"] = f"{confusion['macro_f1']:.4f}"
        cells["majority"] = percent(majority(confusion["matrix"]))
    return cells


def majority(matrix: Sequence[Sequence[int]]) -> float:
    """The largest share that one label has in what was expected; rows of ``matrix`` are expected labels."""
    counts = [sum(row) for row in matrix]
    return max(counts, default=0) / max(1, sum(counts))


def percent(share: float) -> str:
    return f"{share:.2%}"


def table(rows: Sequence[dict[str, str]], *, markdown: bool) -> str:
    """The columns that any row has something for, first text to the left, numbers to the right."""
    columns = [column for column in COLUMNS if any(row.get(column) for row in rows)]
    lines = [columns, *([row.get(column, "") or "-" for column in columns] for row in rows)]
    if markdown:
        rule = ["---" if column in ("way", "prompt") else "---:" for column in columns]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    places = [(">", "<")[column in ("way", "prompt")] + str(max(len(line[c]) for line in lines)) for c, column in enumerate(columns)]
    return "\n".join("  ".join(f"{cell:{place}}" for cell, place in zip(line, places, strict=True)).rstrip() for line in lines)


def best_first(row: dict[str, Any]) -> float:
    shown = row.get("accuracy") or row.get("likeliest label")
    return -float(shown.rstrip("%")) if shown else 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One table of the files that dist_clm_eval.py --json wrote.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="write the table as Markdown")
    given = parser.parse_args(argv)
    try:
        rows = sorted((row_of(path) for path in given.files), key=best_first)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows, markdown=given.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
