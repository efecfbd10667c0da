"""Evaluate a checkpoint, a Hugging Face folder or an adapter: perplexity, generated answers, likeliest labels. One process or many.

    python dist_clm_eval.py --model-name FOLDER --evaluation-data mnli=dev.jsonl --metric accuracy,labels --json -
    python dist_clm_eval.py --compare A.jsonl,B.jsonl     (files that --output wrote)

All flags: ``--help`` or docs/evaluation_flags.md. Exit status: 0 evaluated, 1 the job failed, 2 the command line is wrong, 130 interrupted.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of names that nobody needs, and shows frames of C++ when a peer is lost

try:
    from comms.links import PeerLost
    from training.config.cli import parse_meeting_point
    from training.config.evaluation import EvalConfig, parse_eval_config
    from training.evaluation.command import evaluate_rank
    from training.evaluation.results import compare, write_results
    from training.job.exit_status import EXIT_FAILED
    from training.job.report import set_up_logging
    from training.membership.announce import TELL_FLAGS_S, tell_others
    from user_error import UserError
except KeyboardInterrupt:
    print("interrupted before anything had begun", file=sys.stderr)
    raise SystemExit(130) from None  # EXIT_INTERRUPTED, which may not be known yet
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns the exit status; results go to stdout, what went wrong, in one message, to stderr."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging("evaluation")
    try:
        config = parse_eval_config(argv)
    except UserError as error:
        meeting_point = parse_meeting_point(argv)
        if meeting_point is not None:
            with contextlib.suppress(KeyboardInterrupt):  # what was wrong is on the screen already
                tell_others(meeting_point, error, TELL_FLAGS_S)
        if not error.was_shown:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        _evaluate(config)
    except UserError as error:
        if not error.was_shown:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except PeerLost as error:
        print(f"error: {error}. Start the evaluation again", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BaseException:  # a defect of ours or of a library: shown whole, and the process still ends at once
        traceback.print_exc()
        return EXIT_FAILED
    return 0


def _evaluate(config: EvalConfig) -> None:
    if config.compare is not None:
        compared = compare(config.compare)
        print(json.dumps(compared.as_json()) if config.json == "-" else compared)
        return
    results = evaluate_rank(config)
    if results is None:
        return
    write_results(results, summary=config.json, examples=config.output, picture=config.confusion_png)
    print(json.dumps(results.as_json(), indent=2, ensure_ascii=False) if config.json == "-" else results)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: threads of a broken process group can keep a failed process alive for half an hour
