"""What a run shows: numbers per step, a line in the terminal, a table at the end, curves as a picture."""

import importlib
import json
import time
from statistics import fmean, pstdev

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lib.settings import UserError

# what an evaluation during training adds to the metrics, as eval/...
EVAL_METRICS = ("pass@1", "pass@10", "answer", "format", "mean_length", "clipped")

# rows of the before/after table: name, key of the summary, format
TABLE_ROWS = (
    ("pass@1", "pass@1", "{:.3f}"),
    ("pass@10", "pass@10", "{:.3f}"),
    ("right answer, whatever the format", "answer", "{:.3f}"),
    ("right format", "format", "{:.3f}"),
    ("mean length [tokens]", "mean_length", "{:.1f}"),
    ("clipped share", "clipped", "{:.3f}"),
)


def measure_groups(groups):
    """Metrics of one step's samples (scored and graded groups), under TRL's names where it has one."""
    grades = [grade for group in groups for grade in group.grades]
    lengths = [len(ids) for group in groups for ids in group.completion_ids]
    spreads = [pstdev(group.reward) for group in groups]
    metrics = {
        "reward": fmean(reward for group in groups for reward in group.reward),
        "reward_std": fmean(spreads),
        "frac_reward_zero_std": fmean(spread == 0 for spread in spreads),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(
            reason == "length" for group in groups for reason in group.finish_reasons
        ),
        "completions/correct": fmean(grade.correct for grade in grades),
        "completions/answer_correct": fmean(grade.answer_correct for grade in grades),
        "completions/formatted": fmean(grade.formatted for grade in grades),
        "completions/tokens": sum(lengths),
        "reward/timeouts": sum(grade.timed_out for grade in grades),
        "reward/unparsed": sum(grade.unparsed for grade in grades),
    }
    for name in groups[0].rewards:
        values = [value for group in groups for value in group.rewards[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = fmean(values)
    for tier in sorted({group.problem.tier for group in groups} - {""}):
        metrics[f"tier/{tier}/reward"] = fmean(fmean(g.reward) for g in groups if g.problem.tier == tier)
    return metrics


def average_metrics(updates):
    """The mean of each metric over the updates that have it: flat dicts in, one out."""
    names = dict.fromkeys(name for line in updates for name in line)
    return {name: fmean(line[name] for line in updates if name in line) for name in names}


class StepClock:
    """Seconds of a step and its parts [s]."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._laps = {}

    def lap(self, name):
        """The part that ends now is called `name`; a name that comes again adds up."""
        now = time.perf_counter()
        key = f"time/{name}_s"
        self._laps[key] = self._laps.get(key, 0.0) + now - self._last
        self._last = now

    def metrics(self):
        return {**self._laps, "step_time": time.perf_counter() - self._start}


class StepLines:
    """One line per step and a progress bar below; only the lines where the output is a file or a pipe."""

    def __init__(self, total, done=0):
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total, completed=done)
        self._silent_steps = 0

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def show(self, step, metrics, groups):
        """Print the line of a step: what tells a healthy run from a sick one, in the order to look at it."""
        line = (
            f"step {step:4d}  reward {metrics['reward']:.3f}  right {metrics['completions/correct']:.2f}  "
            f"(any format {metrics['completions/answer_correct']:.2f})  "
            f"format {metrics['completions/formatted']:.2f}  "
            f"length {metrics['completions/mean_length']:5.1f}  "
            f"loss {metrics['loss']:.3f}  grad {metrics['grad_norm']:.2f}  {metrics['step_time']:.1f} s"
        )
        if "eval/pass@1" in metrics:
            line += f"  held-out pass@1 {metrics['eval/pass@1']:.3f}"
        self._console.print(line)
        self._silent_steps += step <= 3 and metrics["frac_reward_zero_std"] == 1
        if step == 3 and self._silent_steps == 3:
            self._console.print(_explain_silence(metrics, groups[0]), markup=False)
        self._bar.advance(self._task)


def _explain_silence(metrics, group):
    """What to look at when no group of the first steps had two different rewards."""
    return (
        "nothing to learn from so far: for three steps, all completions of a problem earned the same. See\n"
        f"  a completion        {group.completions[0]!r}\n"
        f"  its gold answer     {group.problem.answer!r}\n"
        f"  extracted from it   {group.grades[0].answer!r}\n"
        f"  right format        {metrics['completions/formatted']:.0%} (is it what --prompt asks for?)\n"
        f"  clipped             {metrics['completions/clipped_ratio']:.0%} (many? raise --max-new-tokens)\n"
        f"  unreadable answers  {metrics['reward/unparsed']}, timeouts {metrics['reward/timeouts']}\n"
        "or the problems are all too easy or too hard for this model: choose others, or a larger --group-size"
    )


def print_result(folder):
    """The table of a finished run, test problems before -> after, and where its things are."""
    before, after = (
        json.loads((folder / "evaluation" / name / "summary.json").read_text())
        for name in ("before", "after")
    )
    state = json.loads((folder / "summary.json").read_text())
    table = Table(
        title=f"{before['problems']} test problems x {before['samples']} samples", title_justify="left"
    )
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name, key, form in TABLE_ROWS:
        if key in before and key in after:
            change = form.replace("{:", "{:+").format(after[key] - before[key])
            table.add_row(name, form.format(before[key]), form.format(after[key]), change)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    best = folder / "checkpoints" / "best"
    console.print(
        f"after: the checkpoint of step {state['best_step']}, chosen on the validation problems", markup=False
    )
    console.print(f"curves      {folder / 'curves.png'}  (or: tensorboard --logdir {folder})", markup=False)
    console.print(f"checkpoint  {best}", markup=False)
    console.print(f"talk to it  python chat_gui.py --model {best}", markup=False)


# panels of curves.png: title, metrics with their labels
PANELS = (
    ("reward", (("reward", "total"), ("reward_std", "spread in a group"))),
    ("reward parts", "rewards/"),
    (
        "share of completions",
        (
            ("completions/correct", "right, in format"),
            ("completions/answer_correct", "right, any format"),
            ("completions/formatted", "right format"),
        ),
    ),
    ("length [tokens]", (("completions/mean_length", "mean"), ("completions/max_length", "longest"))),
    ("gradient norm", (("grad_norm", "before clipping"),)),
    (
        "held-out problems",
        (("eval/pass@1", "pass@1"), ("eval/pass@10", "pass@10"), ("eval/answer", "right, any format")),
    ),
)


def draw_curves(metrics, path):
    """Draw the metrics of a run (a list of flat dicts) as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (title, series) in zip(axes.flat, PANELS, strict=True):
        if isinstance(series, str):
            names = sorted({name for line in metrics for name in line if name.startswith(series)})
            series = [(name, name.removeprefix(series).removesuffix("/mean")) for name in names]
        for name, label in series:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def open_report(report_to, folder, settings, *, start):
    """A function that takes each line of metrics to a service; UserError if it is not installed."""
    if report_to == "none":
        return lambda line: None
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=10)

        def report(line):
            for name, value in line.items():
                if value is not None:
                    writer.add_scalar(name, value, line["step"])

        return report
    try:
        service = importlib.import_module(report_to)  # wandb and trackio share the calls used here
    except ImportError:
        raise UserError(
            f"--report-to {report_to}: not installed; pip install {report_to}, or --report-to none"
        ) from None
    run = service.init(project="one-card-rl", name=folder.name, config=settings)
    return lambda line: run.log(line)
