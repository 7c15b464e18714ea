"""Prepare GSM8K: grade-school problems; the gold answer is the number behind ####.

python data/prepare_gsm8k.py                                        # from the hub
python data/prepare_gsm8k.py --split test --train "" --test ":" --output data/gsm8k
"""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from preparing import Plan, prepare  # noqa: E402

from lib.settings import run_script  # noqa: E402

# --- what is read
SOURCE = "openai/gsm8k"  # hub id, or a .parquet or .jsonl file with `question` and `answer`
SPLIT = "train"  # train | test: of the hub data set
REVISION: str | None = None  # commit or branch of the hub data set; none is its newest
AGAINST: str | None = None  # test problems: whatever stands there, too, is dropped

# --- what is written
OUTPUT = "data/gsm8k"  # folder
TRAIN = ":"  # rows of what is kept; empty writes no such file
VALID = ""  # rows of what is kept; empty writes no such file
TEST = ""  # rows of what is kept; empty writes no such file
FORMAT = "jsonl"  # jsonl | verl-parquet


def convert(row):
    """A problem from one row, or why not."""
    text, answer = row.get("question") or row.get("problem"), str(row.get("answer") or "")
    if not text or not answer:
        return None, "question or answer is missing"
    if "####" not in answer and "question" in row:
        return None, "no #### in the answer"
    answer = answer.rpartition("####")[2].strip().replace(",", "")
    return {"problem": text, "answer": answer, "source": "gsm8k"}, None


def main():
    splits = {"train": TRAIN, "valid": VALID, "test": TEST}
    how = {"revision": REVISION, "against": AGAINST, "format": FORMAT}
    prepare(Plan(SOURCE, OUTPUT, splits, split=SPLIT, config="main", **how), convert)


if __name__ == "__main__":
    run_script(main)
