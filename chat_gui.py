"""Talk to a checkpoint, compare it with its base, see what a run did: a page on this machine.

    python chat_gui.py                                      # the newest run in runs/, or the tiny model
    python chat_gui.py --model runs/grdpo                   # the best checkpoint of a run
    python chat_gui.py --model Qwen/Qwen3-1.7B --port 8000  # any model or adapter folder, or a hub id

Three tabs: Chat (and Compare), Run, Samples. Nothing leaves this machine, and nothing is asked of another,
unless a model is named by its hub id. Ctrl-C ends it.
"""

import os
from functools import partial

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr

from lib.ask_page import AskPanel
from lib.chat_page import LAYOUT, STYLE
from lib.grading import Grader
from lib.models import locate_model
from lib.run_page import build_run_tab, build_samples_tab
from lib.runs import find_runs, find_samples, list_checkpoints
from lib.settings import UserError, find_path, run_script
from lib.talk_page import CompareTab, TalkTab

# --- what is opened
MODEL: str | None = None  # model, adapter or run folder, or a hub id; none is the newest run, or TINY
RUNS = "runs"  # folder whose runs the page shows
EVALUATIONS = "evaluations"  # folder whose evaluations the page shows
TINY = "data/tiny-qwen3"  # what is opened where there is no run

# --- where it listens
HOST = "127.0.0.1"  # address; 0.0.0.0 opens the page, and so every model folder here, to the whole network
PORT = 7860  # >= 1 and <= 65535
SHARE = False  # a public address by way of Gradio's servers
OPEN_BROWSER = False  # open the page in a browser at the start

# --- how it behaves
SETTINGS_FILE = "runs/chat.json"  # where the page remembers its settings between starts
PAGE_ROWS = 25  # >= 1, samples on a page
REFRESH_SECONDS = 3.0  # > 0, a run in progress is looked at so often [s]


def find_start():
    """What the page opens with: MODEL, else the best checkpoint of the newest run, else the tiny model."""
    path = find_path(MODEL or TINY)
    runs = find_runs(RUNS) if MODEL is None else {path.name: path}
    for run in runs.values():
        checkpoints = list_checkpoints(run)
        if checkpoints:
            return next(iter(checkpoints.values()))
    return MODEL or TINY


def build_page(start, grader):
    """The page: three tabs, and what is loaded when somebody opens it."""
    runs = partial(find_runs, RUNS, start)
    panel = AskPanel(runs, start, SETTINGS_FILE)
    talk, compare = TalkTab(panel), CompareTab(panel, grader)
    with gr.Blocks(title="Chat with a checkpoint", analytics_enabled=False, **LAYOUT) as demo:
        with gr.Tab("Chat"):
            header = gr.Markdown("## Loading the model …", elem_id="header")
            with gr.Row():
                with gr.Column(scale=3):
                    with gr.Tab("Talk"):
                        talk.build()
                    with gr.Tab("Compare"):
                        compare.build()
                with gr.Column(scale=1, min_width=300):
                    loads = [panel.build(header, compare.choices)]
        talk.wire()
        compare.wire()
        with gr.Tab("Run"):
            loads.append(build_run_tab(runs, seconds=REFRESH_SECONDS))
        with gr.Tab("Samples"):
            loads.append(build_samples_tab(lambda: find_samples(runs(), EVALUATIONS), page_rows=PAGE_ROWS))
        for chain in loads:
            event = demo.load
            for handler, inputs, outputs in chain:
                event = event(handler, inputs, outputs, show_progress="hidden").then
    return demo


def main():
    start = find_start()
    locate_model(start)
    with Grader() as grader:
        page = build_page(start, grader).queue(default_concurrency_limit=8)
        try:
            page.launch(
                server_name=HOST,
                server_port=PORT,
                share=SHARE,
                inbrowser=OPEN_BROWSER,
                max_file_size="5mb",
                theme=gr.themes.Default(font=gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))),
                css=STYLE,
                footer_links=[],
                show_error=True,
                ssr_mode=False,
                mcp_server=False,
            )
        except OSError as error:
            raise UserError(f"--port {PORT} on {HOST}: {error}") from None


if __name__ == "__main__":
    run_script(main)
