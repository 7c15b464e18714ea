"""What a run has written, read for somebody who looks at it, perhaps while it goes on."""

import functools
import json
from collections import Counter
from pathlib import Path

from lib.models import locate_model, resolve_base
from lib.runlog import read_metrics
from lib.settings import UserError, find_path


def find_runs(folder, *others):
    """Run folders by name, the one that was written last first.

    folder   its subfolders, and theirs, are searched
    others   further paths: a run, or something inside one (a checkpoint); what is neither is left out
    """
    folder = find_path(folder)
    runs = {
        path.parent for pattern in ("*/settings.json", "*/*/settings.json") for path in folder.glob(pattern)
    }
    runs |= {run for run in map(run_of, filter(None, others)) if run}
    newest_first = sorted(runs, key=_last_written, reverse=True)
    names = [str(run.relative_to(folder)) if run.is_relative_to(folder) else run.name for run in newest_first]
    twice = {name for name, count in Counter(names).items() if count > 1}
    pairs = zip(names, newest_first, strict=True)
    return {str(run) if name in twice else name: run for name, run in pairs}


def run_of(path):
    """The run folder that `path` is, or lies in; None if it is in none."""
    place = find_path(path)
    return next(
        (folder for folder in (place, *place.parents[:3]) if (folder / "settings.json").is_file()), None
    )


def _last_written(run):
    files = [run / name for name in ("metrics.jsonl", "settings.json")]
    return max(file.stat().st_mtime for file in files if file.is_file())


def list_checkpoints(run):
    """Checkpoint folders of a run by name: best, then the steps, newest first."""
    folder = Path(run) / "checkpoints"
    steps = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    best = [folder / "best"] if (folder / "best").is_dir() else []
    return {path.name: path for path in [*best, *steps]}


def find_base(run):
    """The model a run started from: the base of its checkpoints, or else its setting MODEL."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        return resolve_base(locate_model(next(iter(checkpoints.values()))).base)
    model = read_settings_of(run).get("MODEL")
    return model and resolve_base(model)


def read_settings_of(run):
    """The settings of a run by name, and under `command`, `device` ... what settings.json says about it."""
    path = Path(run) / "settings.json"
    try:
        record = json.loads(path.read_text())
        return dict(record["settings"]) | {
            key: value for key, value in record.items() if key in ("script", "device", "command", "commit")
        }
    except FileNotFoundError:
        raise UserError(f"{path} is gone") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: the settings of this run cannot be read") from None


def compare_settings(run, other=None):
    """Rows (name, value) of a run, or (name, value, other's value) where two runs differ."""
    mine = read_settings_of(run)
    if other is None:
        return [[name, _show(value)] for name, value in mine.items()]
    theirs = read_settings_of(other)
    return [
        [name, _show(mine.get(name)), _show(theirs.get(name))]
        for name in mine | theirs
        if mine.get(name) != theirs.get(name)
    ]


def _show(value):
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def read_curves(run):
    """The metrics of a run as far as it is: a list of flat dicts, empty before the first step."""
    path = Path(run) / "metrics.jsonl"
    try:
        written = path.stat()
        return _read_curves(Path(run), written.st_size, written.st_mtime_ns)
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged: a line in it is no JSON") from None


@functools.lru_cache(maxsize=16)
def _read_curves(run, _size, _time):
    return read_metrics(run)


def read_state(run):
    """(steps done, steps in all or None, is it finished?) of a run."""
    lines = read_curves(run)
    steps = lines[-1]["step"] if lines else 0
    finished = (Path(run) / "summary.json").is_file()
    return steps, steps if finished else read_settings_of(run).get("MAX_STEPS"), finished


def find_samples(runs, evaluations):
    """Everything with completions in it, by the name to choose it by: a folder each.

    runs          as `find_runs` returns them
    evaluations   folder whose subfolders are evaluations
    """
    found = {}
    for name, run in runs.items():
        if next((run / "completions").glob("*.parquet"), None):
            found[f"{name}: training"] = run
        for part in sorted((run / "evaluation").glob("*/responses.parquet"), reverse=True):
            found[f"{name}: test problems, {part.parent.name}"] = part.parent
    for part in sorted(find_path(evaluations).glob("*/responses.parquet")):
        found[f"evaluation {part.parent.name}"] = part.parent
    return found
