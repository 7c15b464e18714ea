"""Will this run fit, and will it learn? Asked before it starts.

At the start of every run: are the versions the tested ones, what is the device, how much memory is needed?
With `--preflight` also: one prompt as the model sees it, a worst-case micro-batch, two problems sampled and
scored, and a verdict: ready, or what to change and to what. Weights and random numbers stay as they are.
"""

import importlib.metadata
import platform
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch

from lib.memory import GIB, fit_tokens, plan_memory
from lib.models import choose_device, choose_dtype, load_config
from lib.policy import find_optimizer, peak_memory_gib
from lib.prompts import find_style, render_prompt
from lib.settings import UserError

PROBE_TOKENS = 2048  # of a probe off a card: enough to see that it works, and how fast
TOO_CLIPPED, TOO_FEW_ANSWERS, TOO_UNREADABLE, TOO_ALIKE = 0.25, 0.1, 0.2, 0.2  # shares that are worth a word
_ROOT = Path(__file__).resolve().parent.parent
_BINDING = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers")  # what engines are choosy about


def read_tested_versions():
    """The tested version of each package: what the requirements files pin."""
    texts = [(_ROOT / f"requirements{part}.txt").read_text() for part in ("", "-gpu")]
    return dict(re.findall(r"^([\w-]+)==(\S+)", "\n".join(texts), re.MULTILINE))


def _find_version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(engines=()):
    """One line for each package that is not of the tested version. UserError for a known break.

    engines   distributions that this run uses and that bind others to versions: unsloth, vllm
    """
    found = {name: _find_version(name) for name in (*read_tested_versions(), *_BINDING)}
    vision = _find_version("torchvision")
    if vision and found["torch"].endswith("+cpu") and not vision.endswith("+cpu"):
        raise UserError(
            f"torchvision {vision} is built for CUDA and torch is not, which breaks transformers (operator "
            "torchvision::nms does not exist): pip uninstall -y torchvision torchaudio torchcodec"
        )
    for engine in filter(_find_version, engines):
        _check_needs(engine, found)
    return [
        f"{name} {found[name]} is not the tested {tested}: pip install {name}=={tested}"
        for name, tested in read_tested_versions().items()
        if found[name] and found[name].partition("+")[0] != tested
    ]


def _check_needs(engine, found):
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(engine) or ():
        need = Requirement(text)
        have = found.get(need.name)
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        if applies and have and not need.specifier.contains(have, prereleases=True):
            raise UserError(
                f"{engine} {_find_version(engine)} needs {need.name}{need.specifier}, not {have}: "
                f'pip install "{need.name}{need.specifier}", or choose another engine'
            )


def look_ahead(place, work, *, full=False, engines=()):
    """Print versions, device and memory of a run that is about to load its model; returns the `Ledger`.

    place   a `models.ModelPlace`
    work    a `memory.Workload`
    full    the whole ledger, not its sum
    UserError for versions that are known to break, for an optimizer that is not installed, and for a model
    that is too large for the card.
    """
    find_optimizer(work.optimizer)
    for line in check_versions(engines):
        print(f"note: {line}")
    device = choose_device()
    free, total = torch.cuda.mem_get_info() if device.type == "cuda" else (None, None)
    if total:
        print(f"device  {torch.cuda.get_device_name()}, {free / GIB:.2f} of {total / GIB:.2f} GiB free")
    else:
        print(f"device  {platform.machine()} CPU, {torch.get_num_threads()} threads")
    config, dtype = load_config(place), choose_dtype(device)
    ledger = plan_memory(config, work, dtype=dtype, card=total)
    if total:
        ledger = replace(ledger, held=ledger.held | {"in use already": total - free})
    print(
        "memory  " + ("\n        ".join(ledger.lines()) if full else f"peak about {ledger.peak_gib:.2f} GiB")
    )
    if not ledger.fits:
        tokens = fit_tokens(config, work, dtype=dtype, card=free)
        print(f"note: --tokens-per-microbatch {work.tokens_per_microbatch} is too much: {tokens} should fit")
    return ledger


