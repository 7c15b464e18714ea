"""How long grading takes: check_eval.py against a loop that calls math-verify on one answer after the other.

    python benchmarks/grading.py --responses completions.json [--repeats 3] [--limit 60] [--json]

Three ways over the same file, each in a process of its own, start and imports included; the fastest of
`repeats` runs counts, and the ways take turns so that a busy machine hits all of them:

    check_eval      both rules (the answer in the prompt's style, and any answer), intervals, the table
    one by one      the same answers by `verify(parse(gold), parse(answer))`, both rules, nothing else
    tagged only     the loop on the answers in the prompt's style alone: what the GRDPO scripts did

Then the same with every fifth completion made hostile (powers that never end, 100,000 braces, factorials):
the loop is stopped after `--limit` seconds, and the table says how far it came.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HOSTILE = (
    "9^{9^{9^{9}}}",
    "7!!!!!!!!!!!!",
    "{" * 100_000,
    r"\frac{" * 900,
    "(" * 5000 + "1" + ")" * 5000,
    "10^{10^{10^{10}}}",
)


def grade_one_by_one(path, rules):
    """The loop: prints how many answers it graded, as it goes, so that a stopped one has said something."""
    from math_verify import parse, verify

    from lib.prompts import extract_answer, extract_any_answer
    from lib.responses import read_responses

    answered, style = read_responses(path)
    extract = (extract_answer, extract_any_answer)[: 2 if rules == "both" else 1]
    number = 0
    for one in answered:
        for text in one.completions:
            for rule in extract:
                answer = rule(text, style)
                if answer is not None:
                    verify(parse(f"${one.problem.answer}$"), parse(f"${answer}$"))
            number += 1
            print(number, flush=True)


def make_hostile(path, folder):
    """A copy of the file in which every fifth completion ends in a hostile answer."""
    from lib.prompts import wrap_answer
    from lib.responses import read_responses

    answered, style = read_responses(path)
    rows, number = [], 0
    for one in answered:
        texts = []
        for text in one.completions:
            number += 1
            bad = wrap_answer(HOSTILE[number // 5 % len(HOSTILE)], style)
            texts.append(bad if number % 5 == 0 else text)
        rows.append({"problem": one.problem.problem, "answer": one.problem.answer, "generations": texts})
    file = Path(folder) / "hostile.json"
    file.write_text(json.dumps(rows))
    return file


def time_command(words, limit):
    """(seconds, last line of output, did it end by itself)."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            ended = process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = False
        seconds = time.perf_counter() - started
        output.seek(0)
        lines = output.read().splitlines() or [""]
    return seconds, lines[-1], ended


def measure(path, repeats, limit):
    """{way: seconds, ...} for one file; a stopped loop also says how many completions it had graded."""
    ways = {
        "check_eval": ["check_eval.py", "--responses", path, "--json"],
        "one by one": [__file__, "--loop", "both", "--responses", path],
        "tagged only": [__file__, "--loop", "tagged", "--responses", path],
    }
    results = {}
    for _ in range(repeats):
        for way, words in ways.items():
            seconds, last, ended = time_command(words, limit)
            if way not in results or seconds < results[way]["seconds"]:
                results[way] = {"seconds": round(seconds, 2), "ended": ended}
                if way == "check_eval":
                    results[way] |= {"timeouts": json.loads(last)["timeouts"]} if ended else {}
                else:
                    results[way]["graded"] = int(last or 0)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a loop is stopped")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loop", choices=("both", "tagged"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = str(Path(options.responses).absolute())
    if options.loop:
        return grade_one_by_one(path, options.loop)
    result = {"plain": measure(path, options.repeats, options.limit)}
    with tempfile.TemporaryDirectory() as folder:
        result["hostile"] = measure(make_hostile(path, folder), 1, options.limit)
    if options.json:
        print(json.dumps(result))
        return
    for name, ways in result.items():
        print(f"{name} answers" if name == "plain" else "every fifth answer hostile")
        for way, one in ways.items():
            note = "" if one["ended"] else f"   stopped; {one.get('graded', 0)} completions graded"
            print(f"  {way:<12} {one['seconds']:7.2f} s{note}")


if __name__ == "__main__":
    main()
