"""The memory ledger: against real passes, against numbers by hand, and for the recipes."""

import re
import shlex
from dataclasses import replace
from math import prod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen3Config, Qwen3ForCausalLM

from lib import vocabulary
from lib.memory import GIB, Workload, fit_tokens, is_out_of_memory, measure_learning, plan_memory
from lib.memory import _build_on_meta as build_on_meta
from lib.settings import UserError, parse_arguments, read_settings
from tests.conftest import ROOT

QWEN25 = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN3 = Qwen3Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
SMALL = Qwen3Config(
    vocab_size=5000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
WORK = Workload(tokens_per_microbatch=2048, row_tokens=512, group_size=4, gradient_checkpointing=True)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_layers_and_three_tell_the_rest(checkpointing):
    work = replace(WORK, gradient_checkpointing=checkpointing)
    (peak,) = plan_memory(SMALL, work, dtype=torch.bfloat16).learning.values()
    whole = measure_learning(build_on_meta(SMALL, work, torch.bfloat16), 4, 512)
    assert peak == pytest.approx(whole, rel=0.005)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_dry_run_counts_what_a_real_pass_takes(monkeypatch, checkpointing):
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 2**20)
    work = replace(WORK, gradient_checkpointing=checkpointing)
    dry = measure_learning(build_on_meta(SMALL, work, torch.float32), 4, 512)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM(SMALL), lora)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Attention on the CPU spreads keys and values to all heads; on a card they are not copied.
    assert dry <= measure_learning(model, 4, 512) <= 1.12 * dry


def test_weights_and_optimizer_by_hand():
    ledger = plan_memory(QWEN25, WORK, dtype=torch.bfloat16)
    assert ledger.held["weights"] == 2 * 1_543_714_304  # as its model card counts them
    widths = 2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    assert ledger.held["adapter"] == 4 * 28 * 16 * widths
    assert ledger.held["optimizer"] == 2 * ledger.held["adapter"]
    eight_bit = plan_memory(QWEN25, replace(WORK, optimizer="adamw_8bit"), dtype=torch.bfloat16)
    assert 3.9 < ledger.held["optimizer"] / eight_bit.held["optimizer"] < 4
    (sampled,) = ledger.sampling.values()
    assert sampled == 1024 * (512 * 2 * 28 * 2 * 128 * 2 + 40 * 151936)


def test_four_bits_and_whole_modules():
    plain = plan_memory(SMALL, WORK, dtype=torch.bfloat16).held
    packed = plan_memory(SMALL, replace(WORK, load_in_4bit=True), dtype=torch.bfloat16).held
    embedding = 2 * 5000 * 64
    assert 3 < (plain["weights"] - embedding) / (packed["weights"] - embedding) < 4
    whole = plan_memory(SMALL, replace(WORK, modules_to_save="norm"), dtype=torch.bfloat16).held
    assert whole["adapter"] - plain["adapter"] == 2 * (64 + 6 * (2 * 16 + 2 * 64)), "every norm"


def test_learning_is_flat_in_the_vocabulary():
    sizes = []
    for vocabulary_size in (1_000, 10_000, 100_000):
        config = replace_vocabulary(SMALL, vocabulary_size)
        model = build_on_meta(config, WORK, torch.float32)
        sizes.append(measure_learning(model, 16, 512))
    logits = 16 * 512 * 100_000 * 4
    assert max(sizes) < 1.02 * min(sizes) + 3 * vocabulary.CHUNK_BYTES < logits / 2


def replace_vocabulary(config, size):
    return type(config)(**config.to_dict() | {"vocab_size": size})


def test_the_budget_that_fits_is_the_largest():
    work, card = replace(WORK, gradient_checkpointing=False, row_tokens=1512), 16 * GIB
    tokens = fit_tokens(QWEN25, work, dtype=torch.bfloat16, card=card)
    for rows, fits in ((0, True), (2, False)):
        one = replace(work, tokens_per_microbatch=tokens + rows * 1512)
        assert plan_memory(QWEN25, one, dtype=torch.bfloat16, card=card).fits == fits


def test_a_card_that_is_too_small_is_one_line():
    with pytest.raises(UserError, match="does not fit its card") as caught:
        fit_tokens(QWEN3, WORK, dtype=torch.bfloat16, card=3 * GIB)
    assert "3.20 GiB  weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_completions_are_decoded_at_once_where_the_card_is_small():
    rows = [
        plan_memory(QWEN3, WORK, dtype=torch.bfloat16, card=card and card * GIB).sampled_rows
        for card in (None, 80, 16, 4)
    ]
    assert rows[:2] == [1024, 1024]
    assert 4 < rows[2] < 1024
    assert rows[3] == 4, "a group"


def test_a_dry_run_draws_nothing():
    state = torch.get_rng_state()
    plan_memory(SMALL, WORK, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_about_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    ("recipe", "config", "card"),
    [
        ("grdpo_qwen2.5-1.5b_4090", QWEN25, 23.5),
        ("grdpo_qwen3-1.7b_5060ti", QWEN3, 15.5),
        ("adpo_qwen3-1.7b_4090", QWEN3, 23.5),
        ("adagrpo_qwen3-1.7b_5060ti", QWEN3, 15.5),
    ],
)
def test_a_recipe_fits_its_card_and_says_its_peak(recipe, config, card):
    text = (ROOT / "recipes" / f"{recipe}.args").read_text()
    said = re.search(r"peak (\d+\.\d) GiB of (\d+\.\d), while (\w+)", text)
    assert said, "the recipe says its peak"
    words = [word for line in text.splitlines() for word in shlex.split(line, comments=True)]
    known = read_settings((ROOT / f"train_{recipe.partition('_')[0]}.py").read_text())
    values = parse_arguments(known, words, prog="", description="")
    work = Workload(
        tokens_per_microbatch=values["TOKENS_PER_MICROBATCH"],
        row_tokens=values["MAX_PROMPT_TOKENS"] + values["MAX_NEW_TOKENS"],
        group_size=values["GROUP_SIZE"],
        lora_rank=values["LORA_RANK"],
        lora_targets=values["LORA_TARGETS"],
        optimizer=values["OPTIMIZER"],
        gradient_checkpointing=values["GRADIENT_CHECKPOINTING"],
        sampler_memory=values["SAMPLER_MEMORY"],
    )
    ledger = plan_memory(config, work, dtype=torch.bfloat16, card=int(card * GIB))
    assert ledger.fits
    heavier = "learning" if sum(ledger.learning.values()) > sum(ledger.sampling.values()) else "sampling"
    assert said.groups() == (f"{ledger.peak_gib:.1f}", f"{card}", heavier)
    # what the sampler has beside a second copy of the weights holds four completions of full length; where
    # there are more of them, vLLM lets them wait
    cache = int(0.9 * float(said[2]) * GIB * work.sampler_memory) - ledger.held["weights"] - GIB
    per_token = prod((2, 2, config.num_hidden_layers, config.num_key_value_heads, 128))
    assert cache > per_token * work.row_tokens * 4
