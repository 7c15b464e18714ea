"""Prepare OpenR1-Math-220k: problems whose gold answer math-verify can check.

    python data/prepare_openr1.py                                       # from the hub
    python data/prepare_openr1.py --source openr1.parquet --output my_data

The GRDPO experiments trained on the first 519 problems and validated on rows 1000 to 1099 of what was kept.
Proofs are dropped: there is no answer to compare.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from preparing import Plan, prepare  # noqa: E402

from lib.settings import run_script  # noqa: E402

# --- what is read
SOURCE = "open-r1/OpenR1-Math-220k"  # hub id, or a .parquet or .jsonl file with `problem` and `answer`
REVISION: str | None = None  # commit or branch of the hub data set; none is its newest
AGAINST: str | None = None  # test problems: whatever stands there, too, is dropped

# --- what is written
OUTPUT = "data/openr1"  # folder
TRAIN = "0:519"  # rows of what is kept; empty writes no such file
VALID = "1000:1100"  # rows of what is kept; empty writes no such file
FORMAT = "jsonl"  # jsonl | verl-parquet


def convert(row):
    """A problem from one row, or why not."""
    if not row.get("problem") or row.get("answer") is None:
        return None, "problem or answer is missing"
    answer = str(row["answer"]).strip()
    if "proof" in (row.get("question_type"), row.get("problem_type"), answer.lower()):
        return None, "a proof"
    extra = {"id": str(row["uuid"])} if row.get("uuid") else {}
    return extra | {
        "problem": row["problem"],
        "answer": answer,
        "source": row.get("source") or "openr1",
    }, None


def main():
    splits = {"train": TRAIN, "valid": VALID}
    plan = Plan(SOURCE, OUTPUT, splits, revision=REVISION, against=AGAINST, format=FORMAT, config="default")
    prepare(plan, convert)


if __name__ == "__main__":
    run_script(main)
