"""From a frozen dataclass to a command line: every field declared with ``flag(...)`` becomes a flag, a YAML key and a line of
documentation.

One declaration, so that a flag cannot exist without help, type and default. Command line and ``--config FILE.yaml`` go through
the same parser: the file's entries are put before the command line's, which therefore win."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from tasks.task_list import join_items
from user_error import UserError

Settings = TypeVar("Settings")


_LONGEST_ERROR = 4000  # characters of argparse's, which quotes what it does not understand
# Of yaml's constructors, for what has the form of a date or the tag of a number and is none; and for nesting without end.
_UNEXPLAINED_YAML_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


class _OncePerKeyLoader(yaml.SafeLoader):
    """YAML as safe_load reads it, where no key may stand twice: the first of two would be forgotten without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        doubled = next((key for key, count in Counter(keys).items() if count > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{doubled!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def flag(default: Any, help_text: str, *, group: str) -> Any:
    """A dataclass field that is a flag. ``help_text`` gives meaning, unit and scope; the default is appended to it."""
    return dataclasses.field(default=default, metadata={"help": help_text, "group": group})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _, separator, unknown = message.partition("unrecognized arguments: ")
        if separator:
            known = [option for action in self._actions for option in action.option_strings]
            given = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
            near = [f"{match[0]} for {word}" for word in given if (match := difflib.get_close_matches(word, known, n=1))]
            message = f"unknown flags (see --help): {unknown}" + (f"; did you mean {', '.join(near)}?" if near else "")
        raise UserError(message if len(message) <= _LONGEST_ERROR else f"{message[:_LONGEST_ERROR]}...")


class _Help(argparse.HelpFormatter):
    """Help lines that end in their default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = "" if action.default in (None, argparse.SUPPRESS) else f" (default: {action.default})"
        return (action.help or "").replace("%", "%%") + default


def flag_name(field_name: str) -> str:
    """--total-steps for total_steps."""
    return "--" + field_name.replace("_", "-")


def parse_flags(settings: type[Settings], argv: Sequence[str], description: str) -> Settings:
    """An instance of ``settings`` (a dataclass whose fields are flags) from a command line. Raises UserError for anything it does
    not understand.
    """
    parser = _parser(settings, description)
    given = vars(parser.parse_args([*_argv_of_config_file(argv, settings), *argv]))
    del given["config"]
    return settings(**given)


def parse_known_flags(settings: type, argv: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The values of a few flags, from a command line (or its --config file) that may be wrong elsewhere. Raises UserError."""
    parser = _parser(settings, "")
    from_file: list[str] = []
    with contextlib.suppress(UserError):  # the file may be what is wrong
        from_file = _argv_of_config_file(argv, settings)
    few = _Parser(add_help=False, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in names:
            few._add_action(action)
    given = vars(few.parse_known_args([*from_file, *argv])[0])
    return {name: value for name, value in given.items() if name in names and name != "config"}


def _parser(settings: type, description: str) -> _Parser:
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML file of flags by name (total-steps: 2000); the command line wins")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        group = groups.setdefault(field.metadata["group"], parser.add_argument_group(field.metadata["group"]))
        group.add_argument(flag_name(field.name), default=field.default, help=field.metadata["help"], **_argparse_type(hints[field.name]))
    return parser


def _argparse_type(hint: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        (hint,) = (a for a in get_args(hint) if a is not types.NoneType)
    if get_origin(hint) is typing.Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")


def _argv_of_config_file(argv: Sequence[str], settings: type) -> list[str]:
    """The entries of the file that --config names, as a command line; [] without one. Raises UserError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path: Path | None = parser.parse_known_args(list(argv))[0].config
    if path is None:
        return []
    try:
        entries = _OncePerKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise UserError(f"--config must name a readable file; {path}: {error.strerror}") from error
    except (yaml.YAMLError, *_UNEXPLAINED_YAML_ERRORS) as error:
        raise UserError(f"--config must be a YAML file of flags by name; {path} is not: {str(error) or type(error).__name__}") from error
    if entries is None:
        return []
    if not isinstance(entries, dict):
        raise UserError(f"--config must hold one mapping of flags by name (total-steps: 2000); {path} holds a {type(entries).__name__}")
    known = {field.name for field in dataclasses.fields(settings)}
    hints = typing.get_type_hints(settings)
    argv = []
    for key, value in entries.items():
        name = str(key).lstrip("-").replace("-", "_") if isinstance(key, str) else ""
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            shown = ascii(key)[:80] if isinstance(key, str) else f"a {type(key).__name__}"
            raise UserError(
                f"{path}: {shown} is not a flag" + (f"; did you mean {near[0].replace('_', '-')!r}?" if near else "; see --help")
            )
        if isinstance(value, list) and _argparse_type(hints[name]).get("type") is str:
            value = _joined(value, f"{path}: {key!r}")
        if isinstance(value, (list, dict)):
            raise UserError(f"{path}: {key!r} must be one value as on the command line, not a {type(value).__name__}")
        text = str(value)
        if "\0" in text or not _is_encodable(text):
            raise UserError(f"{path}: {key!r} must be text that a command line can hold; it is {ascii(text)[:80]}")
        if value is not None:
            argv.append(f"{flag_name(name)}={text}")
    return argv


def _is_encodable(text: str) -> bool:
    """True for what has bytes as a word of a command line: YAML can also spell halves of UTF-16 pairs."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _joined(items: list[Any], where: str) -> str:
    """A list in the file as the comma list that it is on the command line. Raises UserError."""
    odd = [item for item in items if isinstance(item, bool) or not isinstance(item, (str, int, float))]
    if odd or not items:
        shown = reprlib.Repr()
        shown.maxlevel = 2  # lists of aliases of lists grow without end
        seen = f"one of them is {shown.repr(odd[0])} (quote what holds a colon and a space)" if odd else "it is empty"
        raise UserError(f"{where} must be a value, or a list of values as between the commas of the command line; {seen}")
    try:
        return join_items(items)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def describe_flags(settings: type) -> str:
    """All flags as Markdown tables, by group: docs/flags.md."""
    hints = typing.get_type_hints(settings)
    lines: list[str] = []
    group = None
    groups = list(dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(settings)))
    for field in sorted(dataclasses.fields(settings), key=lambda field: groups.index(field.metadata["group"])):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"## {group.capitalize()}", "", "| flag | meaning | default |", "|---|---|---|"]
        choices = _argparse_type(hints[field.name]).get("choices")
        name = flag_name(field.name) + (" {" + ",".join(choices) + "}" if choices else "")
        default = "-" if field.default is None else str(field.default).lower() if isinstance(field.default, bool) else field.default
        lines.append(f"| `{name}` | {field.metadata['help'].replace('|', chr(92) + '|')} | {default} |")
    return "\n".join(lines).strip() + "\n"
