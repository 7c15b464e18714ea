"""The tabs Run and Samples of the chat page: their widgets, and what happens when somebody uses them.

`find` is everywhere a function without arguments that returns what there is now, folders by name.
"""

from functools import partial

import gradio as gr

from lib.chat_page import describe_run, describe_sample, draw_panel, list_panels, report_errors
from lib.runs import compare_settings, read_curves, read_state
from lib.samples import list_steps, load_samples
from lib.settings import UserError

PLOTS = 18  # panels there is room for
ALL_STEPS = "all steps"
ALL_TIERS = "all tiers"
RIGHT = {"right and wrong": None, "right": True, "wrong": False}
SORTS = ("as sampled", "reward", "tokens", "advantage", "problem_id")
COLUMNS = ("id", "step", "problem", "tier", "right", "reward", "advantage", "tokens", "ended", "completion")
PREVIEW = 90  # characters of a completion in the table


def pick(found, name):
    """The folder called `name`; UserError if it is not (or no longer) there."""
    if name not in found:
        raise UserError(f"{name or 'nothing'} is not there (any more): choose from the refreshed list")
    return found[name]


def build_run_tab(find, *, seconds):
    """Curves of runs, overlaid, as they grow; their settings, and how two differ."""
    first = next(iter(find()), None)
    with gr.Row(equal_height=True):
        names = gr.Dropdown(
            list(find()),
            value=[first] if first else [],
            multiselect=True,
            label="Runs to draw",
            elem_id="runs",
        )
        smoothing = gr.Slider(0, 0.99, value=0.6, step=0.01, label="Smoothing", elem_id="smoothing")
        live = gr.Checkbox(True, label="Follow runs in progress", info="Draws again at every new step")
    refresh = gr.Button("Refresh lists", size="sm")
    headline = gr.Markdown(elem_id="run_headline")
    with gr.Row(elem_id="plots"):
        plots = [gr.LinePlot(visible=False, height=260, show_label=False) for _ in range(PLOTS)]
    with gr.Accordion("Settings of a run, and how two differ", open=False, elem_id="settings_section"):
        with gr.Row():
            mine = gr.Dropdown(list(find()), value=first, label="Settings of", elem_id="settings_of")
            other = gr.Dropdown(
                ["", *find()], value="", label="Only where they differ from", elem_id="differ_from"
            )
        table = gr.Dataframe(
            headers=["setting", "value"], interactive=False, wrap=True, elem_id="settings_table"
        )
    seen, timer = gr.State(None), gr.Timer(seconds)
    inputs, outputs = [names, smoothing], [seen, headline, *plots]
    draw, follow = partial(_draw_runs, find), partial(_follow_runs, find)
    gr.on([names.change, smoothing.release], report_errors(draw), inputs, outputs, show_progress="hidden")
    timer.tick(report_errors(follow), [*inputs, live, seen], outputs, show_progress="hidden")
    settings = report_errors(partial(_list_settings, find))
    gr.on([mine.change, other.change], settings, [mine, other], table)
    refresh.click(lambda: _refresh_lists(find), None, [names, mine, other])
    return [(report_errors(draw), inputs, outputs), (settings, [mine, other], table)]


def _refresh_lists(find):
    names = list(find())
    return gr.Dropdown(choices=names), gr.Dropdown(choices=names), gr.Dropdown(choices=["", *names])


def _draw_runs(find, names, smoothing):
    """Everything that the Run tab draws."""
    found = find()
    runs = {name: pick(found, name) for name in names or []}
    curves = {name: read_curves(run) for name, run in runs.items()}
    lines = [describe_run(name, curves[name], read_state(run)) for name, run in runs.items()]
    if not lines:
        lines = ["No run is chosen." if found else "There is no run yet. Start one: `python train_grdpo.py`"]
    panels = list_panels(curves)[:PLOTS]
    drawn = [
        gr.LinePlot(
            draw_panel(curves, names, smoothing),
            x="step",
            y="value",
            color="curve",
            title=title,
            y_title=" ",
            x_title="step",
            color_title=" ",
            tooltip="all",
            visible=True,
        )
        for title, names in panels
    ]
    hidden = [gr.LinePlot(visible=False)] * (PLOTS - len(drawn))
    seen = {name: len(part) for name, part in curves.items()} | {"finished": lines}
    return [seen, "\n\n".join(lines), *drawn, *hidden]


def _follow_runs(find, names, smoothing, *rest):
    """Draw again if a run has gone on since."""
    live, seen = rest
    if not live or not names:
        return gr.skip()
    drawn = _draw_runs(find, names, smoothing)
    return gr.skip() if drawn[0] == seen else drawn


def _list_settings(find, mine, other):
    if not mine:
        return gr.skip()
    found = find()
    rows = compare_settings(pick(found, mine), pick(found, other) if other else None)
    headers = ["setting", mine, other] if other else ["setting", mine]
    return gr.Dataframe(rows, headers=headers, column_count=len(headers))


