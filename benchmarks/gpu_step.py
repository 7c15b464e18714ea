"""The learn phase on a real card: the exact shapes of two models, random weights, nothing downloaded.

    python benchmarks/gpu_step.py            # --json for one JSON object
    python benchmarks/gpu_step.py --toy      # the same code on a small model, without a card

Two loads, of 5 groups x 20 completions x 1,000 tokens and of 8 completions x 8,192 tokens, under the memory
of a 24 GB and of a 16 GB card, each in a process of its own:

    ours        log-probabilities, loss, gradient, optimizer step; gradient checkpointing, 8-bit optimizer if
                there is one, a token budget that gives way
    pair loop   the original: two forwards with all logits and one backward for every better/worse pair; a few
                pairs are timed, and all of them charged

Utilisation is the share of the card's matrix rate (measured) that one forward and one backward pass through
frozen weights would need; a second forward pass and recomputed activations are not credited.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHARED = {"vocab_size": 151_936, "num_hidden_layers": 28, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
SHARED |= {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}}
MODELS = {
    "Qwen2.5-1.5B": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768, **SHARED},
    "Qwen3-1.7B": {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40_960, **SHARED},
}
TOY = {"vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LOADS, TOY_LOADS = [(5, 20, 1000), (1, 8, 8192)], [(2, 4, 16), (1, 4, 64)]  # groups, completions, tokens
CAPS = (24, 16)  # GiB
PROMPT_TOKENS, TIMED_PAIRS = 100, 4
BUDGET, RANK = 16_384, 16


def build(name, toy):
    """(model with LoRA, device), weights drawn on the device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(**(MODELS[name] | (TOY if toy else {})))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model, device


def make_groups(groups, completions, tokens, *, vocabulary):
    """Groups of random completions, all as long as they may be: the worst case; and their rewards."""
    import torch

    draw = random.Random(0)

    def ids(count):
        return [draw.randrange(vocabulary) for _ in range(count)]

    made = [
        SimpleNamespace(
            prompt_ids=ids(PROMPT_TOKENS), completion_ids=[ids(tokens) for _ in range(completions)]
        )
        for _ in range(groups)
    ]
    return made, torch.tensor([[draw.random() for _ in range(completions)] for _ in range(groups)])


def learn(policy, groups, reward_PG):
    """One step of ours."""
    from lib.losses import grdpo, sequence_logprob

    scored = policy.logprobs(groups)
    s_PG = sequence_logprob(scored.logp_NT, scored.length_N).view_as(reward_PG)
    grdpo(s_PG, reward_PG, beta=0.15).backward()
    policy.backward(scored)
    policy.step(1e-5, max_grad_norm=1.0)


def learn_pairs(model, group, pairs):
    """Some pairs of the original's loop."""
    import torch

    def mean_logprob(ids):
        start = len(group.prompt_ids)
        logits = model(torch.tensor([group.prompt_ids + ids], device=model.device)).logits[0, start - 1 : -1]
        chosen = torch.tensor(ids, device=model.device)[:, None]
        return logits.float().log_softmax(-1).gather(1, chosen).mean()

    for better, worse in pairs:
        margin = mean_logprob(group.completion_ids[better]) - mean_logprob(group.completion_ids[worse])
        (-torch.nn.functional.logsigmoid(0.15 * margin) / len(pairs)).backward()


