"""Who answers, and what is said: without widgets, on the shipped model."""

import json
import shutil
import threading

import pytest
import safetensors.torch
import torch

from lib import chat
from lib.chat import Models, find_answer, grade_answers, name_memory_errors, open_pair, stream_answers
from lib.chat_page import (
    read_preferences,
    show_answer,
    show_conversation,
    show_samples,
    show_text,
    smooth,
    write_preferences,
)
from lib.conversation import AS_TYPED, Conversation, render_conversation
from lib.draws import SamplingParams, draw_key
from lib.models import locate_model
from lib.prompts import encode_prompt, render_prompt, split_thinking
from lib.sampler import TransformersSampler
from lib.settings import UserError
from tests.conftest import TINY

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=24)
DEFAULTS = {"prompt": "answer_tag", "temperature": 0.7, "thinking": None, "seed": 1, "system": ""}


@pytest.fixture
def models():
    return Models(torch.device("cpu"))


def asked(question="Compute 38 + 30.", system=""):
    conversation = Conversation(system)
    conversation.ask(question)
    return conversation


def answer(models, speaker, conversation, **options):
    """The finished answers."""
    settings = {"params": PARAMS, "seed": 1, "style": "answer_tag", "thinking": None} | options
    return list(stream_answers(models, speaker, conversation, **settings))[-1]


def logits(models, speaker):
    with models.using(speaker) as model, torch.inference_mode():
        return model(torch.tensor([[5, 6, 7]])).logits


def test_history_and_system_prompt_are_in_what_the_model_reads(tiny_tokenizer):
    conversation = asked("One?", system="Be brief.")
    conversation.reply({"content": "First."})
    conversation.ask("Two?")
    typed = render_conversation(tiny_tokenizer, conversation)
    assert [typed.index(part) for part in ("Be brief.", "One?", "First.", "Two?")] == sorted(
        typed.index(part) for part in ("Be brief.", "One?", "First.", "Two?")
    )
    assert typed.endswith("<|im_start|>assistant\n")
    styled = render_conversation(tiny_tokenizer, asked("One?"), style="boxed", thinking=False)
    assert styled == render_prompt(tiny_tokenizer, "One?", "boxed", thinking=False)


def test_undo_retry_and_clear_of_a_conversation():
    conversation = asked("One?")
    with pytest.raises(UserError, match="has no answer yet"):
        conversation.ask("Two?")
    conversation.reply({"content": "First."})
    conversation.retry()
    assert [message["content"] for message in conversation.messages] == ["One?"]
    assert conversation.attempt == 1
    conversation.reply({"content": "Second."})
    assert conversation.undo() == "One?"
    assert conversation.messages == []
    assert conversation.undo() == ""
    with pytest.raises(UserError, match="no question to ask again"):
        conversation.retry()
    with pytest.raises(UserError, match="type a question"):
        conversation.ask("  ")


def test_a_conversation_survives_a_file():
    conversation = asked("Was ist 2 + 2?", system="Kurz, bitte: ½.")
    conversation.reply({"content": "<think>x</think>4", "model": "run · best", "tokens": 3})
    again = Conversation.from_json(conversation.to_json())
    assert (again.system, again.messages) == (conversation.system, conversation.messages)
    assert "## Answer of run · best\n\n<think>x</think>4" in conversation.to_markdown()


