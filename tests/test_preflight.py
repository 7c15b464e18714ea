"""Preflight: what it says about good and bad runs, and that it leaves no trace."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lib import preflight
from lib.batches import Problem
from lib.memory import GIB, Workload
from lib.models import load_trainable, locate_model
from lib.policy import Policy
from lib.preflight import (
    check_versions,
    judge_samples,
    look_ahead,
    look_at_prompt,
    probe_learning,
    read_tested_versions,
)
from lib.prompts import encode_prompt, render_prompt
from lib.rewards import grade_groups, parse_rewards, score_groups
from lib.sampler import Group
from lib.settings import UserError
from tests.conftest import ROOT, TINY

WORK = Workload(tokens_per_microbatch=512, row_tokens=128, group_size=4)


def add_distribution(folder, name, version, *needs):
    """What pip leaves behind for an installed package."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (place / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {need}" for need in needs]) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A place in front of the installed packages: `installed(name, version, *needs)`."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *what: add_distribution(tmp_path, *what)


def test_the_tested_set_is_what_the_requirements_pin():
    tested = read_tested_versions()
    assert {"torch", "transformers", "peft", "math-verify", "vllm", "unsloth", "bitsandbytes"} <= set(tested)
    assert all(version[0].isdigit() for version in tested.values())


def test_a_version_that_was_not_tested_is_a_note_with_the_fix(installed):
    before = check_versions()
    installed("peft", "0.19.0")
    fix = f"pip install peft=={read_tested_versions()['peft']}"
    assert [line for line in check_versions() if line not in before] == [
        f"peft 0.19.0 is not the tested {read_tested_versions()['peft']}: {fix}"
    ]


@pytest.mark.parametrize(
    ("engine", "need", "have", "message"),
    [
        ("unsloth", "transformers!=5.10.0,<=5.17.0", ("transformers", "5.18.1"), "not 5.18.1: pip install"),
        ("unsloth", 'trl<=1.15.0; extra == "all"', ("trl", "1.16.0"), None),
        ("vllm", "torch==2.13.0", ("torch", "2.14.0"), "vllm 1.0 needs torch==2.13.0, not 2.14.0"),
        ("vllm", "torch==2.13.0", ("torch", "2.13.0+cpu"), None),
    ],
)
def test_an_engine_that_needs_another_version_stops_the_run_that_uses_it(
    installed, engine, need, have, message
):
    installed(engine, "1.0", need)
    installed(*have)
    check_versions()  # not in use: no reason to stop
    if message is None:
        check_versions([engine])
    else:
        with pytest.raises(UserError, match=message):
            check_versions([engine])


def test_torchvision_for_cuda_beside_a_cpu_torch_is_a_known_break(installed):
    installed("torch", "2.13.0+cpu")
    installed("torchvision", "0.28.0")
    with pytest.raises(UserError, match="pip uninstall -y torchvision"):
        check_versions()


def test_the_short_form_says_device_and_memory_and_draws_nothing(capsys):
    state = torch.get_rng_state()
    ledger = look_ahead(locate_model(TINY), WORK)
    text = capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert f"memory  peak about {ledger.peak_gib:.2f} GiB" in text
    assert f"CPU, {torch.get_num_threads()} threads" in text


def test_a_card_that_is_too_small_is_known_before_loading(monkeypatch, capsys):
    """The card's own questions are answered for it; the arithmetic is real."""
    place = locate_model(TINY)
    card = {"name": "Toy", "memory": (int(0.95 * GIB), GIB)}
    monkeypatch.setattr(preflight, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card["name"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: card["memory"])
    look_ahead(place, WORK)
    assert "Toy, 0.95 of 1.00 GiB free" in capsys.readouterr().out
    look_ahead(place, Workload(tokens_per_microbatch=65536, row_tokens=128, group_size=4))
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: --tokens-per-microbatch 65536 is too much: ")
    assert 128 <= int(note.split()[-3]) < 65536
    card["memory"] = (GIB // 2, GIB)
    with pytest.raises(UserError, match="does not fit its card even with one completion"):
        look_ahead(place, WORK)


def test_a_probe_leaves_no_trace(tiny_tokenizer, capsys):
    place = locate_model(TINY)
    policy = Policy(load_trainable(place, "all-linear", rank=4, alpha=8.0, seed=1), tiny_tokenizer, 512)
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable.items()}
    state = torch.get_rng_state()
    probe_learning(policy, WORK, only_on_card=True)
    assert capsys.readouterr().out == ""
    probe_learning(policy, WORK)
    assert "8 x 128 tokens forward and backward" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.trainable.items())


