"""Constants and command line: the comment is the help and the check."""

import re

import pytest

from lib.settings import UserError, parse_arguments, read_settings
from tests.conftest import ROOT

SOURCE = '''
"""A script."""
import os
# --- first things
BETA = 1.0  # > 0, slope [1/nat]
GROUP_SIZE = 20  # >= 2, completions per problem
TOP_P = 1.0  # > 0 and <= 1, nucleus
# --- other things
PAIRS = "halves"  # halves | ordered: which pairs
MAX_STEPS: int | None = None  # >= 1, stop early; none is never
MINIMUM: float | None = 0.5  # at least this
FRESH = False  # start over
THINKING: bool | None = None  # a flag with three states
NAME = "100 % # sure"  # a text
lower = 3
_HIDDEN = 4
'''
SETTINGS = read_settings(SOURCE)


def parse(*words):
    return parse_arguments(SETTINGS, list(words), prog="x.py", description="A script.")


def test_constants_are_read_in_order_with_their_headings():
    names = ["BETA", "GROUP_SIZE", "TOP_P", "PAIRS", "MAX_STEPS", "MINIMUM", "FRESH", "THINKING", "NAME"]
    assert [setting.name for setting in SETTINGS] == names
    assert [setting.heading for setting in SETTINGS] == ["first things"] * 3 + ["other things"] * 6
    assert SETTINGS[1].option == "--group-size"
    assert parse() == {setting.name: setting.default for setting in SETTINGS}


def test_options_override_with_the_right_type():
    values = parse(
        "--beta", "2", "--group-size=4", "--max-steps", "7", "--minimum", "none", "--fresh", "--no-thinking"
    )
    assert values["BETA"] == 2.0
    assert isinstance(values["BETA"], float)
    assert values["GROUP_SIZE"] == 4
    assert values["MAX_STEPS"] == 7
    assert values["MINIMUM"] is None
    assert values["FRESH"] is True
    assert values["THINKING"] is False
    assert parse("--name", "x=1 y")["NAME"] == "x=1 y"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--betta", "1"], "unknown option --betta; did you mean --beta?"),
        (["--zzz"], "unknown option --zzz"),
        (["stray"], "unknown option stray"),
        (["--bet", "1"], "unknown option --bet"),
        (["--beta", "much"], "--beta much: must be a number"),
        (["--beta", "0"], "--beta 0.0: must be > 0"),
        (["--beta", "nan"], "--beta nan: must be > 0"),
        (["--beta", "inf"], "--beta inf: must be > 0"),
        (["--group-size", "1"], "--group-size 1: must be >= 2"),
        (["--group-size", "2.5"], "--group-size 2.5: must be a whole number"),
        (["--top-p", "1.5"], "--top-p 1.5: must be > 0 and <= 1"),
        (["--pairs", "all"], "--pairs all: must be one of halves | ordered"),
        (["--max-steps", "0"], "--max-steps 0: must be >= 1"),
        (["--beta"], "argument --beta: expected one argument"),
        (["@nowhere.args"], "recipe not found: /"),
    ],
)
def test_every_mistake_names_the_option(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes(tmp_path):
    recipe = tmp_path / "one.args"
    recipe.write_text('# a comment\n\n--beta 0.15  # the original\n--name\n"two words"\n--group-size=8\n')
    values = parse(f"@{recipe}", "--group-size", "6")
    assert (values["BETA"], values["NAME"], values["GROUP_SIZE"]) == (0.15, "two words", 6)
    assert parse("--group-size", "6", f"@{recipe}")["GROUP_SIZE"] == 8, "later arguments win"


def test_help_shows_every_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{setting.option} " in text and setting.comment in text for setting in SETTINGS)
    assert "100 % # sure" in text


@pytest.mark.parametrize("line", ["X = 3", "X = [1]  # a list", "X = None  # of no type"])
def test_a_constant_without_comment_or_type_is_the_scripts_mistake(line):
    with pytest.raises(ValueError, match="X needs a trailing comment and a plain type"):
        read_settings(line + "\n")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda path: path.name)
def test_every_recipe_fits_its_script(recipe):
    script = ROOT / f"train_{recipe.name.partition('_')[0]}.py"
    settings = read_settings(script.read_text())
    values = parse_arguments(settings, [f"@{recipe}"], prog=script.name, description="")
    assert values["OUTPUT_DIR"].startswith("runs/")
    command = re.search(r"python (\S+)((?: @recipes/\S+)+)", recipe.read_text())
    assert command[1] == script.name
    assert command[2].endswith(f"@recipes/{recipe.name}"), "a variant stands on top of its recipe"