def test_what_makes_no_sense_in_a_loaded_message_is_left_out():
    odd = {"tokens": "many", "seconds": 2.0, "finish_reason": None, "opened": 1, "metadata": {}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4", "model": "m", **odd}]
    loaded = Conversation.from_json(json.dumps({"system": 3, "messages": messages}))
    assert (loaded.system, loaded.messages[0]) == ("", messages[0])
    assert loaded.messages[1] == {"role": "assistant", "content": "4", "model": "m", "seconds": 2.0}
    assert "answer: 4" in show_conversation(loaded, style=AS_TYPED)[-1]["content"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1]", "{}", '{"messages": 3}', '{"messages": [{"role": "assistant", "content": "x"}]}'),
        *('{"messages": [{"role": "user"}]}', '{"messages": [["user", "x"]]}'),
    ],
)
def test_a_file_that_is_no_conversation_says_so(text):
    with pytest.raises(UserError, match="holds no conversation"):
        Conversation.from_json(text)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("It is 4.", False, (None, "It is 4.", True)),
        ("<think>a</think>b", False, ("a", "b", True)),
        ("a</think>b", True, ("a", "b", True)),
        ("so far", True, ("so far", "", False)),
        ("a </think> b", False, (None, "a </think> b", True)),
    ],
)
def test_thinking_is_kept_apart(text, opened, expected):
    assert split_thinking(text, opened=opened) == expected


def test_an_answer_streams_and_is_what_the_sampler_samples(models, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "SHOW_SECONDS", 0)
    speaker = models.open(TINY)
    conversation = asked()
    lengths, texts = [], []
    how = {"params": PARAMS, "seed": 1, "count": 3, "style": "answer_tag", "thinking": None}
    for answers in stream_answers(models, speaker, conversation, **how):
        lengths.append(sum(one.tokens for one in answers))
        texts.append([one.text for one in answers])
    assert len(lengths) > 5
    assert lengths == sorted(lengths)
    assert all(final.startswith(first) for first, final in zip(texts[2], texts[-1], strict=True))
    sampler = TransformersSampler(tiny_model, tiny_tokenizer)
    prompt = encode_prompt(tiny_tokenizer, "Compute 38 + 30.", "answer_tag")
    rendered = render_prompt(tiny_tokenizer, "Compute 38 + 30.", "answer_tag")
    keys = [draw_key(1, -2, rendered, attempt=0, member=member) for member in range(3)]
    rows = sampler._decode([prompt], keys, PARAMS)
    assert sampler.texts([ids for ids, _, _ in rows]) == texts[-1]
    assert [one.tokens for one in answers] == [len(ids) for ids, _, _ in rows]
    assert [one.finish_reason == "stop" for one in answers] == [finished for _, _, finished in rows]


def test_the_seed_decides_and_a_retry_draws_anew(models):
    speaker = models.open(TINY)
    hot = SamplingParams(temperature=1.5, max_new_tokens=24)
    conversation = asked()
    first = answer(models, speaker, conversation, params=hot)[0].text
    assert answer(models, speaker, conversation, params=hot)[0].text == first
    assert answer(models, speaker, conversation, params=hot, seed=2)[0].text != first
    conversation.retry()
    assert answer(models, speaker, conversation, params=hot)[0].text != first


def test_stop_ends_an_answer_and_the_next_one_is_whole(models, monkeypatch):
    monkeypatch.setattr(chat, "SHOW_SECONDS", 0)
    speaker, conversation = models.open(TINY), asked()
    how = {"params": PARAMS, "seed": 1, "style": "answer_tag", "thinking": None}
    for answers in stream_answers(models, speaker, conversation, **how):
        conversation.stopping = answers[0].tokens >= 3
    assert (answers[0].finish_reason, answers[0].tokens) == ("stopped", 4)
    assert answer(models, speaker, conversation)[0].finish_reason in ("stop", "length")


def test_an_adapter_is_switched_on_and_off(models, demo_run):
    base = models.open(TINY)
    before = logits(models, base)
    best = models.open(demo_run)
    first = models.open(demo_run / "checkpoints" / "step_000001")
    assert torch.equal(logits(models, base), before)
    assert (logits(models, best) - before).abs().max() > 1e-3
    assert (logits(models, best) - logits(models, first)).abs().max() > 1e-4 or best.adapter == first.adapter
    assert torch.equal(logits(models, base), before), "and off again"
    assert best.sampling["prompt"] == "answer_tag"
    from lib.models import load_model

    alone = load_model(locate_model(demo_run), device=torch.device("cpu"))
    with torch.inference_mode():
        torch.testing.assert_close(logits(models, best), alone(torch.tensor([[5, 6, 7]])).logits)


