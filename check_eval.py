"""Grade saved answers again: no GPU, no model. Whose they are and which tool saved them does not matter.

    python check_eval.py --responses evaluations/grdpo-test                  # a folder that evaluate.py wrote
    python check_eval.py --responses verl_generations.parquet --prompt boxed
    python check_eval.py --responses after.json,before.json                  # several: compared in pairs
    python check_eval.py --responses after.json --json                       # one JSON object, nothing else
    python check_eval.py --responses after.json --disagreements 20           # where two graders differ

The formats are listed in lib/responses.py. pass@k counts an answer in the prompt's style; `answer` counts
right answers whatever the format, `format` the right format, `answer_and_format` both at once. Intervals are
95 %, bootstrapped over problems. Several files are paired by the text of their problems, each against the
last one. A length is in tokens where the file or --tokenizer says so, else in characters.
"""

import json
from contextlib import ExitStack

from lib.regrading import (
    compare_files,
    count_with,
    describe_answered,
    find_disagreements,
    open_grader,
)
from lib.responses import read_responses, split_paths
from lib.rewards import grade_groups
from lib.settings import UserError, run_script
from lib.tables import print_difference, print_disagreements, print_summary

# --- what is read
RESPONSES = ""  # evaluation folder, .parquet, .json, .jsonl or .lzma; several are separated by commas
PROBLEM_COLUMN: str | None = None  # name of the column, a dot goes deeper; none looks for the usual ones
ANSWER_COLUMN: str | None = None  # gold answers
RESPONSES_COLUMN: str | None = None  # the answers to grade
TIER_COLUMN: str | None = None  # easy, medium, hard
SOURCE_COLUMN: str | None = None  # which data set a problem comes from
TOKENIZER: str | None = None  # model folder whose tokens are counted where a file has no counts

# --- how it is graded
PROMPT: str | None = None  # answer_tag | boxed | think_answer: none finds out from the file
GRADER = "standard"  # standard, string, math_verify, or file.py:function with function(answer, gold)
OTHER_GRADER = "math_verify"  # the one that --disagreements compares with
GRADING_SECONDS = 5.0  # > 0, wall-clock limit for comparing one answer [s]

# --- what is shown
JSON = False  # print one JSON object and nothing else
DISAGREEMENTS = 0  # >= 0, show so many answers that GRADER and OTHER_GRADER judge differently


def main():
    paths, count = split_paths(RESPONSES), count_with(TOKENIZER)
    if not paths:
        raise UserError("--responses: name a file or folder to grade (several are separated by commas)")
    columns = {"problem": PROBLEM_COLUMN, "answer": ANSWER_COLUMN, "responses": RESPONSES_COLUMN}
    columns |= {"tier": TIER_COLUMN, "source": SOURCE_COLUMN}
    files, differ = [], []
    with ExitStack() as stack:
        grader, other = (
            stack.enter_context(open_grader(name, seconds=GRADING_SECONDS)) for name in (GRADER, OTHER_GRADER)
        )
        grader.start()
        read = [(path, *read_responses(path, columns=columns, style=PROMPT)) for path in paths]
        for path, answered, style in read:
            grade_groups(answered, style=style, grader=grader)
            files.append((path, answered, *describe_answered(answered, count), style))
        if DISAGREEMENTS:
            differ = find_disagreements(files, grader, other)
    differences = compare_files(files)
    if JSON:
        summary = files[0][3] | ({"disagreements": len(differ)} if DISAGREEMENTS else {})
        if len(files) > 1:
            summary |= {"files": {path: one for path, _, _, one, _ in files}, "differences": differences}
        print(json.dumps(summary))
        return
    for path, _, _, summary, style in files:
        print_summary(f"{path} (answers in style {style}, grader {GRADER})", summary)
    for name, difference in differences.items():
        print_difference(name, difference)
    if DISAGREEMENTS:
        print_disagreements(differ, DISAGREEMENTS, names=(GRADER, OTHER_GRADER))


if __name__ == "__main__":
    run_script(main)
