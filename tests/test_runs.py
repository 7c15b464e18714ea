"""Reading runs and evaluations, also while they are written, and when there are many rows."""

import json
import shutil
import time

import pyarrow
import pyarrow.parquet
import pytest

from lib.chat_page import PANELS, describe_run, describe_sample, draw_panel, list_panels
from lib.runs import (
    compare_settings,
    find_base,
    find_runs,
    find_samples,
    list_checkpoints,
    read_curves,
    read_state,
    run_of,
)
from lib.samples import FACTS, list_steps, load_samples
from lib.settings import UserError
from tests.conftest import TINY


@pytest.fixture
def run(demo_run, tmp_path):
    """A copy of the demo run that may be changed."""
    return shutil.copytree(demo_run, tmp_path / "runs" / "demo", symlinks=True)


def make_run(folder, steps, rows, *, tier="easy"):
    """A run folder with only what the page reads: `rows` completions in each of `steps` files."""
    (folder / "completions").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"settings": {"PROMPT": "boxed"}}))
    for step in range(1, steps + 1):
        columns = {
            "step": [step] * rows,
            "problem_id": [f"{tier}-{i % 100:03d}" for i in range(rows)],
            "prompt": ["What is 1 + 1? " * 20] * rows,
            "completion": [f"step {step}, row {i}: \\boxed{{{i % 7}}} " + "so " * 50 for i in range(rows)],
            "correctness": [float(i % 7 == 2) for i in range(rows)],
            "reward": [(i * 37 % 100) / 100 for i in range(rows)],
            "advantage": [0.1] * rows,
            "answer": ["2"] * rows,
            "tier": [tier] * rows,
            "correct": [i % 7 == 2 for i in range(rows)],
            "tokens": [i % 50 for i in range(rows)],
            "finish_reason": ["stop"] * rows,
        }
        path = folder / "completions" / f"completions_{step:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=500)
    return folder


def test_runs_are_found_newest_first_and_by_what_lies_in_them(run, tmp_path):
    runs = tmp_path / "runs"
    later = shutil.copytree(run, runs / "sweep" / "b", symlinks=True)
    time.sleep(0.02)
    (later / "metrics.jsonl").touch()
    outside = shutil.copytree(run, tmp_path / "elsewhere" / "mine", symlinks=True)
    assert next(iter(find_runs(runs))) == "sweep/b"
    assert set(find_runs(runs)) == {"demo", "sweep/b"}
    assert find_runs(runs, outside / "checkpoints" / "best", TINY, "Qwen/Qwen3-1.7B")["mine"] == outside
    assert run_of(run / "checkpoints" / "step_000001") == run
    assert run_of(TINY) is None
    assert find_runs(tmp_path / "nowhere") == {}


def test_checkpoints_and_base_of_a_run(run):
    names = ["best", "step_000003", "step_000002", "step_000001"]
    assert list(list_checkpoints(run)) == names
    (run / "checkpoints" / ".writing-step_000004").mkdir()
    assert list(list_checkpoints(run)) == names, "one that is being written is not there yet"
    assert find_base(run) == str(TINY)
    shutil.rmtree(run / "checkpoints")
    assert list_checkpoints(run) == {}
    assert find_base(run) == str(TINY), "from the settings"


