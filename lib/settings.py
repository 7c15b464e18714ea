"""The constants at the top of a script are its settings: read from its source, changed from the command line.

    BETA = 1.0  # > 0, slope of the logistic [1/nat]

becomes the option `--beta`, its help text is the trailing comment, its type that of the value (or of the
annotation, where the value is None), and its admissible values are the head of the comment, which is checked:

    # > 0, ...     # >= 2, ...     # >= 0 and < 1, ...     # mean | sum: ...

`@recipes/file.args` reads arguments from a file; later arguments win.
"""

import argparse
import ast
import difflib
import inspect
import io
import math
import operator
import re
import shlex
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

_BOUNDS = re.compile(r"(>=|>)\s*(-?[\d.]+)(?:\s+and\s+(<=|<)\s*(-?[\d.]+))?")
_CHOICES = re.compile(r"[\w-]+(?:\s\|\s[\w-]+)+")
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.parquet)")
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class UserError(Exception):
    """A mistake of the person at the keyboard: the message is one line that says what to do."""


def shorten_reason(error):
    """What an error says, in one line: of a validation error not its count but its first complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[1:3] if "validation error" in lines[0] else lines[:1])


def find_path(path):
    """The absolute place a setting means: as given, or else below the project folder, as the defaults are."""
    given = Path(path).expanduser()
    beside = Path(__file__).resolve().parent.parent / given
    return (beside if not given.exists() and beside.exists() else given).absolute()


def is_hub_id(path):
    """Does a setting have the form `owner/name`, as models and data sets of the hub do?"""
    return bool(_HUB_ID.fullmatch(str(path)))


@dataclass(frozen=True)
class Setting:
    """One constant of a script: name, value, type, comment, and the heading above it."""

    name: str
    default: object
    type: type
    optional: bool
    comment: str
    heading: str

    @property
    def option(self):
        return "--" + self.name.lower().replace("_", "-")

    def check(self, value):
        """Return `value` if the comment admits it; UserError names the option and what it takes."""
        if value is None and self.optional:
            return value
        choices = _CHOICES.match(self.comment)
        if choices and value not in choices.group().split(" | "):
            raise UserError(f"{self.option} {value}: must be one of {choices.group()}")
        bounds = _BOUNDS.match(self.comment)
        if bounds and not isinstance(value, str):
            low, low_value, high, high_value = bounds.groups()
            inside = _COMPARE[low](value, float(low_value))
            inside = inside and (high is None or _COMPARE[high](value, float(high_value)))
            if not inside or not math.isfinite(value):
                raise UserError(f"{self.option} {value}: must be {bounds.group()}")
        return value

    def convert(self, text):
        """The value that a command-line word stands for."""
        if self.optional and text.lower() in ("none", ""):
            return None
        try:
            return self.check(self.type(text))
        except ValueError:
            kinds = {int: "a whole number", float: "a number"}
            raise UserError(
                f"{self.option} {text}: must be {kinds.get(self.type, self.type.__name__)}"
            ) from None


def read_settings(source):
    """The UPPER_CASE constants of a script's source text, in order, as `Setting`s.

    A comment line of the form `# --- heading` starts a group. Raises ValueError for a constant
    without a trailing comment, or whose type cannot be told: those are mistakes in the script.
    """
    comments, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").strip()
            if token.string.startswith("# --- "):
                headings[token.start[0]] = text.strip("- ")
            elif token.line.strip() != token.string:
                comments[token.start[0]] = text
    settings = []
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or (node.targets[0] if isinstance(node, ast.Assign) else None)
        if not isinstance(target, ast.Name) or not target.id.isupper() or target.id.startswith("_"):
            continue
        default = ast.literal_eval(node.value)
        kinds = ast.unparse(node.annotation).split(" | ") if isinstance(node, ast.AnnAssign) else []
        names = {kind.__name__: kind for kind in (str, int, float, bool)}
        kind = next((names[name] for name in kinds if name in names), type(default))
        if node.end_lineno not in comments or kind not in names.values():
            raise ValueError(f"{target.id} needs a trailing comment and a plain type")
        heading = next(
            (text for line, text in sorted(headings.items(), reverse=True) if line < node.lineno), ""
        )
        settings.append(
            Setting(target.id, default, kind, "None" in kinds, comments[node.end_lineno], heading)
        )
    return settings


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and recipe files that may hold comments and several words a line."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def _read_args_from_files(self, words):
        for word in words:
            if word.startswith("@") and not Path(word[1:]).is_file():
                raise UserError(f"recipe not found: {Path(word[1:]).absolute()}")
        return super()._read_args_from_files(words)

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def parse_arguments(settings, words, *, prog, description):
    """Final values by constant name. UserError for an unknown option, a wrong type, a value out of range."""
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    groups = {}
    for setting in settings:
        group = groups.get(setting.heading)
        if group is None:
            group = groups[setting.heading] = parser.add_argument_group(setting.heading or "settings")
        text = f"{setting.comment} (default: {setting.default})".replace("%", "%%")
        if setting.type is bool:
            action = {"action": argparse.BooleanOptionalAction}
        else:
            action = {"metavar": setting.type.__name__.upper()}
        group.add_argument(setting.option, dest=setting.name, default=argparse.SUPPRESS, help=text, **action)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        option = unknown[0].split("=")[0]
        near = difflib.get_close_matches(option, [setting.option for setting in settings], n=1)
        hint = f"; did you mean {near[0]}?" if near else " (--help lists the options)"
        raise UserError(f"unknown option {unknown[0]}{hint}")
    values = {}
    for setting in settings:
        value = getattr(given, setting.name, setting.default)
        is_word = isinstance(value, str) and setting.name in given
        values[setting.name] = setting.convert(value) if is_word else setting.check(value)
    return values


def run_script(main, words=None):
    """Run a script's `main()` with its constants set from the command line: the last line of every script.

    A `UserError` ends in one line on standard error and exit code 2.
    """
    constants = main.__globals__
    words = sys.argv[1:] if words is None else words
    try:
        settings = read_settings(Path(constants["__file__"]).read_text())
        prog = Path(constants["__file__"]).name
        values = parse_arguments(
            settings, words, prog=prog, description=inspect.cleandoc(constants["__doc__"])
        )
        constants.update(values)
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def current_settings(main):
    """The values a script's constants have now: what settings.json records."""
    constants = main.__globals__
    source = Path(constants["__file__"]).read_text()
    return {setting.name: constants[setting.name] for setting in read_settings(source)}