def test_two_talk_at_once_as_each_would_alone(models, demo_run):
    """Base and checkpoint take turns, token by token."""
    speakers = [models.open(TINY), models.open(demo_run / "checkpoints" / "step_000003")]
    alone = [answer(models, speaker, asked())[0].text for speaker in speakers]
    together = [None, None]

    def talk(number):
        together[number] = answer(models, speakers[number], asked())[0].text

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_adapters_make_room_and_come_back(models, demo_run, monkeypatch):
    monkeypatch.setattr(chat, "MAX_ADAPTERS", 1)
    first, second = (demo_run / "checkpoints" / f"step_00000{step}" for step in (1, 2))
    old = models.open(first)
    expected = logits(models, old)
    models.open(second)
    with pytest.raises(UserError, match="made room for another"):
        logits(models, old)
    torch.testing.assert_close(logits(models, models.open(first)), expected)


def test_a_checkpoint_that_was_written_anew_is_read_anew(models, demo_run, tmp_path):
    folder = shutil.copytree(demo_run / "checkpoints" / "step_000001", tmp_path / "adapter")
    before = logits(models, models.open(folder))
    file = folder / "adapter_model.safetensors"
    weights = {name: 2 * weight for name, weight in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file)
    assert not torch.equal(logits(models, models.open(folder)), before)


def broken(demo_run, folder, change):
    shutil.copytree(demo_run / "checkpoints" / "step_000001", folder)
    change(folder)
    return folder


def change_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BROKEN = {
    "no file": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model"),
    "garbage": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 50), "is damaged"),
    "other base": (
        lambda folder: change_weights(folder, lambda w: {k: torch.zeros(16, 64) for k in w}),
        "belongs to another base",
    ),
    "deeper base": (
        lambda folder: change_weights(
            folder, lambda w: {k.replace("layers.3", "layers.30"): v for k, v in w.items()}
        ),
        "belongs to another base",
    ),
    "half": (
        lambda folder: change_weights(folder, lambda w: {k: v for k, v in w.items() if "layers.0" in k}),
        "does not fit this base: it has no",
    ),
    "other rank": (lambda folder: change_config(folder, r=4), "does not fit this base"),
    "unknown modules": (
        lambda folder: change_config(folder, target_modules=["nothing"]),
        "does not fit this base",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_a_message_and_changes_nothing(models, demo_run, tmp_path, name):
    change, message = BROKEN[name]
    folder = broken(demo_run, tmp_path / "adapter", change)
    base = models.open(TINY)
    before = logits(models, base)
    with pytest.raises(UserError, match=message):
        models.open(folder)
    assert torch.equal(logits(models, base), before)
    good = models.open(demo_run)
    after = logits(models, good)
    assert not torch.equal(after, before)
    with pytest.raises(UserError, match=message):
        models.open(folder)
    assert torch.equal(logits(models, good), after)
    assert torch.equal(logits(models, base), before)


def test_a_missing_model_is_a_message_and_the_old_one_stays(models):
    base = models.open(TINY)
    for path in ("nowhere/at/all", TINY.parent, "no-such-owner/no-such-model"):
        with pytest.raises(UserError):
            models.open(path)
    assert answer(models, base, asked())


def test_a_pair_must_share_its_base(models, demo_run, tmp_path):
    left, right = open_pair(models, str(TINY), demo_run)
    assert (left.adapter is None, right.adapter is None) == (True, False)
    other = shutil.copytree(TINY, tmp_path / "other")
    with pytest.raises(UserError, match="only one base model is in memory"):
        open_pair(models, other, demo_run)
    assert answer(models, right, asked()), "nothing was loaded instead"


def test_a_conversation_longer_than_the_model_reads_is_a_message(models):
    speaker = models.open(TINY)
    with pytest.raises(UserError, match="the model reads 1024"):
        answer(models, speaker, asked("12 + " * 600))


def test_out_of_memory_is_a_message():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(UserError, match="out of memory"), name_memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="another"), name_memory_errors():
        raise RuntimeError("another")


