"""A run folder: what was set, what happened, and where to go on.

    settings.json      final settings, versions, commit, device, command
    metrics.jsonl      one flat object per step, counted from 1
    completions/       completions_00010.parquet: what was sampled in step 10, and what it earned
    checkpoints/       step_000010/ is the adapter after ten optimizer steps, best the one of VALID_DATA
    evaluation/        before/ and after/: answers to the test problems
    summary.json       the table at the end; its presence says that the run is finished
    tensorboard/, curves.png

Started again on the same folder with the same settings a run continues: everything behind its newest intact
checkpoint is cut off and done again, exactly as it was.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

from lib.checkpoints import (
    disk_errors_named,
    find_damage,
    point_to,
    read_part,
    read_state,
    remove_leftovers,
    write_checkpoint,
    write_file,
    write_json,
    write_parquet,
)
from lib.models import load_adapter_weights
from lib.provenance import describe_surroundings, hash_input
from lib.report import EVAL_METRICS, draw_curves, open_report
from lib.settings import UserError

# Settings that may differ when a run continues: they change what is written, not what is computed.
FREE_SETTINGS = ("OUTPUT_DIR", "FRESH", "PREFLIGHT", "SAVE_EVERY", "EVAL_EVERY", "REPORT_TO")
# All that a run writes: --fresh deletes this and nothing else.
OWN_FILES = (
    *("settings.json", "metrics.jsonl", "summary.json", "curves.png", "tensorboard/events.out.*"),
    *("completions/*.parquet", "kept/*.parquet", "checkpoints/best", "checkpoints/step_*"),
    *("evaluation/*/responses.parquet", "evaluation/*/summary.json"),
)


class RunLog:
    """One run folder, opened for writing by this process alone.

    folder     created if it is not there
    script     name of the script: another script's run is not continued
    settings   final values by constant name
    inputs     the files (or hub ids) that the run reads: with changed data it would be another run
    fresh      delete what an earlier run wrote here, and start over
    report_to  tensorboard | wandb | trackio | none

    `start` is the number of steps done already, `finished` says that there are no more, and `state` holds
    what a checkpoint keeps beside the policy. Raises UserError for a folder that is no run, that is another
    script's, that was started with other settings, or that is in use.
    """

    def __init__(self, folder, script, settings, *, inputs, fresh=False, report_to="tensorboard"):
        self.folder = Path(folder).expanduser().absolute()
        self._prepare_folder(fresh)
        self._lock = self._take_lock()
        if fresh:
            self._delete_own_files()
        inputs = {str(path): hash_input(path) for path in inputs}
        self.start, self.checkpoint, self._tensors = 0, None, None
        self.state = {
            "num_tokens": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "best": None,
            "best_step": None,
        }
        if (self.folder / "settings.json").is_file():
            self._compare(script, settings, inputs)
            self._find_checkpoint()
        else:
            record = {"script": script, "settings": settings, "inputs": inputs} | describe_surroundings()
            write_json(self.folder / "settings.json", record)
        self.finished = (self.folder / "summary.json").is_file()
        self.interrupted = False
        if self.finished:
            return
        self.metrics = self._cut_back()
        self._metrics_file = open(self.folder / "metrics.jsonl", "ab")
        self._report = open_report(report_to, self.folder, settings, start=self.start)

    def log_step(self, step, metrics, groups):
        """Write one step: a line of metrics, and its completions with all their rewards.

        Adds `num_tokens`, the completion tokens sampled so far. A step whose loss or gradient was not finite
        is counted, and its completions are kept apart; UserError at the third in a row.
        """
        self.state["num_tokens"] += metrics["completions/tokens"]
        sick = not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm"))
        self.state["skipped_steps"] += sick
        self.state["skipped_in_a_row"] = self.state["skipped_in_a_row"] + 1 if sick else 0
        line = {"step": step, **metrics, "num_tokens": self.state["num_tokens"]}
        line["skipped_steps"] = self.state["skipped_steps"]
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._write_completions("completions", step, groups)
        with disk_errors_named(self.folder / "metrics.jsonl"):
            self._metrics_file.write(json.dumps(line).encode() + b"\n")
            self._metrics_file.flush()
        self.metrics.append(line)
        self._report(line)
        if sick:
            kept = self._write_completions("kept", step, groups)
            print(
                f"step {step} skipped: loss or gradient is not finite; its completions: {kept}",
                file=sys.stderr,
            )
        if self.state["skipped_in_a_row"] == 3:
            raise UserError(
                "three steps in a row had no finite gradient: lower --learning-rate, or look at " + str(kept)
            )

    def _write_completions(self, place, step, groups):
        """A parquet file in TRL's layout: step, problem_id, prompt, completion, one column per reward, ..."""
        rows = [
            {
                "step": step,
                "problem_id": group.problem.id,
                "prompt": group.prompt,
                "completion": group.completions[i],
            }
            | {name: values[i] for name, values in group.rewards.items()}
            | {"reward": group.reward[i], "advantage": group.advantage[i]}
            | {"answer": group.problem.answer, "tier": group.problem.tier, "correct": group.grades[i].correct}
            | {"tokens": len(group.completion_ids[i]), "finish_reason": group.finish_reasons[i]}
            | {"attempt": group.attempt}
            for group in groups
            for i in range(len(group.completions))
        ]
        path = self.folder / place / f"completions_{step:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_parquet(path, rows)
        return path

    def save(self, step, policy, *, sampling, **parts):
        """Write the checkpoint of `step`: adapter, optimizer, random states, counters, sampling, and `parts`.

        After Ctrl-C this is the last thing a run does: it says how to continue, and exits.
        """
        folder = self.folder / "checkpoints" / f"step_{step:06d}"
        with disk_errors_named(self.folder / "metrics.jsonl"):
            os.fsync(self._metrics_file.fileno())
        state = {**self.state, "step": step}
        write_checkpoint(folder, policy, state=state, sampling=sampling, parts=parts)
        if self.state["best_step"]:
            point_to(self.folder / "checkpoints" / "best", f"step_{self.state['best_step']:06d}")
        if self.interrupted:
            print(f"saved to {self.folder}; start the same command again to continue", file=sys.stderr)
            raise SystemExit(130)

    def keep_best(self, step, summary):
        """Note whether `step` is the best so far by pass@1, among equals the shorter; `save` it next.

        Returns what the metrics of the step say about it: eval/pass@1 and so on.
        """
        score = [summary["pass@1"], -summary["mean_length"]]
        if self.state["best"] is None or score > self.state["best"]:
            self.state["best"], self.state["best_step"] = score, step
        return {f"eval/{name}": summary[name] for name in EVAL_METRICS if name in summary}

    def restore(self, policy, **parts):
        """Put the policy, and the parts, where the checkpoint left them; at the very start do nothing."""
        if self.checkpoint:
            load_adapter_weights(policy.model, self.checkpoint)
            policy.load_state_tensors(self._tensors)
            for name, part in parts.items():
                part.load_state_tensors(read_part(self._tensors, name))
            self._tensors = None

    def load_best(self, policy):
        """Put the weights of checkpoints/best into the policy; returns their step."""
        load_adapter_weights(policy.model, self.folder / "checkpoints" / "best")
        return self.state["best_step"]

    def finish(self):
        """Draw the curves and mark the run as finished."""
        draw_curves(self.metrics, self.folder / "curves.png")
        write_json(self.folder / "summary.json", self.state)

    def __enter__(self):
        """From here on Ctrl-C only sets `interrupted`: no step is cut in two. A second one ends at once."""

        def note(*_):
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nfinishing this step, then saving (Ctrl-C again stops at once)", file=sys.stderr)

        self._previous = signal.signal(signal.SIGINT, note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._previous)

    def _prepare_folder(self, fresh):
        if (
            self.folder.is_dir()
            and any(self.folder.iterdir())
            and not (self.folder / "settings.json").is_file()
        ):
            names = {path.name for path in self.folder.iterdir()}
            if not fresh and names - {"lock", ".writing-settings.json"}:
                raise UserError(f"{self.folder} is not empty and not a run: choose another --output-dir")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"--output-dir {self.folder} cannot be made: {error.strerror}") from None

    def _take_lock(self):
        lock = open(self.folder / "lock", "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"{self.folder} is in use by another process: wait for it, or set --output-dir"
            ) from None
        return lock

    def _delete_own_files(self):
        for pattern in OWN_FILES:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _compare(self, script, settings, inputs):
        """UserError if the folder holds a run of another script or with other settings."""
        try:
            record = json.loads((self.folder / "settings.json").read_text())
        except json.JSONDecodeError:
            raise UserError(f"{self.folder / 'settings.json'} is damaged: --fresh starts over") from None
        if record.get("script") != script:
            raise UserError(
                f"{self.folder} is a run of {record.get('script')}, not of {script}: set --output-dir"
            )
        old, new = record["settings"] | record["inputs"], settings | inputs
        changes = [
            f"{name} {old.get(name)!r} -> {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and name not in FREE_SETTINGS
        ]
        if changes:
            raise UserError(
                f"{self.folder} was started with other settings: {', '.join(changes)}; "
                "--fresh starts over here, --output-dir keeps both"
            )

    def _find_checkpoint(self):
        """Set start, state and tensors from the newest intact checkpoint; say which ones are damaged."""
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "checkpoints")
        for folder in sorted((self.folder / "checkpoints").glob("step_*"), reverse=True):
            damage = find_damage(folder)
            if damage:
                print(
                    f"checkpoint {folder} is damaged ({damage}): going back to the one before",
                    file=sys.stderr,
                )
                continue
            self.state, self._tensors = read_state(folder)
            self.start, self.checkpoint = self.state["step"], folder
            return

    def _cut_back(self):
        """Drop metrics, completions and checkpoints behind `start`; return the metrics that stay."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        kept = [
            json.loads(line) for line in lines[: self.start]
        ]  # a line per step; the last may be half-written
        write_file(path, b"".join(line + b"\n" for line in lines[: self.start]))
        for pattern in ("completions/completions_*", "checkpoints/step_*", "kept/completions_*"):
            for old in self.folder.glob(pattern):
                if int(old.stem.partition("_")[2]) > self.start:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        best = self.folder / "checkpoints" / "best"
        if best.is_symlink() and not best.exists():
            best.unlink()  # it pointed behind the cut; the next save points it again
        return kept


def read_metrics(folder):
    """The metrics of a run as a list of flat dicts, without the half-written last line of one in progress."""
    lines = (Path(folder) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
