"""The promise that reading for ever takes no more memory than reading for a while."""

import subprocess
import sys
from pathlib import Path

from support.ranks import REPOSITORY
from support.tiers import full

# Documents of 40 to 160 bytes; half of the tokens come from a plain file, half from a compressed one, which goes through its three
# windows and begins again. 18,000 sequences kept alive by mistake would take 46 MB.
SCRIPT = """
import json, sys
from pathlib import Path
import psutil, zstandard
from tasks.encoding import Encoder
from tasks.mixture import Mixture
from tasks.packing import PackingRules
from tasks.prompts import TaskOptions, tasks_by_name
from tasks.readers import open_documents
from tasks.task_list import parse_task_list

folder = Path(sys.argv[1])
content = "".join(json.dumps({"text": f"{n:06d}" + "x" * (40 + n % 120)}) + "\\n" for n in range(25_000)).encode()
(folder / "a.jsonl").write_bytes(content)
(folder / "b.jsonl.zst").write_bytes(zstandard.compress(content))
del content
mixture = Mixture(
    tasks=parse_task_list(f"{folder / 'a.jsonl'},{folder / 'b.jsonl.zst'}"),
    open_documents=lambda spec, place: open_documents(spec, tasks_by_name(TaskOptions()), seed=0, place=place),
    encoder=Encoder(token_ids=lambda texts: [list(text.encode()) for text in texts], decode=str, eos_token_id=256),
    rules=PackingRules(seq_length=320), seed=0,
)
rss = {}
for number in range(1, 20_001):
    mixture.next_sequence()
    if number in (2_000, 20_000):
        rss[number] = psutil.Process().memory_info().rss
assert mixture.state()["tasks"][1]["pass"] >= 1, mixture.state()
print(rss[20_000] - rss[2_000])
"""


@full
def test_memory_after_20000_sequences_is_that_after_2000(tmp_path: Path) -> None:
    """In a process of its own, since other tests' memory comes and goes."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5 * 10**6, f"{int(done.stdout) / 1e6:.1f} MB more"