def probe_learning(policy, work, *, only_on_card=False):
    """Two worst-case micro-batches forward and backward, for real; prints time and peak memory.

    Weights and random numbers stay as they were; the policy's token budget gives way if it must. Off a card
    they are small, or none at all.
    """
    on_card = policy.device.type == "cuda"
    if only_on_card and not on_card:
        return
    tokens = work.tokens_per_microbatch if on_card else min(PROBE_TOKENS, work.tokens_per_microbatch)
    columns = min(work.row_tokens, policy.causal_lm.config.max_position_embeddings)
    columns = columns if on_card else min(columns, PROBE_TOKENS)
    rows, draw = 2 * max(1, tokens // columns), random.Random(0)
    ids = [[draw.randrange(len(policy.tokenizer)) for _ in range(columns - 1)] for _ in range(rows)]
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    scored = policy.logprobs([SimpleNamespace(prompt_ids=[0], completion_ids=ids)])
    scored.logp_NT.grad = torch.full_like(scored.logp_NT, 1 / scored.logp_NT.numel())
    policy.backward(scored)
    seconds = time.perf_counter() - started
    for parameter in policy.trainable.values():
        parameter.grad = None
    peak = f"peak {peak_memory_gib(policy.device):.2f} GiB, " if on_card else ""
    speed = rows * columns / seconds
    print(f"probe   {rows} x {columns} tokens forward and backward: {peak}{speed:.0f} tokens/s")


def print_preflight(policy, sampler, groups, *, work, style, thinking):
    """What a prompt and a few samples say about a run, and the verdict; returns the exit code: 0 is ready.

    groups   of two problems, sampled as the first step would, scored and graded
    """
    changes = []
    if policy.token_budget < work.tokens_per_microbatch:
        changes.append(f"--tokens-per-microbatch {policy.token_budget}: more does not fit the card")
    longest = getattr(policy.causal_lm.config, "max_position_embeddings", work.row_tokens)
    if work.row_tokens > longest:
        changes.append(
            f"--max-new-tokens: prompt and completion may have {work.row_tokens} tokens; the model "
            f"reads {longest}"
        )
    changes += look_at_prompt(policy.tokenizer, groups[0], sampler.end_ids, style=style, thinking=thinking)
    changes += judge_samples(groups, style=style)
    print("verdict " + ("ready" if not changes else "change this first:\n  - " + "\n  - ".join(changes)))
    return 1 if changes else 0


def look_at_prompt(tokenizer, group, end_ids, *, style, thinking):
    """Print the end of a prompt, the end tokens and the thinking flag; returns what to change."""
    print(f"prompt  {len(group.prompt_ids)} tokens, ending in {group.prompt[-120:]!r}")
    print("ends    " + ", ".join(f"{end} {tokenizer.decode([end])!r}" for end in end_ids))
    both = [render_prompt(tokenizer, "1 + 1?", style, thinking=flag) for flag in (True, False)]
    heard = "the template knows it" if both[0] != both[1] else "the template does not know it"
    print(f"think   {'the template decides' if thinking is None else thinking} ({heard})")
    changes = []
    if not end_ids:
        changes.append("--model: it has no end token, so that no completion can end")
    if group.prompt.rstrip().endswith("<think>") and not find_style(style).thinks:
        changes.append("--no-thinking, or --prompt think_answer: the template has opened <think> already")
    return changes


def judge_samples(groups, *, style):
    """Print what a few scored and graded groups say about a run; returns what to change."""
    grades = [grade for group in groups for grade in group.grades]
    reasons = [reason for group in groups for reason in group.finish_reasons]
    longest = max(len(ids) for group in groups for ids in group.completion_ids)
    answered = [grade for grade in grades if grade.answer is not None]
    clipped, with_answer = fmean(reason == "length" for reason in reasons), len(answered) / len(grades)
    unreadable = fmean(grade.unparsed for grade in answered) if answered else 0.0
    correct, informative = fmean(grade.correct for grade in grades), fmean(map(expect_difference, groups))
    print(f"sample  {groups[0].completions[0][-200:]!r}, gold answer {groups[0].problem.answer!r}")
    print(
        f"samples {len(grades)}: clipped {clipped:.0%}, answered in the style {with_answer:.0%}, of these "
        f"readable {1 - unreadable:.0%}, right {correct:.0%}; groups to learn from {informative:.0%}"
    )
    print("reward  " + draw_histogram([reward for group in groups for reward in group.reward]))
    changes = []
    if clipped > TOO_CLIPPED:
        changes.append(
            f"--max-new-tokens {2 * longest}: {clipped:.0%} of the completions are cut off at {longest}"
        )
    if with_answer < TOO_FEW_ANSWERS:
        changes.append(
            f"--prompt: {len(answered)} of {len(grades)} completions have an answer in the style {style}; "
            "read the sample above: which style does the model write?"
        )
    if unreadable > TOO_UNREADABLE:
        changes.append(f"--prompt: {unreadable:.0%} of the answers cannot be read as mathematics")
    if informative < TOO_ALIKE:
        what = "harder" if correct > 0.5 else "easier"
        changes.append(
            f"--train-data with {what} problems, or a larger --group-size: all completions of a problem earn "
            f"the same in {1 - informative:.0%} of the groups"
        )
    return changes


def expect_difference(group):
    """How likely another group of this problem and size has two different rewards, going by this one.

    >>> expect_difference(SimpleNamespace(reward=[0.0, 0.0, 0.0, 1.0]))
    0.6796875
    """
    size = len(group.reward)
    return 1 - sum((count / size) ** size for count in Counter(group.reward).values())


def draw_histogram(values, *, bins=6):
    """Counts of values, as one line.

    >>> draw_histogram([0, 0, 1, 1, 1])
    '0: 2, 1: 3'
    """
    counts = Counter(values)
    if len(counts) <= bins:
        return ", ".join(f"{value:g}: {counts[value]}" for value in sorted(counts))
    low, width = min(values), (max(values) - min(values)) / bins
    places = Counter(min(bins - 1, int((value - low) / width)) for value in values)
    edges = [f"{low + i * width:.2f} to {low + (i + 1) * width:.2f}: {places[i]}" for i in range(bins)]
    return ", ".join(edges)
