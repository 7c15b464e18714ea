"""The tabs Talk and Compare of the chat page: their widgets, and what happens when somebody uses them."""

import tempfile
import time
from pathlib import Path

import gradio as gr

from lib.chat import grade_answers, open_pair, stream_answers
from lib.chat_page import (
    LATEX,
    describe_share,
    report_errors,
    show_conversation,
    show_samples,
    warn,
)
from lib.conversation import Conversation, render_conversation
from lib.settings import UserError

EXAMPLES = (
    "Compute 38 + 30.",
    "What is 603 + 74?",
    "Ann has 35 coins and finds 4 more. How many coins does she have?",
)
PATIENCE = 10.0  # so long is waited for an answer in progress to stop [s]
QUIET = {"show_progress": "hidden"}  # an answer that grows is progress enough


def make_chatbot(name, **options):
    """A place for answers that renders formulas and shows tags as they are."""
    fixed = {"show_label": False, "latex_delimiters": LATEX, "allow_tags": False}
    return gr.Chatbot(elem_id=name, group_consecutive_messages=False, **fixed, **options)


class TalkTab:
    """A conversation with the model that the panel has chosen."""

    def __init__(self, panel):
        self.panel = panel

    def build(self):
        """Make the widgets; `wire` them when the panel has its own."""
        self.conversation = gr.State(Conversation())
        examples = [{"text": text} for text in EXAMPLES]
        hint = "### Ask it a problem\nType one below, or take one of these:"
        self.chat = make_chatbot("chat", height=470, buttons=["copy"], examples=examples, placeholder=hint)
        with gr.Row():
            hint = "Your question, for example: Compute 12 + 30."
            self.box = gr.Textbox(
                placeholder=hint, show_label=False, scale=8, autofocus=True, elem_id="question"
            )
            self.send_button = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
        with gr.Row():
            names = ("Stop", "Retry", "Undo", "Clear")
            self.buttons = [gr.Button(name, size="sm", min_width=60, elem_id=name.lower()) for name in names]
        with gr.Accordion("What the model was given, word for word", open=False, elem_id="word_for_word"):
            self.given = gr.Textbox(show_label=False, lines=4, max_lines=20, elem_id="given")
        with gr.Accordion("Save or load this conversation", open=False, elem_id="files"):
            with gr.Row():
                self.save_button = gr.Button("Save", size="sm", elem_id="save")
                self.load_button = gr.UploadButton(
                    "Load a saved one (.json)", file_types=[".json"], size="sm"
                )
            self.files = gr.File(label="Download", visible=False)

    def wire(self):
        talk = [self.conversation, self.panel.speaking, *self.panel.settings.values()]
        shown = [self.chat, self.box, self.given]
        asking = [self.box.submit, self.send_button.click]
        gr.on(asking, self.send, [self.box, *talk], shown, **QUIET)
        taking = self.chat.example_select(take_example, None, self.box, **QUIET)
        taking.then(self.send, [self.box, *talk], shown, **QUIET)
        stop, retry, undo, clear = self.buttons
        retry.click(self.retry, [self.box, *talk], shown, **QUIET)
        stop.click(stop_answer, self.conversation, None, **QUIET)
        undo.click(report_errors(self.undo), talk, shown, **QUIET)
        gr.on(
            [clear.click, self.chat.clear],
            self.clear,
            self.conversation,
            [self.conversation, *shown],
            **QUIET,
        )
        self.save_button.click(report_errors(self.save), self.conversation, self.files)
        self.load_button.upload(
            report_errors(self.load), [self.load_button, *talk], [self.conversation, *shown]
        )

    def send(self, question, conversation, path, *values):
        """Ask, and show the answer as it grows; after a mistake the question stands in the box again."""
        try:
            conversation.ask(question)
        except UserError as error:
            warn(error)
            yield gr.skip()
            return
        try:
            yield from self._answer(conversation, path, values)
        except UserError as error:
            warn(error)
            yield self._show(conversation, values, box=conversation.undo())

    def retry(self, box, conversation, path, *values):
        """Ask the last question again; another answer comes, because other tokens are drawn."""
        end_answer(conversation)
        try:
            conversation.retry()
            yield from self._answer(conversation, path, values, box=box)
        except UserError as error:
            warn(error)
            yield self._show(conversation, values, box=box)

    def _answer(self, conversation, path, values, *, box=""):
        conversation.answering = True
        try:
            conversation.system, prompt, params, seed = self.panel.read(values)
            models = self.panel.models
            speaker = models.open(path)
            how = {"params": params, "seed": seed, **prompt}
            for answers in stream_answers(models, speaker, conversation, **how):
                yield self._show(conversation, values, box=box, growing=answers[0])
            record = answers[0].record(speaker, prompt["style"]) | {"model": self.panel.label(path)}
            given = self._render(conversation, prompt)
            conversation.reply(record)
            yield [*self._show(conversation, values, box=box)[:2], given]
        finally:
            conversation.answering = False

    def _render(self, conversation, prompt):
        return render_conversation(self.panel.models.sampler.tokenizer, conversation, **prompt)

    def _show(self, conversation, values, *, box="", growing=None):
        """(messages, question box, what the model was given): the last stays as it is."""
        prompt = self.panel.read(values)[1]
        return [show_conversation(conversation, style=prompt["style"], growing=growing), box, gr.skip()]

    def undo(self, conversation, path, *values):
        del path
        end_answer(conversation)
        question = conversation.undo()
        return self._show(conversation, values, box=question)

    def clear(self, conversation):
        end_answer(conversation)
        return [Conversation(), [], "", ""]

    def save(self, conversation):
        """Two files to download: JSON, which can be loaded again, and Markdown."""
        if not conversation.messages:
            raise UserError("there is nothing to save yet")
        folder = Path(tempfile.mkdtemp())
        (folder / "conversation.json").write_text(conversation.to_json())
        (folder / "conversation.md").write_text(conversation.to_markdown())
        return gr.File([str(folder / "conversation.json"), str(folder / "conversation.md")], visible=True)

    def load(self, file, conversation, path, *values):
        del path
        end_answer(conversation)
        try:
            loaded = Conversation.from_json(Path(file).read_text())
        except UnicodeDecodeError:
            raise UserError("this file holds no conversation: it is not text") from None
        return [loaded, *self._show(loaded, values)]


