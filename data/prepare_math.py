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
SOURCE = "DigitalLearningGmbH/MATH-lighteval"  # hub id, or .parquet or .jsonl of its or verl's columns
SPLIT = "train"  # train | test: of the hub data set
LEVELS = "3 4 5"  # which of 1 to 5, separated by blanks; empty takes all, those without a level too
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
    if not row.get("problem") or not (row.get("solution") or row.get("answer")):
        return None, "problem or solution is missing"
    extra = row.get("extra_info") or {}  # where verl's rows have what else is known
    found = re.search(r"\d", str(row.get("level") or extra.get("level") or ""))
    level = found and found.group()
    if LEVELS and level not in LEVELS.split():
        return None, f"level {level or 'unknown'}"
    answer = row.get("answer") or extract_answer(
        row["solution"], "boxed"
    )  # verl's rows have the answer alone
    if answer is None:
        return None, "no box in the solution"
    kind = {"level": int(level)} if level else {}
    kind["type"] = row.get("type") or extra.get("type") or ""
    return {"problem": row["problem"], "answer": answer, "source": "math"} | kind, None


def main():
    splits, options = {"train": TRAIN, "valid": VALID, "test": TEST}, {"levels": LEVELS}
    how = {"revision": REVISION, "against": AGAINST, "format": FORMAT, "options": options}
    prepare(Plan(SOURCE, OUTPUT, splits, split=SPLIT, **how), convert)


if __name__ == "__main__":
    run_script(main)