def make_groups(texts, grader, *, answers=("4", "9"), reasons=None, style="answer_tag"):
    """Two scored and graded groups."""
    groups = []
    for number, (answer, some) in enumerate(zip(answers, texts, strict=True)):
        problem = Problem(str(number), "2 + 2?", answer)
        ids = [[1] * len(text.split()) for text in some]
        ends = reasons or ["stop"] * len(some)
        groups.append(Group(problem, "2 + 2?", [1, 2], ids, list(some), ends, [[0.0]] * len(some)))
    score_groups(
        parse_rewards("correctness:1", style=style, grader=grader),
        grade_groups(groups, style=style, grader=grader),
    )
    return groups


GOOD = [["so <answer>4</answer>", "hm <answer>5</answer>"] * 2, ["well <answer>9</answer>", "no idea"] * 2]


def test_good_samples_need_no_change(grader, capsys):
    assert judge_samples(make_groups(GOOD, grader), style="answer_tag") == []
    text = capsys.readouterr().out
    assert "samples 8: clipped 0%, answered in the style 75%, of these readable 100%, right 50%" in text
    assert "groups to learn from 88%" in text  # 1 - 2 / 2^4
    assert "reward  0: 4, 1: 4" in text


@pytest.mark.parametrize(
    ("changes", "texts", "expected"),
    [
        ({"reasons": ["length"] * 4}, GOOD, ["--max-new-tokens 4: 100% of the completions are cut off at 2"]),
        ({"style": "boxed"}, GOOD, ["--prompt: 0 of 8 completions", "--train-data with easier problems"]),
        ({}, [["<answer>4</answer>"] * 4, ["<answer>9</answer>"] * 4], ["--train-data with harder problems"]),
        ({}, [["<answer>what?!</answer>", *GOOD[0][:3]], *GOOD[1:]], ["--prompt: 17% of the answers"]),
    ],
)
def test_bad_samples_say_what_to_change(grader, monkeypatch, changes, texts, expected):
    monkeypatch.setattr(preflight, "TOO_UNREADABLE", 0.1)
    said = judge_samples(make_groups(texts, grader, **changes), style=changes.get("style", "answer_tag"))
    assert len(said) == len(expected)
    assert all(one.startswith(start) for one, start in zip(said, expected, strict=True))


def test_a_template_that_thinks_already_does_not_fit_a_plain_prompt(tiny_tokenizer, capsys):
    prompt = render_prompt(tiny_tokenizer, "2 + 2?", "answer_tag")
    group = SimpleNamespace(prompt=prompt, prompt_ids=encode_prompt(tiny_tokenizer, "2 + 2?", "answer_tag"))
    how = {"thinking": None}
    assert look_at_prompt(tiny_tokenizer, group, [557], style="answer_tag", **how) == []
    text = capsys.readouterr().out
    assert repr(prompt[-120:]) in text
    assert "557 '<|im_end|>'" in text
    assert "the template decides (the template knows it)" in text
    assert "no end token" in look_at_prompt(tiny_tokenizer, group, [], style="answer_tag", **how)[0]
    group.prompt += "<think>\n"
    assert "--no-thinking" in look_at_prompt(tiny_tokenizer, group, [557], style="answer_tag", **how)[0]
    assert look_at_prompt(tiny_tokenizer, group, [557], style="think_answer", **how) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, ["verdict ready"]),
        (["--max-new-tokens", "5"], 1, ["--max-new-tokens 10: 100% of the completions are cut off at 5"]),
    ],
)
def test_the_whole_script_says_ready_or_what_to_change(tmp_path, words, code, said):
    words = ["--preflight", "--group-size", "6", "--output-dir", tmp_path / "run", *words]
    process = subprocess.run(
        [sys.executable, "train_grdpo.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == code, process.stdout + process.stderr
    for part in ("device", "GiB  weights", "probe", "prompt", "ends", "think", "samples 12", "reward"):
        assert part in process.stdout
    assert all(line in process.stdout for line in said)
    assert not (tmp_path / "run").exists(), "nothing is written"