class CompareTab:
    """The same question to two models on one base, several times each."""

    def __init__(self, panel, grader):
        self.panel, self.grader = panel, grader

    def build(self):
        """Make the widgets; `choices` are the two Dropdowns that the panel fills."""
        self.comparing = gr.State(Conversation())
        with gr.Row():
            labels = ("Left: a checkpoint from the list, or a folder", "Right")
            self.choices = [gr.Dropdown([], label=label, allow_custom_value=True) for label in labels]
        with gr.Row():
            example = EXAMPLES[0]
            self.question = gr.Textbox(
                example, label="The same question to both", scale=3, elem_id="compare_question"
            )
            self.gold = gr.Textbox("68", label="Right answer, if known", scale=2, elem_id="compare_gold")
            self.count = gr.Slider(1, 32, value=4, step=1, label="Answers of each", scale=2)
        with gr.Row():
            self.start = gr.Button("Compare", variant="primary", elem_id="compare", scale=4)
            self.stop = gr.Button("Stop", scale=1)
        self.sides = []
        with gr.Row():
            for side in ("left", "right"):
                with gr.Column(min_width=240):
                    share = gr.Markdown(elem_id=f"share_{side}")
                    self.sides += [
                        share,
                        make_chatbot(f"answers_{side}", height=430, buttons=[], placeholder=" "),
                    ]

    def wire(self):
        asked = [self.comparing, self.question, self.gold, self.count, *self.choices]
        handler = report_errors(self.compare)
        asking = [self.start.click, self.question.submit]
        gr.on(asking, handler, [*asked, *self.panel.settings.values()], self.sides, **QUIET)
        self.stop.click(stop_answer, self.comparing, None, **QUIET)

    def compare(self, conversation, question, gold, *rest):
        """Left, then right: heading and answers of both, as they grow; graded where the gold one is known."""
        count, left, right, *values = rest
        conversation.messages.clear()
        conversation.system, prompt, params, seed = self.panel.read(values)
        conversation.ask(question)
        speakers = open_pair(self.panel.models, left, right)
        names = [self.panel.label(path) for path in (left, right)]
        shown = [[f"### {name}", []] for name in names]
        for side, speaker in enumerate(speakers):
            how = {"params": params, "seed": seed, "count": int(count), **prompt}
            for answers in stream_answers(self.panel.models, speaker, conversation, **how):
                shown[side] = [f"### {names[side]}", show_samples(answers, None, style=prompt["style"])]
                yield shown[0] + shown[1]
            stopped = conversation.stopping
            if gold.strip():
                grades = grade_answers(answers, gold.strip(), style=prompt["style"], grader=self.grader)
                messages = show_samples(answers, grades, style=prompt["style"])
                shown[side] = [describe_share(names[side], grades), messages]
                yield shown[0] + shown[1]
            if stopped:
                return


def take_example(chosen: gr.SelectData):
    """The text of the example that was clicked."""
    return chosen.value["text"]


def stop_answer(conversation):
    """Ask the answer in progress to stop."""
    conversation.stopping = True


def end_answer(conversation):
    """Stop the answer in progress, and wait until it is there: no late part of it may be shown after this."""
    conversation.stopping = True
    end = time.monotonic() + PATIENCE
    while conversation.answering and time.monotonic() < end:
        time.sleep(0.02)