def test_settings_and_their_differences(run, tmp_path):
    rows = dict(compare_settings(run))
    assert rows["LEARNING_RATE"] == "0.003"
    other = shutil.copytree(run, tmp_path / "other", symlinks=True)
    record = json.loads((other / "settings.json").read_text())
    record["settings"] |= {"BETA": 3.0, "NEW": 1}
    (other / "settings.json").write_text(json.dumps(record))
    assert sorted(compare_settings(run, other)) == [["BETA", "0.5", "3.0"], ["NEW", "", "1"]]
    (other / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        compare_settings(run, other)


def test_a_run_in_progress_is_read_as_far_as_it_is(run):
    assert read_state(run) == (3, 3, True)
    (run / "summary.json").unlink()
    assert read_state(run) == (3, 3, False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(read_curves(run)[-1] | {"step": 4}) + "\n" + '{"step": 5, "re')
    assert [line["step"] for line in read_curves(run)] == [1, 2, 3, 4]
    assert describe_run("demo", read_curves(run), read_state(run)).startswith("**demo**: step 4 of 3")
    (run / "metrics.jsonl").unlink()
    assert read_curves(run) == []
    assert "has not finished its first step" in describe_run("demo", [], read_state(run))
    (run / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="is damaged"):
        read_curves(run)


def test_every_metric_has_a_panel_and_unknown_ones_their_own(run):
    lines = read_curves(run)
    lines[-1] = lines[-1] | {"resample/attempts": 2.0, "other_method/shift": 0.1, "grad_norm": None}
    panels = dict(list_panels({"demo": lines}))
    assert list(panels)[:3] == ["reward", "share of answers", "held-out problems"]
    assert panels["resample"] == ["resample/attempts"]
    assert panels["other_method"] == ["other_method/shift"]
    assert panels["reward by part"][0] == "rewards/correctness/mean"
    assert list_panels({}) == []
    drawn = draw_panel({"demo": lines}, ["grad_norm"], 0.0)
    assert list(drawn["step"]) == [1, 2], "a step without the number is left out"
    both = draw_panel({"a": lines, "b": lines}, ["reward"], 0.5)
    assert set(both["curve"]) == {"a", "b"}
    assert draw_panel({"demo": lines}, ["nothing"], 0.5).empty
    assert len({title for title, _ in PANELS}) == len(PANELS)


def test_a_long_curve_is_thinned_and_keeps_its_end():
    lines = [{"step": step, "loss": 1.0} for step in range(1, 10_001)]
    drawn = draw_panel({"long": lines}, ["loss"], 0.9)
    assert len(drawn) <= 400
    assert drawn["step"].iloc[-1] == 10_000


def test_samples_of_a_run(run):
    assert list_steps(run) == [3, 2, 1]
    samples = load_samples(run, 2)
    assert len(samples.table) == 18
    assert samples.rewards == ("correctness", "answer_tag", "tail_position", "length_decay")
    assert samples.tiers() == ["easy", "hard", "medium"]
    page = samples.page(0, 5, sort="reward", descending=True)
    assert [row["reward"] for row in page] == sorted(samples.table["reward"].to_pylist(), reverse=True)[:5]
    assert set(FACTS) <= set(page[0])
    opened = samples.open(page[0]["id"])
    assert opened["prompt"].startswith("<|im_start|>")
    assert opened["completion"] == page[0]["completion"]
    shown = describe_sample(opened, samples.rewards)
    for word in ("gold answer", f"`{opened['answer']}`", "correctness", "advantage", opened["problem_id"]):
        assert word in shown
    assert len(load_samples(run).table) == 54


def test_filters(tmp_path):
    samples = load_samples(make_run(tmp_path / "r", 2, 200))
    every = samples.page(0, 1000)
    assert len(every) == 400
    for wanted, expected in (
        ({"problem": "Y-007"}, [row for row in every if row["problem_id"] == "easy-007"]),
        ({"right": True}, [row for row in every if row["correct"]]),
        ({"right": False, "low": 0.5}, [row for row in every if not row["correct"] and row["reward"] >= 0.5]),
        ({"low": 0.2, "high": 0.3}, [row for row in every if 0.2 <= row["reward"] <= 0.3]),
        ({"tier": "hard"}, []),
    ):
        found = samples.select(**wanted).page(0, 1000)
        assert [row["id"] for row in found] == [row["id"] for row in expected], wanted
    assert samples.open(every[250]["id"])["completion"].startswith("step 2, row 50:")
    assert samples.open(every[9]["id"])["extracted"] == "2", "in the run's prompt style"
    for name in ("9-9-9", "x", "", "0-1", None, "../../etc/passwd"):
        with pytest.raises(UserError):
            samples.open(name)


def test_pages_meet_without_overlap(tmp_path):
    samples = load_samples(make_run(tmp_path / "r", 3, 50))
    pages = [samples.page(number, 40, sort="tokens", descending=True) for number in range(4)]
    ids = [row["id"] for page in pages for row in page]
    assert [len(page) for page in pages] == [40, 40, 40, 30]
    assert len(set(ids)) == 150


def test_columns_may_differ_between_steps(tmp_path):
    """A reward that was None in a whole step has no type there; a run of an older version lacks a column."""
    folder = make_run(tmp_path / "r", 2, 5)
    path = folder / "completions" / "completions_00002.parquet"
    table = pyarrow.parquet.read_table(path).drop_columns(["tier"])
    table = table.set_column(table.column_names.index("correctness"), "correctness", pyarrow.nulls(5))
    pyarrow.parquet.write_table(table, path)
    samples = load_samples(folder)
    assert len(samples.table) == 10
    assert samples.page(0, 10, sort="reward")
    describe_sample(samples.open("1-2-0"), samples.rewards)


def test_what_is_gone_or_damaged_is_a_message(tmp_path):
    folder = make_run(tmp_path / "r", 2, 5)
    samples = load_samples(folder)
    (folder / "completions" / "completions_00002.parquet").unlink()
    with pytest.raises(UserError, match="is gone"):
        samples.open("1-2-0")
    with pytest.raises(UserError, match="no completions of step 2"):
        load_samples(folder, 2)
    (folder / "completions" / "completions_00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="is damaged"):
        load_samples(folder)
    with pytest.raises(UserError, match="has no completions"):
        load_samples(tmp_path)


def test_samples_of_an_evaluation(run):
    sources = find_samples(find_runs(run.parent), run / "evaluation")
    assert list(sources) == [
        "demo: training",
        "demo: test problems, before",
        "demo: test problems, after",
        "evaluation after",
        "evaluation before",
    ]
    samples = load_samples(sources["evaluation after"])
    summary = json.loads((run / "evaluation" / "after" / "summary.json").read_text())
    assert len(samples.table) == summary["problems"] * summary["samples"]
    right = samples.select(right=True)
    assert len(right.table) / len(samples.table) == pytest.approx(summary["pass@1"])
    opened = samples.open(samples.page(0, 5)[1]["id"])
    assert opened["member"] == 1
    assert "Problem:" in opened["prompt"]
    assert "reward" not in describe_sample(opened, samples.rewards)


def test_an_evaluation_of_another_tool_is_graded(run, tmp_path):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "4"}}
    row["responses"] = ["<answer>4</answer>", "<answer>5</answer>", "4"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "responses.parquet")
    assert load_samples(tmp_path).table["correct"].to_pylist() == [True, False, False]
    own = run / "evaluation" / "after"
    shutil.copytree(own, tmp_path / "other")
    other = pyarrow.parquet.read_table(own / "responses.parquet").drop_columns(["correct"])
    pyarrow.parquet.write_table(other, tmp_path / "other" / "responses.parquet")
    assert load_samples(own).table.equals(load_samples(tmp_path / "other").table), "as it was graded then"


