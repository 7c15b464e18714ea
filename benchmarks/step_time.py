"""Seconds per training step, ours against TRL's GRPOTrainer: the same work, in turn, in one process.

    python benchmarks/step_time.py            # --json for one JSON object; needs requirements-dev.txt

Both take the defaults of train_grdpo.py: the tiny model with the same LoRA in float32, the same problems in
the same order, the same reward function, group size and limit of tokens, AdamW. TRL is set to its best for
this: one micro-batch holds the whole step, one update per batch, no KL and so no reference model, no vLLM, no
gradient checkpointing, nothing logged, saved or evaluated. TRL's log-probabilities are a Triton kernel, which
no CPU runs: in its place stands `TorchLogProbs`, the same results in PyTorch. The learning rate is 0, so that
both sample from the same model throughout, and their completions are of the same length on average.

    sample   prompts to completions: rendering, tokenising, decoding, texts
    score    completions to rewards
    learn    the rest: log-probabilities, loss, backward pass, optimizer step

A pair is one step of TRL and one of ours behind it; what is quoted is the median over the pairs. Measured
twice: as it comes, where most completions end by themselves, and at full length, where none ends before the
limit and nobody gains by what need not be computed. The cores must be idle: two threads that wait for each
other on a busy machine measure the waiting.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import train_grdpo as script  # noqa: E402
from lib.batches import Steps, load_problems  # noqa: E402
from lib.draws import SamplingParams  # noqa: E402
from lib.grading import Grader  # noqa: E402
from lib.losses import grdpo, sequence_logprob  # noqa: E402
from lib.models import load_tokenizer, load_trainable, locate_model  # noqa: E402
from lib.policy import Policy  # noqa: E402
from lib.prompts import encode_prompt, render_prompt  # noqa: E402
from lib.report import StepClock  # noqa: E402
from lib.rewards import grade_groups, parse_rewards, score_groups  # noqa: E402
from lib.sampler import TransformersSampler, keep_advantages  # noqa: E402

PARTS = ("sample_s", "score_s", "learn_s", "step_s")


def load_lora(place):
    how = {"rank": script.LORA_RANK, "alpha": script.LORA_ALPHA, "seed": script.SEED}
    return load_trainable(place, script.LORA_TARGETS, script.MODULES_TO_SAVE, **how)


def start_grader():
    """A grader whose processes run: they start once in a training run, and math-verify takes a second."""
    grader = Grader()
    grader.grade(["1 + x", "2 + x"], ["x + 1", "x + 2"])
    return grader


class Ours:
    """Steps 1 to 5 of train_grdpo.py."""

    def __init__(self, place, tokenizer, batches, options):
        self.batches, self.group_size = batches, options.group_size
        self.grader = start_grader()
        self.rewards = parse_rewards(script.REWARDS, style=script.PROMPT, grader=self.grader)
        self.ask = partial(encode_prompt, tokenizer, style=script.PROMPT, thinking=script.THINKING)
        model = load_lora(place)
        self.policy = Policy(model, tokenizer, script.TOKENS_PER_MICROBATCH)
        self.policy.start_optimizer(script.OPTIMIZER, weight_decay=script.WEIGHT_DECAY)
        self.sampler = TransformersSampler(model, tokenizer)
        self.params = SamplingParams(temperature=script.TEMPERATURE, max_new_tokens=options.max_new_tokens)

    def step(self, k):
        """Seconds of the parts of step `k`, how many tokens it sampled, and the prompts."""
        clock = StepClock()
        problems = self.batches[k]
        prompts = [self.ask(problem.problem) for problem in problems]
        how = {"group_size": self.group_size, "seed": script.SEED, "step": k + 1}
        groups = self.sampler.sample(problems, prompts, self.params, **how)
        clock.lap("sample")
        score_groups(self.rewards, grade_groups(groups, style=script.PROMPT, grader=self.grader))
        reward_PG = torch.tensor([group.reward for group in groups])
        clock.lap("score")
        scored = self.policy.logprobs(groups)
        s_N = sequence_logprob(scored.logp_NT, scored.length_N, reduction=script.LOGPROB_REDUCTION)
        s_PG = s_N.view_as(reward_PG)
        s_PG.retain_grad()
        grdpo(s_PG, reward_PG, beta=script.BETA, pairs=script.PAIRS).backward()
        keep_advantages(groups, -s_PG.grad)
        self.policy.backward(scored)
        self.policy.step(0.0, max_grad_norm=script.MAX_GRAD_NORM)
        clock.lap("learn")
        seconds = clock.metrics()
        parts = {name: seconds[f"time/{name}"] for name in PARTS[:-1]}
        tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
        asked = [group.prompt for group in groups]
        return parts | {"step_s": seconds["step_time"], "tokens": tokens, "asked": asked}


class TorchLogProbs:
    """Stands in for TRL's Triton kernel, called as that is: log-probabilities, and the entropy it logs."""

    @staticmethod
    def apply(hidden_NH, weight_VH, bias_V, target_N, temperature, *_):
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
        logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
        total_N = logits_NV.logsumexp(dim=-1)
        with torch.no_grad():
            p_NV = (logits_NV - total_N[:, None]).exp_()
            entropy_N = total_N - p_NV.mul_(logits_NV).sum(dim=-1)
        return logits_NV.gather(1, target_N[:, None])[:, 0] - total_N, entropy_N, None, None, None


