"""One rank with a watch on its heartbeats: the longest time between two, and what it did then.

    python benchmarks/beat_gaps.py OUT.json dist_clm_train.py FLAGS ...

For real_scale.py. "sent": by this rank's lifeline. "life pipe": by one that it is given, as a
supervised worker has. "heard of rank N": by rank 0's hub. OUT.json is written at the end, and at a
new longest one."""

import json
import os
import re
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the scripts do, before torch is imported
WORTH_WRITING_S = 2.0


class Gaps:
    """The longest ones, by who beat and by what was done. Called from any thread."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._last: dict[str, tuple[float, str]] = {}
        self.longest: dict[str, dict[str, Any]] = {}

    def beat(self, who: str, doing: str, came_at: float | None = None) -> None:
        """came_at: the one before, if that is known."""
        now = time.monotonic()
        with self._lock:
            before, did = self._last.get(who, (None, ""))
            before = came_at if came_at is not None else before
            self._last[who] = (now, doing)
            if before is None:
                return
            kind = re.sub(r"\d+", "N", doing)
            by_kind = self.longest.setdefault(
                who, {"s": 0.0, "before": "", "after": "", "by_kind": {}}
            )
            seconds = now - before
            by_kind["by_kind"][kind] = max(seconds, by_kind["by_kind"].get(kind, 0.0))
            if seconds <= by_kind["s"]:
                return
            by_kind |= {"s": seconds, "before": did, "after": doing}
        if seconds > WORTH_WRITING_S:
            self.write()

    def write(self) -> None:
        """What is known so far."""
        with self._lock:
            self._file.write_text(json.dumps(self.longest, indent=1))


def watch(gaps: Gaps) -> None:
    """From now on, in this process."""
    from comms.heartbeat import Pulse
    from comms.lifeline import Lifeline
    from comms.members import Member
    from training.membership.supervisor import LifePipe

    ranks: dict[int, int] = {}
    make, feel, write, say = Member.__init__, Pulse.feel, Lifeline._write, LifePipe._say

    def made(self: Any, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        ranks[id(self.pulse)] = self.hello.rank

    def felt(self: Any, beat: Any, now: float) -> None:
        gaps.beat(f"heard of rank {ranks.get(id(self), '?')}", beat.doing, self.came_at)
        feel(self, beat, now)

    def written(self: Any, message: dict[str, Any]) -> None:
        write(self, message)
        if "beat" in message:
            gaps.beat("sent", message["beat"]["doing"])

    def said(self: Any, line: bytes) -> bool:
        answer = say(self, line)
        gaps.beat("life pipe", "")
        return answer

    for kind, name, patched in (
        (Member, "__init__", made),
        (Pulse, "feel", felt),
        (Lifeline, "_write", written),
        (LifePipe, "_say", said),
    ):
        setattr(kind, name, patched)
    LifePipe(os.pipe()[1]).start()


def main() -> None:
    gaps = Gaps(Path(sys.argv[1]))
    end: Callable[[int], Any] = os._exit

    def written_before_the_end(status: int) -> None:
        gaps.write()
        end(status)

    os._exit = written_before_the_end  # type: ignore[assignment]  # how the scripts end
    watch(gaps)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
