"""Fine-tune a causal language model, cut into pipeline stages and replicated. Start one process per device.

    python dist_clm_train.py --model-name FOLDER --task-name data.jsonl --checkpoint-path OUT --total-steps 100 \
        --pipeline-group-size 2 --world-size 2 --dist-url tcp://127.0.0.1:9000 --rank 0     (and the same with --rank 1)
    torchrun --nproc-per-node 2 dist_clm_train.py --pipeline-group-size 2 ...

All flags: ``--help`` or docs/flags.md. Exit status: 0 trained, nothing to do, or stopped on request; 1 a mistake that a restart does not
cure; 2 the command line is wrong; 70 a defect, its traceback shown; 75 a peer or the link to it was lost, which a restart cures;
130 interrupted. With --max-restarts or --supervise this process becomes the supervisor of another one that trains. """

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of names that nobody needs, and shows frames of C++ when a peer is lost

try:
    from comms.links import PeerLost
    from training.api import train_rank
    from training.config.cli import parse_config, parse_meeting_point
    from training.job.exit_status import EXIT_DEFECT, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_USAGE
    from training.job.host_limits import explain_out_of_memory
    from training.job.report import set_up_logging
    from training.membership.announce import TELL_FLAGS_S, tell_others
    from training.membership.supervisor import arrange_supervision
    from user_error import UserError
except KeyboardInterrupt:
    print("interrupted before anything had begun", file=sys.stderr)
    raise SystemExit(130) from None  # EXIT_INTERRUPTED, which may not be known yet
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {sys.executable} lacks the package {missing.name}. Run `make setup`, then `source .venv/bin/activate`, and try again"
    ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns the exit status; says on stderr, in one message, what went wrong."""
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging("trainer")
    try:
        config = parse_config(argv)
    except UserError as error:
        meeting_point = parse_meeting_point(argv)
        if meeting_point is not None:
            with contextlib.suppress(KeyboardInterrupt):  # what was wrong is on the screen already
                tell_others(meeting_point, error, TELL_FLAGS_S)
        if not error.was_shown:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    arrange_supervision(config, [sys.executable, os.path.abspath(__file__), *argv])  # a supervisor does not return from it
    try:
        train_rank(config)
    except UserError as error:
        if not error.was_shown:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_PEER_LOST if error.restart_helps else EXIT_FAILED
    except PeerLost as error:
        print(f"error: {error}. Start the job again with the same command: it resumes from its newest checkpoint", file=sys.stderr)
        return EXIT_PEER_LOST
    except KeyboardInterrupt:
        print("interrupted; the newest checkpoint is what a restart resumes from", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BaseException as error:  # a defect of ours or of a library: shown whole, and the process still ends at once
        traceback.print_exc()
        advice = explain_out_of_memory(error)
        if advice:
            print(f"error: {advice}", file=sys.stderr)
        return EXIT_DEFECT
    return EXIT_DONE


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: threads of a broken process group can keep a failed process alive for half an hour