def build_samples_tab(find, *, page_rows):
    """Completions as a table that is filtered and sorted, a page at a time; one of them opened."""
    first = next(iter(find()), None)
    with gr.Row(equal_height=True):
        source = gr.Dropdown(list(find()), value=first, label="Samples of", elem_id="samples_source", scale=2)
        step = gr.Dropdown([ALL_STEPS], value=ALL_STEPS, label="Step", elem_id="samples_step")
        problem = gr.Textbox(label="Problem id contains", elem_id="samples_problem")
        tier = gr.Dropdown([ALL_TIERS], value=ALL_TIERS, label="Tier", elem_id="samples_tier")
        right = gr.Dropdown(list(RIGHT), value=next(iter(RIGHT)), label="Answer", elem_id="samples_right")
    with gr.Row(equal_height=True):
        low = gr.Textbox(label="Reward at least", placeholder="any", elem_id="samples_low")
        high = gr.Textbox(label="Reward at most", placeholder="any")
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", elem_id="samples_sort")
        descending = gr.Checkbox(True, label="Largest first")
    with gr.Row(equal_height=True):
        back = gr.Button("◀ Back", size="sm", min_width=80, elem_id="samples_back")
        forward = gr.Button("Next ▶", size="sm", min_width=80, elem_id="samples_next")
        refresh = gr.Button("Refresh lists", size="sm")
    counted = gr.Markdown(elem_id="samples_count")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, elem_id="samples_table", max_height=330)
    details = _build_details()
    number = gr.State(0)
    filters = [source, step, problem, tier, right, low, high, sort, descending]
    outputs = [table, counted, number]
    for move, button in ((-1, back), (1, forward)):
        turn_by = partial(_show_page, find, page_rows=page_rows, move=move)
        button.click(report_errors(turn_by), [number, *filters], outputs)
    turn = report_errors(partial(_show_page, find, 0, page_rows=page_rows))

    def open_sample(source, step, chosen: gr.SelectData):
        return _open_sample(find, source, step, name=chosen.row_value[0])

    changed = [step.input, tier.input, right.input, sort.input, descending.input]
    gr.on([*changed, problem.submit, low.submit, high.submit, problem.blur], turn, filters, outputs)
    choose = report_errors(partial(_choose_source, find))
    source.change(choose, source, [step, tier]).then(turn, filters, outputs)
    refresh.click(lambda: gr.Dropdown(choices=list(find())), None, source).then(
        choose, source, [step, tier]
    ).then(turn, filters, outputs)
    table.select(report_errors(open_sample), [source, step], details)
    return [(choose, source, [step, tier]), (turn, filters, outputs)]


def _build_details():
    """The place of an opened sample."""
    with gr.Row():
        with gr.Column():
            facts = gr.Markdown("Click a row to open it.", elem_id="sample_facts")
        with gr.Column(scale=2):
            completion = gr.Textbox(label="Completion", lines=6, max_lines=24, elem_id="sample_completion")
            prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, elem_id="sample_prompt")
    return [facts, completion, prompt]


def _choose_source(find, source):
    """The steps and tiers of a source; the newest step is shown first."""
    if not source:
        return gr.skip()
    folder = pick(find(), source)
    steps = list_steps(folder)
    tiers = load_samples(folder, steps[0] if steps else None).tiers()
    newest = str(steps[0]) if steps else ALL_STEPS
    choices = [ALL_STEPS, *map(str, steps)] if steps else [ALL_STEPS]
    return gr.Dropdown(choices=choices, value=newest), gr.Dropdown([ALL_TIERS, *tiers], value=ALL_TIERS)


def _load(find, source, step):
    return load_samples(pick(find(), source), None if step == ALL_STEPS else int(step))


def _show_page(find, number, *filters, page_rows, move=0):
    """(table, what it is, page number) for the page `move` pages on from `number`."""
    source, step, problem, tier, right, low, high, sort, descending = filters
    if not source:
        return [], "There are no samples yet: a run writes them at every step.", 0
    chosen = _load(find, source, step).select(
        problem=(problem or "").strip(),
        tier="" if tier == ALL_TIERS else tier,
        right=RIGHT[right],
        low=_read_number(low),
        high=_read_number(high),
    )
    count = len(chosen.table)
    number = max(0, min(number + move, (count - 1) // page_rows))
    rows = chosen.page(number, page_rows, sort="" if sort == SORTS[0] else sort, descending=descending)
    start = number * page_rows
    share = sum(filter(None, chosen.table["correct"].to_pylist())) / count if count else 0
    text = (
        f"{start + 1} to {start + len(rows)} of {count:,} · {share:.0%} right"
        if count
        else "Nothing matches."
    )
    return [_show_row(row) for row in rows], text, number


def _read_number(text):
    """The number in a text box; None if it is empty."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        raise UserError(f"{text!r} is no number") from None


def _show_row(row):
    """A row of the table: COLUMNS."""
    preview = " ".join(row["completion"].split())
    return [
        row["id"],
        row["step"] if row["step"] is not None else "",
        row["problem_id"],
        row["tier"] or "",
        {True: "✓", False: "✗"}.get(row["correct"], ""),
        "" if row["reward"] is None else round(row["reward"], 3),
        "" if row["advantage"] is None else round(row["advantage"], 4),
        row["tokens"],
        row["finish_reason"],
        preview[:PREVIEW] + "…" * (len(preview) > PREVIEW),
    ]


def _open_sample(find, source, step, *, name):
    samples = _load(find, source, step)
    row = samples.open(name)
    return describe_sample(row, samples.rewards), row["completion"], row["prompt"]
