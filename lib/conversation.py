"""What is said to a model: the turns of a conversation, the prompt they become, thinking kept from answer."""

import json
from dataclasses import dataclass, field

from lib.prompts import build_messages, extract_answer, extract_any_answer, render_messages
from lib.settings import UserError

# What a message may hold: anything else, or of another kind, in a file is left out.
_KINDS = {"role": str, "content": str, "model": str, "answer": str, "tokens": int, "seconds": (int, float)}
_KINDS |= {"finish_reason": str, "opened": bool}
AS_TYPED = "as typed"  # instead of a prompt style: the message goes to the model as it stands


@dataclass
class Conversation:
    """What was said so far.

    messages   {role, content} in turns; an answer also has what `Answer.record` says about it
    attempt    how often the last question was asked again: another attempt draws other tokens
    stopping   somebody has asked the answer in progress to stop
    answering  an answer is in progress
    """

    system: str = ""
    messages: list = field(default_factory=list)
    attempt: int = 0
    stopping: bool = False
    answering: bool = False

    def ask(self, text):
        """Add a question; UserError if there is nothing to ask, or another one is open."""
        if not text.strip():
            raise UserError("type a question first")
        if self.messages and self.messages[-1]["role"] == "user":
            raise UserError("the last question has no answer yet: retry it, or undo it")
        self.messages.append({"role": "user", "content": text.strip()})
        self.attempt = 0

    def reply(self, record):
        """Add an answer behind the last question."""
        self.messages.append({"role": "assistant", **record})

    def retry(self):
        """Take the last answer back, so that its question is open again and is answered differently."""
        if not self.messages:
            raise UserError("there is no question to ask again")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        self.attempt += 1

    def undo(self):
        """Take the last question and its answer back; returns the question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.attempt = 0
                return message["content"]
        return ""

    def to_json(self):
        return json.dumps({"system": self.system, "messages": self.messages}, indent=1, ensure_ascii=False)

    def to_markdown(self):
        """The conversation as a document: a heading per turn."""
        parts = [f"**System prompt**\n\n{self.system}"] if self.system else []
        for message in self.messages:
            who = (
                "Question" if message["role"] == "user" else f"Answer of {message.get('model', 'the model')}"
            )
            parts.append(f"## {who}\n\n{message['content']}")
        return "\n\n".join(parts) + "\n"

    @classmethod
    def from_json(cls, text):
        """The conversation that `to_json` wrote; UserError says what is wrong with `text`."""
        try:
            saved = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"this file holds no conversation: it is not JSON ({error})") from None
        messages = saved.get("messages") if isinstance(saved, dict) else None
        good = isinstance(messages, list) and all(
            isinstance(message, dict)
            and message.get("role") == ("assistant" if turn % 2 else "user")
            and isinstance(message.get("content"), str)
            for turn, message in enumerate(messages)
        )
        if not good:
            raise UserError("this file holds no conversation: questions and answers must take turns in it")
        messages = [
            {name: value for name, value in message.items() if isinstance(value, _KINDS.get(name, ()))}
            for message in messages
        ]
        system = saved.get("system")
        return cls(system if isinstance(system, str) else "", messages)


def render_conversation(tokenizer, conversation, *, style=AS_TYPED, thinking=None):
    """The exact text the model continues: every question put in `style`, and the answers between them."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system.strip() else []
    turns = [
        build_messages(message["content"], style)[-1]
        if message["role"] == "user" and style != AS_TYPED
        else {"role": message["role"], "content": message["content"]}
        for message in conversation.messages
    ]
    return render_messages(tokenizer, system + turns, thinking=thinking)


def find_answer(text, style):
    """The answer extracted from a completion, in the style it was asked for."""
    return extract_any_answer(text, "answer_tag") if style == AS_TYPED else extract_answer(text, style)