def test_answers_are_found_and_graded(grader):
    answers = [
        chat.Answer("<answer>68</answer>"),
        chat.Answer("It is 68."),
        chat.Answer("<answer>7</answer>"),
    ]
    grades = grade_answers(answers, "68", style="answer_tag", grader=grader)
    assert [(grade.correct, grade.answer_correct) for grade in grades] == [
        (True, True),
        (False, True),
        (False, False),
    ]
    assert [find_answer("It is 68.", style) for style in (AS_TYPED, "answer_tag")] == ["68", None]


def test_tags_are_shown_and_formulas_stay():
    shown = show_text("<answer>$a<b$</answer> `<x>` 1 < 2 <script>")
    assert shown == "&lt;answer>$a<b$&lt;/answer> `<x>` 1 < 2 &lt;script>"
    message = {"content": "<think>hm</think>It is <answer>3</answer>", "tokens": 10, "seconds": 0.5}
    folded, said = show_answer(message, style="answer_tag")
    assert folded["metadata"] == {"title": "Thinking", "status": "done"}
    assert "<b>answer: 3</b> · 10 tokens · 20 tokens/s" in said["content"]
    conversation = asked()
    growing = chat.Answer("<think>half", tokens=2)
    assert (
        show_conversation(conversation, style="answer_tag", growing=growing)[1]["metadata"]["status"]
        == "pending"
    )


def test_thinking_that_the_template_opens_is_folded_away(models, monkeypatch):
    """DeepSeek's and QwQ's templates end the prompt with <think>: the completion has the end tag alone."""
    monkeypatch.setattr(chat, "SHOW_SECONDS", 0)
    speaker, tokenizer = models.open(TINY), models.sampler.tokenizer
    opening = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + opening)
    conversation = asked()
    how = {"params": PARAMS, "seed": 1, "style": AS_TYPED, "thinking": None}
    for answers in stream_answers(models, speaker, conversation, **how):
        shown = show_conversation(conversation, style=AS_TYPED, growing=answers[0])
        if answers[0].tokens > 2:
            assert [one.get("metadata", {}).get("title") for one in shown] == [None, "Thinking", None]
    assert shown[1]["content"] == show_text(answers[0].text.strip())
    assert shown[2]["content"].startswith("…"), "it never stopped thinking"
    conversation.reply(answers[0].record(speaker, AS_TYPED) | {"content": "half of 6</think>It is 3."})
    saved = Conversation.from_json(conversation.to_json())
    thought, said = show_conversation(saved, style=AS_TYPED)[1:]
    assert (thought["content"], thought["metadata"]["status"]) == ("half of 6", "done")
    assert said["content"].startswith("It is 3.\n\n<small>")
    assert show_samples([chat.Answer("a</think>b", opened=True)], None, style=AS_TYPED)[0]["content"] == "a"


def test_smoothing_starts_unbiased_and_keeps_a_constant():
    assert smooth([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


def test_settings_are_remembered_and_a_damaged_file_is_ignored(tmp_path):
    path = tmp_path / "deep" / "chat.json"
    assert read_preferences(path, DEFAULTS)[1] == ""
    kept = {"model": "x", "settings": DEFAULTS | {"thinking": False}, "system_prompts": ["Be brief."]}
    write_preferences(path, kept)
    assert read_preferences(path, DEFAULTS) == (kept, "")
    for damage in (
        *("", "[]", "{", '{"settings": 1}', '{"settings": {"temperature": "hot"}}', "\x00\xff"),
        *('{"settings": {"prompt": "xml"}}', '{"settings": {"nonsense": 1}}', '{"system_prompts": [1]}'),
    ):
        path.write_text(damage)
        remembered, note = read_preferences(path, DEFAULTS)
        assert remembered["settings"] == {}
        assert "damaged and were ignored" in note
