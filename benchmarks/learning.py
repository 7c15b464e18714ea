"""A training script's default run for several seeds: the before/after table with its spread.

python benchmarks/learning.py                                  # train_grdpo.py, seeds 1 2 3
python benchmarks/learning.py --seeds 1 2 3 4 5 -- --beta 0.5  # everything behind -- goes to the script
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.report import TABLE_ROWS  # noqa: E402
from lib.runlog import read_metrics  # noqa: E402


def run_seed(script, seed, words):
    """Summaries before and after, minutes and peak memory of one run."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, ROOT / script, "--seed", str(seed), "--output-dir", folder, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        minutes = (time.perf_counter() - started) / 60
        before, after = (
            json.loads((Path(folder) / "evaluation" / name / "summary.json").read_text())
            for name in ("before", "after")
        )
        metrics = read_metrics(folder)
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "minutes": minutes,
        "steps": len(metrics),
        "peak_gib": metrics[-1]["memory/peak_gib"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="train_grdpo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("words", nargs="*", help="arguments for the script, behind --")
    options = parser.parse_args()
    runs = [run_seed(options.script, seed, options.words) for seed in options.seeds]
    if options.json:
        print(json.dumps({"script": options.script, "runs": runs}))
        return
    table = Table(title=f"{options.script}, seeds {' '.join(map(str, options.seeds))}: before -> after")
    for column in ("", *(f"seed {run['seed']}" for run in runs), "mean change (spread)"):
        table.add_column(column, justify="right" if column else "left")
    for name, key, form in TABLE_ROWS:
        changes = [run["after"][key] - run["before"][key] for run in runs]
        spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
        cells = [f"{form.format(run['before'][key])} -> {form.format(run['after'][key])}" for run in runs]
        table.add_row(name, *cells, f"{statistics.fmean(changes):+.3f} ({spread:.3f})")
    table.add_row("minutes", *(f"{run['minutes']:.1f}" for run in runs), "")
    table.add_row("peak GiB", *(f"{run['peak_gib']:.2f}" for run in runs), "")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
