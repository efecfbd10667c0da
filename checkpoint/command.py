"""What every command line of this room and of the converters does with errors that the system raises: say them, without a traceback.

A file that may not be read, a name that is too long, a circle of links, a home folder of nobody: the user can cure them, and they are
raised at too many places to be caught there.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from user_error import UserError


@contextmanager
def explained_system_errors() -> Iterator[None]:
    """Around a whole command: turns an OSError into a UserError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        path = "a file" if error.filename is None else str(error.filename)
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read or entered: {reason}. Check the path and its permissions.") from error


def exit_status(work: Callable[[], int], *, before_error: str = "") -> int:
    """What ``work`` returns, or, said on stderr behind ``before_error``, 1 for what the user can cure, and 130 for Ctrl-C."""
    try:
        with explained_system_errors():
            return work()
    except UserError as error:
        sys.stderr.write(f"{before_error}{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


def expanded(path: Path | str) -> Path:
    """``path`` with ~ and ~user replaced. Raises UserError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with the home folder of a user whom this host does not know. Write the path out.") from error
