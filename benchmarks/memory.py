"""Peak memory of log-probabilities and their gradient: full logits against ours, by length and vocabulary.

    python benchmarks/memory.py            # --json for one JSON object

One completion goes through a model of one narrow layer, forward and backward, so that what is measured is the
vocabulary's share. Each measurement is a process of its own: on a CPU the peak of its resident memory, on a
card that of the allocator, above what the model took before. Full logits are measured as far as they fit.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 151_936  # of Qwen2.5 and Qwen3
FULL_COPIES = 5  # float32 logits that the full way may hold at once: it is left out where they do not fit


def measure(way, tokens, vocabulary):
    """Peak GiB above the model, in this process; run it in a fresh one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lib.policy import Policy

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=tokens + 1,
        tie_word_embeddings=True,
    )
    on_card = torch.cuda.is_available()
    model = Qwen3ForCausalLM(config).to("cuda" if on_card else "cpu", torch.bfloat16 if on_card else None)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()
    policy = Policy(model, None, tokens_per_microbatch=tokens + 1)

    def learn(completion):
        if way == "ours":
            scored = policy.logprobs([SimpleNamespace(prompt_ids=[0], completion_ids=[completion])])
            scored.logp_NT.sum().backward()
            policy.backward(scored)
        else:
            ids = torch.tensor([[0, *completion]], device=policy.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().backward()

    learn([1] * 8)  # libraries take their own memory at the first call
    before = torch.cuda.memory_allocated() if on_card else read_resident("VmRSS")
    learn([1] * tokens)
    after = torch.cuda.max_memory_allocated() if on_card else read_resident("VmHWM")
    return (after - before) / 2**30


def read_resident(name):
    """Resident bytes of this process: now (VmRSS), or at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def free_bytes():
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def measure_apart(way, tokens, vocabulary):
    """`measure` in a process of its own; None where full logits would not fit."""
    if way == "full" and FULL_COPIES * 4 * tokens * vocabulary > free_bytes():
        return None
    command = [sys.executable, __file__, "--measure", way, str(tokens), str(vocabulary)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, VOCABULARY, 262_144])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, tokens, vocabulary = options.measure
        print(measure(way, int(tokens), int(vocabulary)))
        return
    middle, longest = options.vocabularies[len(options.vocabularies) // 2], options.tokens[-1]
    cases = [(tokens, middle) for tokens in options.tokens]
    cases += [(longest, vocabulary) for vocabulary in options.vocabularies if vocabulary != middle]
    rows = [
        {"tokens": tokens, "vocabulary": vocabulary}
        | {f"{way}_gib": measure_apart(way, tokens, vocabulary) for way in ("full", "ours")}
        for tokens, vocabulary in cases
    ]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    table = Table(title="peak memory of log-probabilities and gradient, above the model [GiB]")
    for column in ("tokens", "vocabulary", "full logits", "ours"):
        table.add_column(column, justify="right")
    for row in rows:
        full = "does not fit" if row["full_gib"] is None else f"{row['full_gib']:.2f}"
        table.add_row(f"{row['tokens']:,}", f"{row['vocabulary']:,}", full, f"{row['ours_gib']:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
