"""The one exception type for mistakes that the person at the keyboard can cure.

Every room may raise it. Its text says the rule, the value seen and the change that cures it; the scripts print that text alone,
without a traceback, and exit non-zero. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A wrong flag, file, folder or environment. ``str(error)`` is the whole message: rule, value seen, cure."""

    restart_helps = False  # whether the same command may fare better later, as where another rank was not there in time
    was_shown = False  # set where the message had to reach the terminal before the process could end
