"""adaGRPO against GRPO with groups of fixed size, at equal sampled tokens, on the problems that are hard.

    python benchmarks/adaptive_vs_fixed.py            # three seeds, about 20 minutes; --json for one object
    python benchmarks/adaptive_vs_fixed.py --arms adaptive fixed_8 --seeds 1 -- --learning-rate 4e-4

All three train on the medium and hard tiers by train_adagrpo.py, which without further attempts is GRPO:

    adaptive   groups of 8, and more attempts for a problem that no completion solved
    fixed_8    groups of 8
    fixed_16   groups of 16

A run ends with the first step at which its sampled tokens, those of all attempts, reach the budget; the
adapter of that step, not a chosen one, answers the test problems. The learning rate is constant, so that it
does not depend on how many steps the tokens are enough for.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.batches import load_problems  # noqa: E402
from lib.checkpoints import find_damage  # noqa: E402
from lib.evaluation import Engine, choose_sampling, evaluate_problems, summarise_groups  # noqa: E402
from lib.grading import Grader  # noqa: E402
from lib.models import load_tokenizer, locate_model  # noqa: E402
from lib.prompts import encode_prompt  # noqa: E402
from lib.rewards import grade_groups  # noqa: E402
from lib.runlog import read_metrics  # noqa: E402

TIERS = ("medium", "hard")
ARMS = {
    "adaptive": ["--group-size", "8"],
    "fixed_8": ["--group-size", "8", "--max-resamples", "0"],
    "fixed_16": ["--group-size", "16", "--max-resamples", "0"],
}
# One checkpoint a step, and nothing that takes time beside training. A user's own words come behind these.
COMMON = (
    "--lr-schedule constant --warmup 0 --max-steps 100000 --epochs 100000 --save-every 1 --eval-every 100000"
)
COMMON += " --eval-samples 1 --report-to none"


def write_data(folder, test_rows):
    """(arguments that name the problems of a run, test problems by tier); a run evaluates one of them."""
    for name, count in (("train", None), ("test", 1)):
        lines = (ROOT / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        chosen = [line for line in lines if json.loads(line)["tier"] in TIERS]
        (folder / f"{name}.jsonl").write_text("".join(chosen[:count]))
    problems = load_problems(ROOT / "data" / "tiny" / "test.jsonl")
    words = ["--train-data", folder / "train.jsonl"]
    words += ["--valid-data", folder / "test.jsonl", "--test-data", folder / "test.jsonl"]
    return words, {tier: [p for p in problems if p.tier == tier][:test_rows] for tier in TIERS}


def find_end(folder, budget):
    """The first step whose checkpoint is there and whose sampled tokens reach the budget, or None."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    line = next((line for line in read_metrics(folder) if line["num_tokens"] >= budget), None)
    if line is None or find_damage(folder / "checkpoints" / f"step_{line['step']:06d}"):
        return None
    return line


def train(folder, words, budget):
    """Run the script until its tokens are spent; the metrics of its last step, and minutes."""
    command = [sys.executable, ROOT / "train_adagrpo.py", "--output-dir", folder, *words]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while (end := find_end(folder, budget)) is None:
            if process.poll() is not None:
                raise SystemExit(f"train_adagrpo.py ended by itself:\n{process.stderr.read()}")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    return end, (time.perf_counter() - started) / 60


def measure(model, problems, *, samples, grader):
    """pass@k of a model or checkpoint on each tier."""
    place = locate_model(model)
    tokenizer = load_tokenizer(place)
    sampling = place.sampling or {"prompt": "answer_tag"}
    style = sampling["prompt"]
    ask = partial(encode_prompt, tokenizer, style=style, thinking=sampling.get("thinking"))
    params = choose_sampling(sampling | {"max_new_tokens": 64}, {})
    how = {"ask": ask, "params": params, "samples": samples, "seed": 1}
    grade = partial(grade_groups, style=style, grader=grader)
    with Engine([place], tokenizer, max_rows=1024).answering_as(place) as sampler:
        return {
            tier: summarise_groups(evaluate_problems(sampler, chosen, grade=grade, **how))
            for tier, chosen in problems.items()
        }


def run_arm(arm, seed, options, grader):
    """Train one arm with one seed in a temporary folder, and measure where it ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, problems = write_data(folder, options.test_problems)
        words = [*data, "--seed", str(seed), *COMMON.split(), *ARMS[arm], *options.words]
        end, minutes = train(folder / "run", words, options.tokens)
        checkpoint = folder / "run" / "checkpoints" / f"step_{end['step']:06d}"
        after = measure(checkpoint, problems, samples=options.samples, grader=grader)
    told = {"steps": end["step"], "tokens": end["num_tokens"], "minutes": minutes}
    told["learning_rate"] = end["learning_rate"]
    return {"arm": arm, "seed": seed} | told | {"after": after}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=150_000, help="sampled completion tokens of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--samples", type=int, default=20, help="answers per test problem")
    parser.add_argument(
        "--test-problems", type=int, default=None, help="of each tier; all of them if not said"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("words", nargs="*", help="arguments for train_adagrpo.py, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Grader() as grader:
        _, problems = write_data(Path(name), options.test_problems)
        before = measure("data/tiny-qwen3", problems, samples=options.samples, grader=grader)
        runs = [run_arm(arm, seed, options, grader) for seed in options.seeds for arm in options.arms]
    if options.json:
        print(json.dumps({"tokens": options.tokens, "before": before, "runs": runs}))
        return
    title = (
        f"{options.tokens:,} sampled tokens each, seeds {' '.join(map(str, options.seeds))}: mean (spread)"
    )
    table = Table(title=title)
    keys = [(tier, key) for tier in TIERS for key in ("pass@1", "pass@10") if key in before[tier]]
    for column in ("", *(f"{tier} {key}" for tier, key in keys), "steps", "tokens", "minutes"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("base", *(f"{before[tier][key]:.3f}" for tier, key in keys), "0", "0", "")
    for arm in options.arms:
        mine = [run for run in runs if run["arm"] == arm]
        cells = [show_spread([run["after"][tier][key] for run in mine]) for tier, key in keys]
        mean = {key: statistics.fmean(run[key] for run in mine) for key in ("steps", "tokens", "minutes")}
        told = (f"{mean['steps']:.0f}", f"{mean['tokens']:,.0f}", f"{mean['minutes']:.1f}")
        table.add_row(arm, *cells, *told)
    Console(highlight=False, width=120).print(table)


def show_spread(values):
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
