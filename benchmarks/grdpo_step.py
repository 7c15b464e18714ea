"""The learn phase of one GRDPO group against the original's loop, and against the least that it could cost.

    python benchmarks/grdpo_step.py            # --json for one JSON object

One group of 20 completions, the same model, completions and rewards, in one process:

    pair loop     the original: two forwards and one backward for every better/worse pair
    one pass      ours where the group fits into one micro-batch
    two passes    ours in micro-batches of a quarter of the tokens
    bare          one forward and backward of as many real tokens, without padding and without a group

Each is timed several times in turn, and the median counts. The cosine compares the pair loop's gradient with
ours.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.losses import better_worse_pairs, grdpo, sequence_logprob  # noqa: E402
from lib.policy import Policy  # noqa: E402

BETA = 1.0
PROMPT_TOKENS, COMPLETION_TOKENS = 64, (16, 48)


def make_models(seed):
    """(name, PEFT model) pairs: the tiny model, and a wider one with random weights and a real vocabulary."""
    torch.manual_seed(seed)
    wide = Qwen3Config(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    for name, model in (
        ("tiny", AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny-qwen3")),
        ("hidden 512, vocabulary 32,000", Qwen3ForCausalLM(wide)),
    ):
        peft_model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        for parameter_name, parameter in peft_model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        yield name, peft_model


def make_group(vocabulary, size, seed):
    """A group of random completions of different lengths, and their rewards."""
    rng = random.Random(seed)
    prompt = [rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]
    ids = [[rng.randrange(vocabulary) for _ in range(rng.randint(*COMPLETION_TOKENS))] for _ in range(size)]
    reward_PG = torch.tensor([[rng.random() for _ in range(size)]])
    return SimpleNamespace(prompt_ids=prompt, completion_ids=ids), reward_PG


def learn(policy, group, reward_PG):
    """Ours."""
    scored = policy.logprobs([group])
    s_PG = sequence_logprob(scored.logp_NT, scored.length_N).view_as(reward_PG)
    grdpo(s_PG, reward_PG, beta=BETA).backward()
    policy.backward(scored)


def learn_by_pairs(model, group, reward_PG):
    """The original's loop: both completions of every pair run through the model anew."""

    def mean_logprob(ids):
        logits = model(torch.tensor([group.prompt_ids + ids])).logits[0, len(group.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].mean()

    pairs = better_worse_pairs(reward_PG)[0].nonzero().tolist()
    for better, worse in pairs:
        margin = mean_logprob(group.completion_ids[better]) - mean_logprob(group.completion_ids[worse])
        (-torch.nn.functional.logsigmoid(BETA * margin) / len(pairs)).backward()


def learn_bare(model, group):
    """Forward and backward of as many real tokens in rows of equal length; logits of the completions only."""
    completion = sum(map(len, group.completion_ids)) // len(group.completion_ids)
    ids = torch.randint(0, model.config.vocab_size, (len(group.completion_ids), PROMPT_TOKENS + completion))
    causal_lm = model.get_base_model()
    hidden = causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[
        :, PROMPT_TOKENS - 1 : -1
    ]
    logits = causal_lm.get_output_embeddings()(hidden)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten()).backward()


def take_gradient(model):
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


def measure(model, group, reward_PG, *, repeats):
    """Median seconds of each way, their ratios, and the cosine of the gradients."""
    tokens = sum(PROMPT_TOKENS + len(ids) for ids in group.completion_ids)
    one_pass = Policy(model, None, tokens_per_microbatch=10**9)
    two_passes = Policy(model, None, tokens_per_microbatch=tokens // 4)
    model.train()
    ways = {
        "one_pass": lambda: learn(one_pass, group, reward_PG),
        "two_passes": lambda: learn(two_passes, group, reward_PG),
        "bare": lambda: learn_bare(model, group),
    }
    seconds, gradients = {name: [] for name in (*ways, "pair_loop")}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            gradients[name] = take_gradient(model)
    started = time.perf_counter()
    learn_by_pairs(model, group, reward_PG)
    seconds["pair_loop"].append(time.perf_counter() - started)
    theirs, ours = take_gradient(model).double(), gradients["two_passes"].double()
    cosine = torch.nn.functional.cosine_similarity(theirs, ours, dim=0).item()
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return medians | {
        "speedup_one_pass": medians["pair_loop_s"] / medians["one_pass_s"],
        "speedup_two_passes": medians["pair_loop_s"] / medians["two_passes_s"],
        "one_pass_to_bare": medians["one_pass_s"] / medians["bare_s"],
        "two_passes_to_bare": medians["two_passes_s"] / medians["bare_s"],
        "cosine": cosine,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--group-size", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results = {}
    for name, model in make_models(options.seed):
        group, reward_PG = make_group(model.config.vocab_size, options.group_size, options.seed)
        results[name] = measure(model, group, reward_PG, repeats=options.repeats)
    if options.json:
        print(json.dumps(results))
        return
    table = Table(
        title=f"learn phase of one group of {options.group_size}, {torch.get_num_threads()} threads"
    )
    for column in ("", *results):
        table.add_column(column, justify="right" if column else "left")
    for key in next(iter(results.values())):
        table.add_row(
            key,
            *(
                f"{result[key]:.6f}" if key == "cosine" else f"{result[key]:.3f}"
                for result in results.values()
            ),
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
