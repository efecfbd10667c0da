"""Where the rooms meet: flags, the job, the loop, the report. For programs: ``training.run`` and ``training.evaluate`` (api.py)."""

from typing import Any

_ENTRIES = ("run", "evaluate")


def __getattr__(name: str) -> Any:
    """The functions for programs, at their first use: importing one part of this room should not import all of torch with it."""
    if name in _ENTRIES:
        from training import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