def make_trainer(ours, place, options):
    """TRL's trainer over the problems that `ours` takes, in that order; its files go to a folder `output`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = TorchLogProbs
    rewards = parse_rewards(script.REWARDS, style=script.PROMPT, grader=start_grader())

    def reward(*, completion_ids, **columns):
        """The weighted total of our rewards, in TRL's signature: one call for all of them."""
        reasons = ["stop" if ids[-1] in trainer.eos_token_ids else "length" for ids in completion_ids]
        columns |= {"completion_ids": completion_ids, "finish_reasons": reasons}
        parts = [[one.weight * value for value in one.function(**columns)] for one in rewards]
        return [sum(values) for values in zip(*parts, strict=True)]

    problems = [problem for k in range(options.steps + 1) for problem in ours.batches[k]]
    ask = partial(render_prompt, ours.policy.tokenizer, style=script.PROMPT, thinking=script.THINKING)
    rows = [{"prompt": ask(one.problem), "problem": one.problem, "answer": one.answer} for one in problems]
    config = GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps + 1,
        per_device_train_batch_size=len(ours.batches[0]) * options.group_size,
        steps_per_generation=1,
        num_generations=options.group_size,
        max_completion_length=options.max_new_tokens,
        temperature=script.TEMPERATURE,
        shuffle_dataset=False,
        num_iterations=1,
        beta=0.0,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        weight_decay=script.WEIGHT_DECAY,
        max_grad_norm=script.MAX_GRAD_NORM,
        gradient_checkpointing=False,
        disable_dropout=True,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=script.SEED,
    )
    trainer = GRPOTrainer(
        model=load_lora(place),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=ours.policy.tokenizer,
    )
    return trainer


def run_in_turn(trainer, ours, steps):
    """A list of (TRL, ours) pairs of what `Ours.step` returns; the first step of each only warms up."""
    from transformers import TrainerCallback

    theirs, pairs = {}, []

    def timed(name, method):
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            result = method(*args, **kwargs)
            theirs[name] = time.perf_counter() - started
            if name == "sample_s":
                theirs["tokens"] = sum(len(ids) for ids in result[1])
                theirs["asked"] = list(dict.fromkeys(args[0]))
            return result

        return wrapper

    trainer._generate = timed("sample_s", trainer._generate)
    trainer._calculate_rewards = timed("score_s", trainer._calculate_rewards)

    class Alternate(TrainerCallback):
        """Ours behind each step of TRL, whose time ends here and begins again where ours is done."""

        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, args, state, *_, **__):
            theirs["step_s"] = time.perf_counter() - self.started
            theirs["learn_s"] = theirs["step_s"] - theirs["sample_s"] - theirs["score_s"]
            pairs.append((dict(theirs), ours.step(state.global_step - 1)))
            if pairs[-1][0]["asked"] != pairs[-1][1]["asked"]:
                raise RuntimeError("TRL was given other prompts than ours: the times say nothing")
            self.started = time.perf_counter()

    trainer.add_callback(Alternate())
    trainer.train()
    return pairs[1:]


def never_end(trainer, ours):
    """Both decode to the limit: what ends a completion is an id that the tokenizer does not know."""
    unknown = len(ours.policy.tokenizer)
    ours.sampler.end_ids = trainer.eos_token_ids = [unknown]
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = [unknown]


def summarise(pairs, completions):
    """Medians of either side and of the ratios of the pairs; their range says how far to trust them."""
    result = {}
    for side, name in enumerate(("trl", "ours")):
        result[name] = {part: statistics.median(pair[side][part] for pair in pairs) for part in PARTS}
        result[name]["mean_length"] = statistics.fmean(pair[side]["tokens"] for pair in pairs) / completions
    ratios = {part: [ours[part] / trl[part] for trl, ours in pairs] for part in PARTS}
    result["ratios"] = {part: statistics.median(values) for part, values in ratios.items()}
    return {
        "ratio_to_trl": result["ratios"]["step_s"],
        "range": [f(ratios["step_s"]) for f in (min, max)],
    } | result


def measure(options, *, full):
    """The summary of one run of pairs."""
    place = locate_model(script.MODEL)
    tokenizer = load_tokenizer(place)
    counts = {"easy": script.EASY, "medium": script.MEDIUM, "hard": script.HARD}
    counts = {None: options.problems} if options.problems else counts
    batches = Steps(load_problems(script.TRAIN_DATA), counts, seed=script.SEED)
    with tempfile.TemporaryDirectory() as options.output, contextlib.redirect_stdout(sys.stderr):
        ours = Ours(place, tokenizer, batches, options)
        trainer = make_trainer(ours, place, options)
        if full:
            never_end(trainer, ours)
        pairs = run_in_turn(trainer, ours, options.steps)
    return summarise(pairs, len(batches[0]) * options.group_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--steps", type=int, default=12, help="pairs that count, behind one to warm up")
    parser.add_argument("--problems", type=int, help="problems per step, of any tier; else as in training")
    parser.add_argument("--group-size", type=int, default=script.GROUP_SIZE)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install -r requirements-dev.txt")
    torch.set_num_threads(options.threads)
    result = measure(options, full=False)
    result |= {"full_length": measure(options, full=True), "pairs": options.steps, "threads": options.threads}
    if options.json:
        print(json.dumps(result))
        return
    table = Table(title=f"seconds per step, {options.steps} pairs, {options.threads} threads")
    for column in ("", *("TRL", "ours", "ours / TRL") * 2):
        table.add_column(column, justify="right" if column else "left")
    both = (result, result["full_length"])
    for part in PARTS:
        cells = [
            value for one in both for value in (one["trl"][part], one["ours"][part], one["ratios"][part])
        ]
        table.add_row(part.removesuffix("_s"), *(f"{cell:.3f}" for cell in cells))
    lengths = [
        f"{one[name]['mean_length']:.1f}" if name else "" for one in both for name in ("trl", "ours", "")
    ]
    table.add_row("tokens per completion", *lengths)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
