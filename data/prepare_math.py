"""Prepare MATH (lighteval's copy) by level; the gold answer is what stands in the last box of the solution.

python data/prepare_math.py                                         # levels 3 to 5 of the hub's train split
python data/prepare_math.py --split test --levels 5 --train "" --test ":500" --output data/math500
"""

import re
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from preparing import Plan, prepare  # noqa: E402

from lib.prompts import extract_answer  # noqa: E402
from lib.settings import run_script  # noqa: E402

# --- what is read
SOURCE = "DigitalLearningGmbH/MATH-lighteval"  # hub id, or a .parquet or .jsonl file of the same columns
SPLIT = "train"  # train | test: of the hub data set
LEVELS = "3 4 5"  # which of 1 to 5, separated by blanks
REVISION: str | None = None  # commit or branch of the hub data set; none is its newest
AGAINST: str | None = None  # test problems: whatever stands there, too, is dropped

# --- what is written
OUTPUT = "data/math"  # folder
TRAIN = ":"  # rows of what is kept; empty writes no such file
VALID = ""  # rows of what is kept; empty writes no such file
TEST = ""  # rows of what is kept; empty writes no such file
FORMAT = "jsonl"  # jsonl | verl-parquet


def convert(row):
    """A problem from one row, or why not."""
    if not row.get("problem") or not row.get("solution"):
        return None, "problem or solution is missing"
    level = re.search(r"\d", str(row.get("level") or ""))
    if level is None or level.group() not in LEVELS.split():
        return None, f"level {level.group() if level else 'unknown'}"
    answer = extract_answer(row["solution"], "boxed")
    if answer is None:
        return None, "no box in the solution"
    kind = {"level": int(level.group()), "type": row.get("type") or ""}
    return {"problem": row["problem"], "answer": answer, "source": "math"} | kind, None


def main():
    splits, options = {"train": TRAIN, "valid": VALID, "test": TEST}, {"levels": LEVELS}
    how = {"revision": REVISION, "against": AGAINST, "format": FORMAT, "options": options}
    prepare(Plan(SOURCE, OUTPUT, splits, split=SPLIT, **how), convert)


if __name__ == "__main__":
    run_script(main)