def test_an_evaluation_of_a_hundred_thousand_answers_stays_usable(tmp_path):
    """Its texts are not read, and what was graded is not graded again: the verdicts are made up here."""
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": str(i)}}
        | {"extra_info": {"index": str(i), "tier": "easy"}, "responses": [f"x+{i}", "word " * 200] * 50}
        | {"response_tokens": [i] * 100, "finish_reasons": ["stop"] * 100, "correct": [True, False] * 50}
        for i in range(1000)
    ]
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"prompt": "boxed"})
    pyarrow.parquet.write_table(table, tmp_path / "responses.parquet")
    started = time.perf_counter()
    samples = load_samples(tmp_path)
    page = samples.select(right=True, problem="99").page(1, 25, sort="tokens")
    assert time.perf_counter() - started < 20, "seconds; one or two on an idle machine"
    assert (len(samples.table), len(page), samples.style) == (100_000, 25, "boxed")
    assert {row["completion"] for row in page} == {"x+99"}


def test_a_hundred_thousand_rows_stay_usable(tmp_path):
    folder = make_run(tmp_path / "r", 100, 1000)
    started = time.perf_counter()
    samples = load_samples(folder)
    first = time.perf_counter() - started
    assert len(samples.table) == 100_000
    assert "completion" not in samples.table.column_names
    started = time.perf_counter()
    samples = load_samples(folder)
    page = samples.select(right=True, low=0.5).page(3, 25, sort="reward", descending=True)
    samples.open(page[0]["id"])
    again = time.perf_counter() - started
    assert len(page) == 25
    assert first < 20, "seconds; a fraction of one on an idle machine"
    assert again < 5
