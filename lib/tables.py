"""How an evaluation is shown: tables for the terminal, curves as pictures."""

import contextlib
import re

from rich.console import Console
from rich.table import Table

# rows of a table: key of the summary, what it is called, format
ROWS = (
    ("problems", "problems", "{:d}"),
    ("samples", "samples per problem", "{:d}"),
    *((r"pass@\d+", "", "{:.3f}"), (r"maj@\d+", "", "{:.3f}"), (r"avg@\d+", "", "{:.3f}")),
    ("answer_and_format", "right answer and format", "{:.3f}"),
    ("answer", "right answer, whatever the format", "{:.3f}"),
    ("format", "right format", "{:.3f}"),
    ("mean_length", "mean length", "{:.1f}"),
    (r"length_p\d+", "", "{:.0f}"),
    ("clipped", "clipped share", "{:.3f}"),
    ("timeouts", "timeouts while grading", "{:d}"),
    ("unparsed", "answers that are no mathematics", "{:d}"),
)


def print_summary(title, summary):
    """Print one evaluation: a row per number, a column for all and for each tier and data source."""
    columns = {"all": summary} | summary.get("tiers", {}) | summary.get("data_sources", {})
    print(title)
    table = Table()
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for pattern, label, form in ROWS:
        for key in [key for key in summary if re.fullmatch(pattern, key)]:
            cells = [_show(one, key, form) for one in columns.values()]
            unit = "tokens" if summary.get("length_in_tokens", True) else "characters"
            table.add_row((label or key) + (f" [{unit}]" if "length" in key else ""), *cells)
    _console().print(table, markup=False)


def print_difference(title, difference):
    """Print a paired comparison (`passk.compare_pairs`): how much better, and how sure that is."""
    print(f"{title}, on {difference['problems']} problems")
    table = Table()
    for name in ("", "difference", "95 % interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for key, value in difference.items():
        if f"{key}_ci95" in difference:
            low, high = difference[f"{key}_ci95"]
            verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            table.add_row(key, f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", verdict)
    _console().print(table, markup=False)


def print_disagreements(differ, shown, *, names):
    """Print the first answers that two graders judge differently (`regrading.find_disagreements`)."""
    print(f"{names[0]} and {names[1]} differ on {len(differ)} answers (each counted once)")
    for gold, answer, *verdicts in differ[:shown]:
        said = ", ".join(
            f"{'right' if right else 'wrong'} by {name}" for name, right in zip(names, verdicts, strict=True)
        )
        print(f"  gold {gold!r}, answer {answer!r}: {said}")


def _show(summary, key, form):
    if key not in summary:
        return ""
    limits = summary.get(f"{key}_ci95")
    return form.format(summary[key]) + (f"  ({limits[0]:.2f} to {limits[1]:.2f})" if limits else "")


def _console():
    """As wide as the terminal; in a file or a pipe nothing is broken into two lines."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)


def draw_pass_curves(path, curves, *, title):
    """A picture of pass@k over k: `curves` is {label: summary}, the band its 95 % interval."""
    with _axes(path, title, "k (samples per problem)") as axis:
        for label, summary in curves.items():
            ks = sorted(int(key[5:]) for key in summary if re.fullmatch(r"pass@\d+", key))
            axis.plot(ks, [summary[f"pass@{k}"] for k in ks], marker="o", markersize=3, label=label)
            axis.fill_between(ks, *zip(*(summary[f"pass@{k}_ci95"] for k in ks), strict=True), alpha=0.15)
        axis.set_xscale("log")
        axis.set_ylabel("pass@k")


def draw_step_curve(path, points, *, title):
    """A picture of pass@k over the steps of a run: `points` is [(step, summary)], one line for each k."""
    with _axes(path, title, "step") as axis:
        for key in [key for key in points[0][1] if re.fullmatch(r"pass@\d+", key)]:
            steps, values = [step for step, _ in points], [summary[key] for _, summary in points]
            axis.plot(steps, values, marker="o", markersize=3, label=key)
            axis.fill_between(
                steps, *zip(*(summary[f"{key}_ci95"] for _, summary in points), strict=True), alpha=0.1
            )


@contextlib.contextmanager
def _axes(path, title, label):
    """One pair of axes, saved to `path` when it has been drawn on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    yield axis
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