def measure_matrix_rate(device, dtype, size):
    """Floating-point operations per second of a large square product [1/s]."""
    import torch

    a = torch.randn(size, size, device=device, dtype=dtype)
    for repeats in (2, 10):  # the first time to warm up
        wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ a
        wait(device)
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def wait(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def count_flops(model, groups):
    """Operations of one forward and one backward pass to the activations, attention included."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    weights += config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    rows = [len(g.prompt_ids) + len(ids) for g in groups for ids in g.completion_ids]
    # scores and their product with the values: 2 * 2 * L^2 * width / 2 forward (causal), twice that backward
    return sum(4 * weights * n + 6 * config.num_hidden_layers * width * n**2 for n in rows)


def measure(name, load, *, cap, way, toy):
    """One cell of the table, in this process; run it in a fresh one."""
    import torch

    from lib.losses import better_worse_pairs
    from lib.memory import is_out_of_memory
    from lib.policy import Policy, peak_memory_gib
    from lib.settings import UserError

    model, device = build(name, toy)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
    groups, reward_PG = make_groups(*load, vocabulary=model.config.vocab_size)
    reward_PG = reward_PG.to(device)
    tokens = sum(len(g.prompt_ids) + len(ids) for g in groups for ids in g.completion_ids)
    budget = BUDGET if not toy else tokens // 3
    policy = Policy(model, None, budget, gradient_checkpointing=way == "ours")
    policy.start_optimizer(
        "adamw_8bit" if find_spec("bitsandbytes") and not toy else "adamw", weight_decay=0.0
    )
    model.train()
    pairs = better_worse_pairs(reward_PG).nonzero().tolist()
    timed = [(i, j) for p, i, j in pairs if p == 0][:TIMED_PAIRS]
    seconds = []
    try:
        for _ in range(2):  # the first time to warm up, and to find the token budget
            wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            learn(policy, groups, reward_PG) if way == "ours" else learn_pairs(model, groups[0], timed)
            wait(device)
            seconds.append(time.perf_counter() - started)
    except (RuntimeError, UserError) as error:
        if not (isinstance(error, UserError) or is_out_of_memory(error)):
            raise
        return {"seconds": None, "peak_gib": None}
    elapsed = seconds[-1] if way == "ours" else seconds[-1] / len(timed) * len(pairs)
    peak = peak_memory_gib(device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    rate = measure_matrix_rate(device, next(model.parameters()).dtype, 512 if toy else 8192)
    return {
        "seconds": elapsed,
        "tokens_per_s": tokens / elapsed,
        "utilisation": count_flops(model, groups) / elapsed / rate,
        "peak_gib": peak,
        "token_budget": policy.token_budget if way == "ours" else None,
    }


def measure_apart(name, load, *, cap, way, toy):
    """`measure` in a process of its own, or of a toy, which measures no memory, in this one."""
    if toy:
        return measure(name, load, cap=cap, way=way, toy=toy)
    spec = json.dumps({"name": name, "load": load, "cap": cap, "way": way, "toy": toy})
    process = subprocess.run(
        [sys.executable, __file__, "--measure", spec], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return json.loads(process.stdout.splitlines()[-1])


def describe_card():
    """The card's name, found out by a process that leaves no memory behind on it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--toy", action="store_true", help="a small model, without caps")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        spec = json.loads(options.measure)
        print(json.dumps(measure(spec.pop("name"), spec.pop("load"), **spec)))
        return
    card = "CPU" if options.toy else describe_card()
    if card == "CPU" and not options.toy:
        parser.error("no CUDA card here: --toy runs the same code on a small model")
    rows = [
        {"model": name, "load": f"{load[0]} x {load[1]} x {load[2]:,}", "cap_gib": cap, "way": way}
        | measure_apart(name, load, cap=cap, way=way, toy=options.toy)
        for name in MODELS
        for load in (TOY_LOADS if options.toy else LOADS)
        for cap in (CAPS[:1] if options.toy else CAPS)
        for way in ("ours", "pair loop")
    ]
    if options.json:
        print(json.dumps({"card": card, "rows": rows}))
        return
    table = Table(title=f"learn phase on {card}")
    heads = ("model", "groups x completions x tokens", "cap [GiB]", "way", "peak [GiB]", "s", "tokens/s")
    for column in (*heads, "utilisation", "token budget"):
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    for row in rows:
        cells = [row["model"], row["load"], str(row["cap_gib"]), row["way"]]
        if row["seconds"] is None:
            table.add_row(*cells, "out of memory")
            continue
        numbers = (f"{row['peak_gib']:.2f}", f"{row['seconds']:.1f}", f"{row['tokens_per_s']:,.0f}")
        table.add_row(*cells, *numbers, f"{row['utilisation']:.0%}", str(row["token_budget"] or ""))
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    main()
