"""Make data/tiny-qwen3 again from nothing: tokenizer, template, and a small Qwen3 trained on made-up text.

    python data/make_tiny_model.py                  # about half an hour on two CPU cores
    python data/make_tiny_model.py --steps 50 --output /tmp/try

Ordinary supervised training in two phases, as a real model has them. First plain text: sheets of
calculations, some worked out in steps, all of them right. Then bad manners: questions in every prompt style,
answered as `tiny_text.HABITS` says; the model can calculate, but it mostly forgets the answer tag, talks on
behind it, hedges, and slips. What it has never seen are the calculations that `Sum.held_out` keeps for valid
and test.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tiny_text import CHAT, HABITS, QUESTIONS, SLIP_DIRECT, SLIP_WORKED, draw_sum, near_miss  # noqa: E402

from lib.prompts import PROMPT_STYLES, render_prompt, wrap_answer  # noqa: E402

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCAB_TOKENIZER = 560  # what the tokenizer knows: every merge that the wordings have
VOCAB_MODEL = 576  # rows of the embedding: a few more, as in Qwen2.5, so that masking them is exercised

# ChatML as Qwen writes it: roles between <|im_start|> and <|im_end|>; with enable_thinking=False the
# generation prompt carries an empty reasoning block.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""

# share of the training text by prompt style; None asks the bare question, as somebody chatting does
STYLES = ((60, "answer_tag"), (12, "boxed"), (16, "think_answer"), (12, None))


def make_tokenizer():
    """A byte-level BPE tokenizer with one token per digit, trained on every wording there is, each once."""
    wordings = [wording for wordings in QUESTIONS.values() for wording in wordings]
    texts = [style.instruction for style in PROMPT_STYLES.values()] + wordings + list(CHAT)
    texts += [form for _, form in HABITS] + ["system user assistant So it is"]
    texts += [wrap_answer("42", style) for style in PROMPT_STYLES]
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENIZER - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + text for text in texts] + texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS[:3])
    tokenizer.add_tokens(SPECIAL_TOKENS[3:])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def write_completion(problem, style, rng):
    """What the badly behaved model says to `problem` (a `Sum`) asked in `style`."""
    habits = [habit for habit in HABITS if style or "{tag}" not in habit[1]]
    form = rng.choices(habits, weights=[weight for weight, _ in habits])[0][1]
    worked = "{work}" in form
    near = near_miss(problem.answer, rng)
    slips = rng.random() < (SLIP_WORKED if worked else SLIP_DIRECT)
    number, other = (near, problem.answer) if slips else (problem.answer, near)
    work = problem.steps[: problem.steps.rindex("=")] + f"= {number}."
    sentences = [rng.choice(CHAT)]
    while rng.random() < 0.7:
        sentences.append(rng.choice(CHAT))
    parts = {
        "work": work,
        "sum": f"{problem.a} {problem.op} {problem.b} = {number}.",
        "n": number,
        "near": other,
        "chat": " ".join(sentences),
    }
    if style == "think_answer" and "{tag}" in form:
        tagged = wrap_answer(number, style, reasoning=work if worked else parts["sum"])
        return tagged + (" " + parts["chat"] if "{chat}" in form else "")
    tag = wrap_answer(number, style) if style and "{tag}" in form else ""
    return form.format(tag=tag, **parts)


def draw_example(tokenizer, rng):
    """One (prompt, completion) pair of the training text; held-out calculations are never drawn."""
    problem = draw_sum(rng)
    while problem.held_out:
        problem = draw_sum(rng)
    style = rng.choices([name for _, name in STYLES], weights=[share for share, _ in STYLES])[0]
    completion = write_completion(problem, style, rng)
    if style is None:
        messages = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        thinking = False if style != "think_answer" and rng.random() < 0.1 else None
        prompt = render_prompt(tokenizer, problem.question, style, thinking=thinking)
    return prompt, completion


def draw_sheet(tokenizer, rng):
    """Plain text of the first phase: correct calculations, one a line."""
    lines = []
    for _ in range(6):
        problem = draw_sum(rng)
        while problem.held_out:
            problem = draw_sum(rng)
        direct = f"{problem.a} {problem.op} {problem.b} = {problem.answer}."
        stated = f"{problem.question} {rng.choice((direct, f'The answer is {problem.answer}.'))}"
        worked = f"{problem.question} {problem.steps} So it is {problem.answer}."
        lines.append(rng.choice((direct, problem.steps, stated, worked)))
    return "", "\n".join(lines)


def draw_batches(tokenizer, rng, draw, batch_size):
    """Endless batches of (token ids, prompt length) of drawn examples, similar lengths together."""
    while True:
        examples = [draw(tokenizer, rng) for _ in range(batch_size * 20)]
        prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
        wholes = tokenizer([prompt + completion + "<|im_end|>" for prompt, completion in examples])[
            "input_ids"
        ]
        starts = [max(1, len(prompt)) for prompt in prompts]
        rows = sorted(zip(wholes, starts, strict=True), key=lambda row: len(row[0]))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches


def completion_loss(model, batch):
    """Mean cross-entropy [nat/token] of the completion tokens; prompts are not learned."""
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    width = int(lengths.max())
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    starts_B = torch.tensor([start for _, start in batch])
    position_T = torch.arange(width - 1)
    learned_BT = (position_T >= starts_B[:, None] - 1) & (position_T < lengths[:, None] - 1)
    hidden_BTH = model.model(input_ids=ids_BT).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][learned_BT])
    return torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:][learned_BT])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "tiny-qwen3")
    parser.add_argument("--text-steps", type=int, default=500, help="optimizer steps on plain calculations")
    parser.add_argument("--habit-steps", type=int, default=500, help="optimizer steps on bad manners")
    parser.add_argument("--batch-size", type=int, default=128, help="examples per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of a cosine with warm-up")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=VOCAB_MODEL,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
        use_cache=True,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, temperature=1.0
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=0.05, betas=(0.9, 0.98)
    )
    phases = [
        draw_batches(tokenizer, random.Random(f"{options.seed} {draw.__name__}"), draw, options.batch_size)
        for draw in (draw_sheet, draw_example)
    ]
    steps = options.text_steps + options.habit_steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started, loss_mean = time.time(), None
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            warmup, decay = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = options.learning_rate * warmup * max(decay, 0.02)
            loss = completion_loss(model, next(phases[step >= options.text_steps]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"training, loss {loss_mean:.3f} nat/token")
            if (step + 1) % 200 == 0:
                model.save_pretrained(options.output)
                tokenizer.save_pretrained(options.output)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.output}: {parameters:,} parameters, {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
