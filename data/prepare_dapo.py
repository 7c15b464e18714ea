"""Prepare DAPO-Math-17k: verl's schema, every problem a hundred times over, English and Chinese.

    python data/prepare_dapo.py                                         # from the hub
    python data/prepare_dapo.py --source dapo-math-17k.parquet --output my_data

Duplicates and problems with Chinese characters are dropped, and DAPO's own instructions around a problem are
taken off: the prompt is chosen when training (`--prompt`).
"""

import re
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from preparing import Plan, prepare  # noqa: E402

from lib.settings import run_script  # noqa: E402

# --- what is read
SOURCE = "BytedTsinghua-SIA/DAPO-Math-17k"  # hub id, or a .parquet or .jsonl file in verl's schema
REVISION: str | None = None  # commit or branch of the hub data set; none is its newest
AGAINST: str | None = None  # test problems: whatever stands there, too, is dropped
ENGLISH_ONLY = True  # drop problems with Chinese, Japanese or Korean characters

# --- what is written
OUTPUT = "data/dapo"  # folder
TRAIN = "0:1000"  # rows of what is kept; empty writes no such file
VALID = "1000:1100"  # rows of what is kept; empty writes no such file
FORMAT = "jsonl"  # jsonl | verl-parquet

_BEFORE = re.compile(r"^Solve the following math problem step by step\..*?\n\s*\n", re.DOTALL)
_AFTER = re.compile(r"\n\s*\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$")
_NOT_ENGLISH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def convert(row):
    """A problem from one row, or why not."""
    if not row.get("problem") or row.get("answer") is None:
        return None, "problem or answer is missing"
    text = _AFTER.sub("", _BEFORE.sub("", row["problem"])).strip()
    if ENGLISH_ONLY and _NOT_ENGLISH.search(text):
        return None, "not English"
    index = (row.get("extra_info") or {}).get("index")
    extra = {} if index is None else {"id": str(index)}
    source = row.get("data_source") or "dapo"
    return extra | {"problem": text, "answer": str(row["answer"]).strip(), "source": source}, None


def main():
    splits, options = {"train": TRAIN, "valid": VALID}, {"english_only": ENGLISH_ONLY}
    plan = Plan(SOURCE, OUTPUT, splits, revision=REVISION, against=AGAINST, format=FORMAT, options=options)
    prepare(plan, convert)


if __name__ == "__main__":
    run_script(main)
