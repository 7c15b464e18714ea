"""Which package trains and which samples; what is said where one is missing."""

import importlib.util
import subprocess
import sys

import pytest

from lib.engines import Engines, choose_engines
from lib.settings import UserError
from tests.conftest import ROOT

absent = {name: importlib.util.find_spec(name) is None for name in ("unsloth", "vllm", "bitsandbytes")}


def run(script, *words):
    command = [sys.executable, script, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_a_card_the_plain_engines_run():
    assert choose_engines() == Engines("peft", "transformers", shared=False)


@pytest.mark.parametrize("words", [("--engine", "unslot"), ("--sampler", "sglang")])
def test_an_unknown_engine_is_named(words):
    ended = run("train_grdpo.py", *words)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert all(word in ended.stderr for word in words)


@pytest.mark.parametrize(("option", "name"), [("--engine", "unsloth"), ("--sampler", "vllm")])
def test_a_missing_engine_says_how_to_install_it(option, name):
    if not absent[name]:
        pytest.skip(f"{name} is installed here")
    ended = run("train_adpo.py", option, name)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"{option} {name}: not installed; pip install -r requirements-gpu.txt" in ended.stderr


def test_a_broken_engine_says_what_broke(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="installed, but does not import: operator torchvision::nms"):
        choose_engines("peft", "vllm")


def test_unsloth_is_not_imported_too_late(tmp_path, monkeypatch):
    """It would leave transformers as it is, and say so in a line that scrolls away."""
    import transformers  # noqa: F401

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(RuntimeError, match="unsloth must be imported before"):
        choose_engines("unsloth", "transformers")


def test_scripts_import_neither_transformers_nor_peft():
    code = "import sys, train_grdpo, train_adpo; print({'transformers', 'peft'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_four_bits_need_bitsandbytes(tmp_path):
    if not absent["bitsandbytes"]:
        pytest.skip("bitsandbytes is installed here")
    ended = run("train_grdpo.py", "--load-in-4bit", "--output-dir", tmp_path / "run", "--report-to", "none")
    assert ended.returncode == 2
    assert "--load-in-4bit: not installed; pip install bitsandbytes" in ended.stderr
