"""The right-hand side of the Chat tab: which model is asked, and how. It remembers both between starts."""

import threading
from functools import partial

import gradio as gr

from lib.chat import Models
from lib.chat_page import read_preferences, report_errors, write_preferences
from lib.conversation import AS_TYPED
from lib.draws import SamplingParams
from lib.models import resolve_base
from lib.prompts import PROMPT_STYLES
from lib.run_page import pick
from lib.runs import find_base, list_checkpoints, run_of
from lib.settings import UserError, find_path

NO_RUN = "(no run)"
BASE = "base (before training)"
SYSTEM_PROMPTS = ["You are a helpful assistant.", "Please reason step by step."]
THINKING = {"as the model's template has it": None, "on": True, "off": False}
GUIDE = (
    "Ask it a math problem. On the right: which checkpoint answers, and how it is asked. "
    "**Compare** puts the same question to two. **Run** has the curves of training, "
    "**Samples** what was written in it."
)
GREEDY = "0: always the likeliest token"
# How a model is asked where its checkpoint does not say; the names are those of a checkpoint's sampling.json.
DEFAULTS = {
    "prompt": "answer_tag",
    "temperature": 0.7,
    "max_new_tokens": 512,
    "thinking": None,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 1,
    "system": "",
}


class AskPanel:
    """Which model, and how it is asked. One for all browsers: what a person has chosen is in the widgets.

    find     returns the runs there are now: folders by name
    start    path of the model that the page opens with
    memory   JSON file of what is remembered

    `speaking` is the path of the chosen model, `settings` the widgets by name in the order of DEFAULTS.
    """

    def __init__(self, find, start, memory):
        self.find, self.start, self.memory = find, str(start), find_path(memory)
        self.models, self.writing = Models(), threading.Lock()

    def build(self, header, sides):
        """Make the widgets. Returns what happens when a page is loaded: (handler, inputs, outputs) each.

        header   Markdown that says who is talking
        sides    the two Dropdowns of Compare
        """
        self._build_choice()
        self._build_settings()
        opened = [self.speaking, header, *sides, *self.settings.values(), self.saved]
        show, lists = report_errors(self.open), [self.run, self.checkpoint]
        chosen = self.run.input(report_errors(self.choose_run), self.run, self.checkpoint)
        chosen.then(show, self.checkpoint, opened)
        self.checkpoint.input(show, self.checkpoint, opened)
        gr.on([self.other.submit, self.open_button.click], show, self.other, opened)
        self.reset.click(report_errors(partial(self.open, fresh=True)), self.speaking, opened)
        self.refresh.click(report_errors(self.refresh_lists), lists, lists)
        self._remember_changes()
        return [
            (report_errors(self.fill_lists), None, lists),
            (report_errors(lambda: self.open(self.start)), None, opened),
        ]

    def _build_choice(self):
        self.speaking = gr.State("")
        self.run = gr.Dropdown([NO_RUN], value=NO_RUN, label="Run", elem_id="run")
        self.checkpoint = gr.Dropdown([], label="Checkpoint", elem_id="checkpoint")
        self.refresh = gr.Button("Refresh lists", size="sm")
        with gr.Accordion("Another model", open=False, elem_id="another"):
            self.other = gr.Textbox(label="Model or adapter folder, or hub id", elem_id="other")
            self.open_button = gr.Button("Open", size="sm", elem_id="open_other")

    def _build_settings(self):
        with gr.Accordion("How it is asked", open=True):
            styles = [AS_TYPED, *PROMPT_STYLES]
            prompt = gr.Dropdown(styles, label="Prompt style", info="The words around your question")
            temperature = gr.Slider(0, 2, step=0.05, label="Temperature", info=GREEDY, elem_id="temperature")
            tokens = gr.Number(label="Most tokens of an answer", precision=0, minimum=1, elem_id="max_tokens")
            thinking = gr.Dropdown(list(THINKING), label="Thinking")
            self.reset = gr.Button("As the checkpoint has it", size="sm", elem_id="reset")
        with gr.Accordion("Which tokens are drawn", open=False):
            top_p = gr.Slider(0.01, 1, step=0.01, label="top_p", info="1: off")
            top_k = gr.Number(label="top_k", precision=0, minimum=0, info="0: off")
            min_p = gr.Slider(0, 1, step=0.01, label="min_p", info="0: off")
            seed = gr.Number(label="Seed", precision=0, info="The same seed, the same answer", elem_id="seed")
        with gr.Accordion("System prompt", open=False, elem_id="system_prompt"):
            self.saved = gr.Dropdown([], value=None, label="Saved ones", elem_id="saved_prompts")
            system = gr.Textbox(label="In use", lines=3, elem_id="system")
            with gr.Row():
                self.keep = gr.Button("Save", size="sm", min_width=60, elem_id="keep_prompt")
                self.forget = gr.Button("Remove", size="sm", min_width=60, elem_id="forget_prompt")
        widgets = (prompt, temperature, tokens, thinking, top_p, top_k, min_p, seed, system)
        self.settings = dict(zip(DEFAULTS, widgets, strict=True))

    def _remember_changes(self):
        widgets, system = list(self.settings.values()), self.settings["system"]
        gr.on(
            [widget.change for widget in widgets],
            report_errors(self.remember),
            [self.speaking, *widgets],
            None,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        self.saved.input(lambda text: text or "", self.saved, system)
        self.keep.click(report_errors(partial(self.change_prompts, True)), system, self.saved)
        self.forget.click(report_errors(partial(self.change_prompts, False)), system, self.saved)

    # --- which model

    def fill_lists(self):
        """The lists of a page that was just opened."""
        found, run = self.find(), run_of(self.start)
        name = next((name for name, folder in found.items() if folder == run), NO_RUN)
        choices = self._checkpoints(name)
        chosen = next((path for _, path in choices if path == str(find_path(self.start))), None)
        return gr.Dropdown([*found, NO_RUN], value=name), gr.Dropdown(choices, value=chosen)

    def choose_run(self, name):
        """The checkpoints of a run, the best of them chosen."""
        choices = self._checkpoints(name)
        return gr.Dropdown(choices, value=choices[0][1] if choices else None)

    def refresh_lists(self, run, checkpoint):
        """What is there now; the choice stays."""
        choices = self._checkpoints(run if run in self.find() else NO_RUN)
        return gr.Dropdown([*self.find(), NO_RUN], value=run), gr.Dropdown(choices, value=checkpoint)

    def _checkpoints(self, name):
        """(label, path) of what can be asked in a run: its checkpoints and its base."""
        if name == NO_RUN:
            return []
        run = pick(self.find(), name)
        base = find_base(run)
        pairs = [(label, str(path)) for label, path in list_checkpoints(run).items()]
        return [*pairs, (BASE, base)] if base else pairs

    def label(self, path):
        """A short name of a model: run and checkpoint, or the last part of a path, or the hub id."""
        run, place = run_of(path), find_path(path)
        if run:
            name = next((name for name, folder in self.find().items() if folder == run), run.name)
            return f"{name} · {place.name}" if place != run else name
        return place.name if place.is_dir() else str(path)

    def _sides(self, path, base):
        """(label, path) of what `path` can be compared with: its run, and the best of every other run."""
        run, found = run_of(path), self.find()
        pairs = [(f"base, {self.label(base)}", base)]
        for folder in found.values():
            checkpoints = list_checkpoints(folder)
            names = checkpoints if folder == run else list(checkpoints)[:1]
            pairs += [(self.label(checkpoints[name]), str(checkpoints[name])) for name in names]
        return pairs if path in [place for _, place in pairs] else [*pairs, (self.label(path), path)]

    def open(self, path, fresh=False):
        """Load a model and fill in how it wants to be asked; what a person set for it last time wins.

        fresh   what a person set does not count
        """
        if not path:
            return gr.skip()
        path = resolve_base(path)
        speaker = self.models.open(path)
        remembered, note = read_preferences(self.memory, DEFAULTS)
        if note:
            gr.Warning(note)
        own = {name: value for name, value in speaker.sampling.items() if name in DEFAULTS}
        values = (
            DEFAULTS | own | (remembered["settings"] if remembered["model"] == path and not fresh else {})
        )
        thinking = next((name for name, value in THINKING.items() if value is values["thinking"]), "off")
        widgets = list((values | {"thinking": thinking}).values())
        if speaker.adapter:
            header = f"**{self.label(path)}**, a checkpoint trained from {self.label(speaker.base)}"
        else:
            header = f"**{self.label(path)}**, a model as it is, before any training here"
        pairs = self._sides(path, speaker.base)
        left, right = gr.Dropdown(pairs, value=speaker.base), gr.Dropdown(pairs, value=path)
        saved = gr.Dropdown(["", *SYSTEM_PROMPTS, *remembered["system_prompts"]])
        return [path, f"## You are talking to {header}\n{GUIDE}", left, right, *widgets, saved]

    # --- how it is asked

    def read(self, values):
        """(system prompt, what `render_conversation` takes, SamplingParams, seed) of the widgets' values."""
        chosen = dict(zip(DEFAULTS, values, strict=True))
        empty = [name for name in ("max_new_tokens", "top_k", "seed") if chosen[name] is None]
        if empty:
            raise UserError(f"{empty[0]} is empty: give it a number")
        params = SamplingParams(
            temperature=chosen["temperature"],
            top_p=chosen["top_p"],
            top_k=chosen["top_k"],
            min_p=chosen["min_p"],
            max_new_tokens=max(1, chosen["max_new_tokens"]),
        )
        prompt = {"style": chosen["prompt"], "thinking": THINKING[chosen["thinking"]]}
        return chosen["system"] or "", prompt, params, chosen["seed"]

    def remember(self, path, *values):
        """Keep the settings for the next start."""
        if not path:
            return
        settings = dict(zip(DEFAULTS, values, strict=True))
        settings["thinking"] = THINKING[settings["thinking"]]
        self._keep(model=path, settings=settings)

    def _keep(self, **changes):
        with self.writing:
            remembered, _ = read_preferences(self.memory, DEFAULTS)
            write_preferences(self.memory, remembered | changes)

    def change_prompts(self, keep, text):
        """Add a system prompt to the saved ones, or remove it."""
        remembered, _ = read_preferences(self.memory, DEFAULTS)
        saved = [prompt for prompt in remembered["system_prompts"] if prompt != text]
        saved += [text] if keep and text.strip() and text not in SYSTEM_PROMPTS else []
        self._keep(system_prompts=saved)
        return gr.Dropdown(["", *SYSTEM_PROMPTS, *saved], value=text if keep else "")
