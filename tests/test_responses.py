"""Every file format that answers come in, and what must not be taken for an answer."""

import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from lib.prompts import build_messages, extract_answer
from lib.responses import read_responses, split_paths
from lib.settings import UserError

PROBLEM = "What is the sum of 2 and 3, if you please?"
ASKED = build_messages(PROBLEM, "answer_tag")[-1]["content"]
GRDPO = {"problem": PROBLEM, "answer": "5", "generations": ["so <answer>5</answer>", "<answer>6</answer>"]}
VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": ASKED}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 7, "tier": "easy", "problem": PROBLEM},
    "responses": ["so <answer>5</answer>", "<answer>6</answer>"],
}
ADAGRPO = [
    {"instruction": PROBLEM, "output": "5", "predict_reason": "hm", "predict_content": "<answer>5</answer>"},
    {"instruction": PROBLEM, "output": "5", "predict_reason": "", "predict_content": "<answer>6</answer>"},
]


def write(path, value):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(value), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    elif path.suffix == ".lzma":
        path.write_bytes(lzma.compress(json.dumps(value).encode(), format=lzma.FORMAT_ALONE))
    else:
        path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grdpo.json", [GRDPO]),
        ("grdpo.jsonl", [GRDPO]),
        ("one.json", GRDPO),
        ("tiers.json", {"easy": [GRDPO]}),
        ("columns.json", {key: [value] for key, value in GRDPO.items()}),
        ("frame.json", {key: {"0": value} for key, value in GRDPO.items()}),
        ("verl.parquet", [VERL]),
        ("verl.jsonl", [VERL]),
        ("ada.json", ADAGRPO),
        ("ada.jsonl", ADAGRPO),
        ("ada.json.lzma", ADAGRPO),
    ],
)
def test_every_format_holds_the_same_answers(tmp_path, name, value):
    answered, style = read_responses(write(tmp_path / name, value))
    assert [one.problem.answer for one in answered] == ["5"]
    assert [extract_answer(text, style) for text in answered[0].completions] == ["5", "6"]
    assert style == "answer_tag"
    assert answered[0].problem.tier == ("easy" if "tier" in name or "verl" in name else "")
    if "ada" in name:
        assert answered[0].completions[0] == "<think>hm</think><answer>5</answer>"


def test_our_own_folder_says_its_style_and_lengths(tmp_path):
    row = VERL | {"response_tokens": [4, 3], "finish_reasons": ["stop", "length"]}
    table = pyarrow.Table.from_pylist([row]).replace_schema_metadata({"prompt": "think_answer"})
    pyarrow.parquet.write_table(table, tmp_path / "responses.parquet")
    answered, style = read_responses(tmp_path)
    assert style == "think_answer"
    assert answered[0].tokens == [4, 3]
    assert answered[0].finish_reasons == ["stop", "length"]
    assert answered[0].problem.problem == PROBLEM
    assert answered[0].problem.source == "math"


HEAD, TAIL = (
    "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize(
    ("generation", "kept"),
    [
        (ASKED + "\nIt is five.", "\nIt is five."),
        ("\n" + ASKED + "<answer>5</answer>", "<answer>5</answer>"),
        (HEAD + ASKED + TAIL + "five", "\nfive"),
        ("system\nBe good.\nuser\n" + ASKED + "\nassistant\nfive", "\nfive"),
        ("It is <answer>5</answer>. " + ASKED, "It is <answer>5</answer>. " + ASKED),
        ("Example: <answer>5</answer>", "Example: <answer>5</answer>"),
        ("<answer>5</answer><|im_end|>\n<|endoftext|><|endoftext|>", "<answer>5</answer>"),
        (PROBLEM + " five", " five"),
        ("", ""),
    ],
)
def test_a_prompt_before_the_answer_is_stripped_else_it_is_taken_whole(tmp_path, generation, kept):
    file = write(tmp_path / "r.json", [GRDPO | {"generations": [generation]}])
    assert read_responses(file)[0][0].completions == [kept]


def test_the_example_of_another_prompt_in_the_file_is_no_answer(tmp_path):
    prompt = "Answer like <answer>42</answer>. " + PROBLEM
    file = write(tmp_path / "r.jsonl", [GRDPO | {"prompt": prompt, "generations": [prompt + " Five."]}])
    answered, style = read_responses(file)
    assert extract_answer(answered[0].completions[0], style) is None


def test_a_short_problem_is_no_prompt(tmp_path):
    file = write(tmp_path / "r.json", [{"problem": "2", "answer": "25", "generations": ["25"]}])
    assert read_responses(file)[0][0].completions == ["25"]


@pytest.mark.parametrize(
    ("texts", "style"),
    [
        ([r"\boxed{5}", "five"], "boxed"),
        (["<answer>5</answer>", "five"], "answer_tag"),
        (["<think>a</think><answer>5</answer>"] * 2, "think_answer"),
        (["five"], "answer_tag"),
    ],
)
def test_the_style_is_that_of_the_answers(tmp_path, texts, style):
    file = write(tmp_path / "r.json", [GRDPO | {"generations": texts}])
    assert read_responses(file)[1] == style
    assert read_responses(file, style="boxed")[1] == "boxed"


def test_columns_can_be_named(tmp_path):
    row = {"q": PROBLEM, "meta": {"gold": 5}, "texts": ["5"], "level": "hard", "answer": "no", "from": "here"}
    columns = {"problem": "q", "answer": "meta.gold", "responses": "texts", "tier": "level", "source": "from"}
    (one,), _ = read_responses(write(tmp_path / "r.json", [row]), columns=columns)
    assert (one.problem.problem, one.problem.answer) == (PROBLEM, "5")
    assert (one.problem.tier, one.problem.source) == ("hard", "here")
    with pytest.raises(UserError, match="row 1: field nope: missing; the row has q, meta"):
        read_responses(tmp_path / "r.json", columns=columns | {"problem": "nope"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no rows"),
        ("{}", "holds no rows"),
        ("[3]", "row 1: not a JSON object"),
        ('{"problem": "x"}', "row 1: field answer: missing"),
        ('[{"problem": "x", "answer": "", "generations": ["a"]}]', "field answer: must be a text"),
        ('[{"problem": "x", "answer": "1", "generations": []}]', "field responses: must be a text or a list"),
        (
            '[{"problem": "x", "answer": "1", "generations": [3]}]',
            "field responses: must be a text or a list",
        ),
        ('{"a": 1}\nno json', "line 2: neither JSON nor JSONL"),
        ("\xff", "cannot be read"),
    ],
)
def test_mistakes_name_file_row_and_field(tmp_path, text, message):
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        read_responses(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_responses(tmp_path)
    for name in ("r.parquet", "r.json.xz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(UserError, match=name):
            read_responses(tmp_path / name)


def test_several_files_in_one_setting(tmp_path):
    assert split_paths("a.json, b c.json") == ["a.json", "b c.json"]
    assert split_paths("a.json b.json") == ["a.json", "b.json"]
    (tmp_path / "a, b.json").touch()
    assert split_paths(str(tmp_path / "a, b.json")) == [str(tmp_path / "a, b.json")]
    assert split_paths("") == []
