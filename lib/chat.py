"""Who answers in a conversation, and answers that grow token by token. No widgets.

One base model is in memory. Its checkpoints are adapters that are switched on and off between two tokens, so
that base and checkpoint, or two browsers with two checkpoints, can be asked at the same time.
"""

import contextlib
import dataclasses
import threading
import time
from dataclasses import dataclass

import torch
from peft import PeftModel

from lib.conversation import AS_TYPED, find_answer, render_conversation
from lib.draws import draw_key
from lib.memory import is_out_of_memory
from lib.models import attach_adapter, load_model, load_tokenizer, locate_model, resolve_base
from lib.rewards import grade_completions
from lib.sampler import TransformersSampler
from lib.settings import UserError

MAX_ADAPTERS = 6  # kept beside the base; the one that waited longest makes room
SHOW_SECONDS = 0.05  # an answer in progress is shown so often [s]
_CHAT_STEP = -2  # of the draws: training counts from 1, evaluation is -1


@dataclass(frozen=True)
class Speaker:
    """Who answers: a base, or one of its adapters, as `Models.open` found it."""

    name: str
    base: str
    adapter: str | None  # its name in the PEFT model
    sampling: dict  # prompt style and sampling settings it was trained with; empty if nobody wrote them down


class Models:
    """One base model in memory, and the adapters that were opened on it. For many threads."""

    def __init__(self, device=None):
        self._device = device
        self._lock = threading.RLock()
        self._base = self._model = self._sampler = None
        self._adapters = {}  # (folder, time of its weights) -> name, the one used last at the end
        self._opened = 0

    def open(self, path):
        """Load what is at `path` where it is not loaded yet: a `Speaker`. UserError says why it cannot be."""
        place = locate_model(path)
        base = resolve_base(place.base)
        with self._lock, name_memory_errors():
            if base != self._base:
                self._load_base(place, base)
            name = self._attach(place.adapter.resolve()) if place.adapter else None
        return Speaker(str(path), base, name, place.sampling or {})

    def _load_base(self, place, base):
        tokenizer = load_tokenizer(place)
        # The old base leaves before the new one comes: both together may not fit.
        self._base = self._model = self._sampler = None
        self._adapters = {}
        model = load_model(dataclasses.replace(place, adapter=None), device=self._device)
        self._base, self._model, self._sampler = base, model, TransformersSampler(model, tokenizer)

    def _attach(self, folder):
        key = (folder, (folder / "adapter_model.safetensors").stat().st_mtime_ns)
        name = self._adapters.pop(key, None)
        if name is None:
            self._opened += 1
            name = f"opened_{self._opened}"
            self._model = attach_adapter(self._model, folder, name)
            self._model.set_adapter(name, inference_mode=True)
            while len(self._adapters) >= MAX_ADAPTERS:
                self._model.delete_adapter(self._adapters.pop(next(iter(self._adapters))))
        self._adapters[key] = name
        return name

    @property
    def sampler(self):
        """Of the base in memory; its tokenizer belongs to every adapter."""
        return self._sampler

    @contextlib.contextmanager
    def using(self, speaker):
        """The model with the speaker's adapter switched on (or all of them off), for this thread alone."""
        with self._lock:
            gone = speaker.adapter is not None and speaker.adapter not in self._adapters.values()
            if speaker.base != self._base or gone:
                raise UserError(f"{speaker.name} made room for another model: ask again to bring it back")
            if not isinstance(self._model, PeftModel):
                yield self._model
            elif speaker.adapter is None:
                with self._model.disable_adapter():
                    yield self._model
            else:
                if self._model.active_adapter != speaker.adapter:
                    self._model.set_adapter(speaker.adapter, inference_mode=True)
                yield self._model

    def encode(self, speaker, text):
        """Token ids of a rendered conversation; UserError if the model cannot read that much."""
        with self.using(speaker) as model:
            ids = self._sampler.tokenizer(text, add_special_tokens=False)["input_ids"]
            limit = getattr(model.config, "max_position_embeddings", None)
        if limit and len(ids) >= limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens and the model reads {limit}: undo some of it"
            )
        return ids

    def stream(self, speaker, prompt, keys, *, params):
        """`TransformersSampler.stream` by the speaker; others may be asked between two tokens."""
        with self.using(speaker):
            tokens = self._sampler.stream(prompt, keys, params)
        while True:
            with self.using(speaker), name_memory_errors():
                ids = next(tokens, None)
            if ids is None:
                return
            yield ids


@dataclass
class Answer:
    """A completion as it grows; `finish_reason` is stop, length or stopped (by a person), None until then.

    opened   the prompt itself ended with <think>, as some chat templates do
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    opened: bool = False

    def record(self, speaker, style):
        """What a conversation remembers of it."""
        return {
            "content": self.text,
            "model": speaker.name,
            "answer": find_answer(self.text, style),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "finish_reason": self.finish_reason,
            "opened": self.opened,
        }


def stream_answers(models, speaker, conversation, *, params, seed, count=1, **prompt):
    """Answer the last question `count` times: yields the list of `Answer`s, the same objects, as they grow.

    prompt   `style` and `thinking`, for `render_conversation`
    The same seed, conversation and attempt give the same answers, whatever the speaker was asked before.
    """
    conversation.stopping = False
    text = render_conversation(models.sampler.tokenizer, conversation, **prompt)
    ids = models.encode(speaker, text)
    sampler, attempt = models.sampler, conversation.attempt
    keys = [draw_key(seed, _CHAT_STEP, text, attempt=attempt, member=member) for member in range(count)]
    opened = text.rstrip().endswith("<think>")
    answers, rows = [Answer(opened=opened) for _ in keys], [[] for _ in keys]
    started = shown = time.perf_counter()
    for drawn in models.stream(speaker, ids, keys, params=params):
        now = time.perf_counter()
        for answer, row, token in zip(answers, rows, drawn, strict=True):
            if token is not None:
                row.append(token)
                answer.tokens, answer.seconds = len(row), now - started
        if conversation.stopping:
            break
        if now - shown >= SHOW_SECONDS:
            shown = now
            for answer, text in zip(answers, sampler.texts(rows), strict=True):
                answer.text = text.rstrip("\ufffd")  # half a character: the rest is the next token's
            yield answers
    for answer, row, text in zip(answers, rows, sampler.texts(rows), strict=True):
        cut = "stopped" if conversation.stopping else "length"
        answer.text, answer.finish_reason = text, "stop" if sampler.has_ended(row) else cut
    yield answers


def grade_answers(answers, gold, *, style, grader):
    """A `rewards.Grade` for each answer's text, against one gold answer."""
    texts = [answer.text for answer in answers]
    style = "answer_tag" if style == AS_TYPED else style
    return grade_completions(texts, [gold] * len(texts), style=style, grader=grader)


@contextlib.contextmanager
def name_memory_errors():
    """Out of memory, on a card or off it, as a `UserError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise UserError(
            "out of memory: fewer samples, a shorter conversation or a smaller model need less"
        ) from None


def open_pair(models, left, right):
    """Two speakers to compare: UserError, before anything is loaded, if they have different bases."""
    bases = [resolve_base(locate_model(path).base) for path in (left, right)]
    if bases[0] != bases[1]:
        raise UserError(
            f"only one base model is in memory, and these have two: {bases[0]} and {bases[1]}. "
            "Choose two checkpoints of the same base"
        )
    return models.open(left), models.open(right)
