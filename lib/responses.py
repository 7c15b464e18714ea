"""Saved answers of anybody's model: the file formats they come in, made one.

Read are (`read_responses`)

    our own folders            responses.parquet: verl's columns, `responses`, token counts, finish reasons
    verl's generation          parquet with `prompt`, `reward_model` and `responses`
    the GRDPO repository's     a JSON list of `problem`, `answer`, `generations`; JSONL of the same fields
    adaGRPO's rows             `instruction`, `output`, `predict_content`, `predict_reason`

JSON may be a list of rows, one row a line, a dict of columns, or a dict of lists by tier, plain or .lzma or
.xz. Rows with one answer each about the same problem are put together. Other column names can be given.
"""

import json
import lzma
from dataclasses import dataclass, field

from lib.batches import Problem
from lib.prompts import PROMPT_STYLES, build_messages, extract_answer, strip_prompt
from lib.settings import UserError, find_path

# Where each thing is looked for, the first that a row has; a dot goes into a nested column.
COLUMNS = {
    "problem": ("problem", "extra_info.problem", "question", "instruction", "prompt"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth", "output"),
    "responses": ("responses", "generations", "completions", "response", "completion", "predict_content"),
    "tier": ("tier", "extra_info.tier"),
    "source": ("data_source", "source"),
}
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<eos>")
_TEMPLATE_STARTS = (
    "<|",
    "<s>",
    "<bos>",
    "<start_of_turn>",
    "[INST]",
    "system\n",
    "user\n",
    "User:",
    "Human:",
)


@dataclass
class Answered:
    """A problem and the answers to it, one entry per sample in each list."""

    problem: Problem
    completions: list
    tokens: list | None = None  # lengths where the file says them
    finish_reasons: list | None = None
    grades: list = field(default_factory=list)


def read_responses(path, *, columns=None, style=None):
    """(list of `Answered`, name of the prompt style) of a file or evaluation folder.

    columns   names that override `COLUMNS`, by what they hold; None entries do not
    style     prompt style the answers are written in; None takes what the file says, else the one whose
              prompt or answers are in it
    UserError names the file, the row (counted from 1) and the field.
    """
    file = find_path(path)
    file = file / "responses.parquet" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"no responses: {file} is not there")
    rows, said = _read_table(file)
    wanted = {kind: name for kind, name in (columns or {}).items() if name}
    answered, merged, raw = [], {}, []
    for number, row in enumerate(rows, start=1):
        one, is_single = _read_row(row, wanted, number=number, file=file)
        prompts = _list_prompts(row, one.problem.problem)
        raw += [prompts[0], one.completions[0][:2000]] if len(raw) < 40 else []
        one.completions = [_clean(text, prompts) for text in one.completions]
        key = (one.problem.problem, one.problem.answer)
        if is_single and key in merged:
            _append(merged[key], one)
        else:
            answered.append(one)
            merged |= {key: one} if is_single else {}
    if not answered:
        raise UserError(f"{file} has no rows")
    return answered, style or said or _guess_style(answered, raw)


def split_paths(text):
    """The files a setting names: itself where it exists, else its parts between commas or blanks."""
    if text and find_path(text).exists():
        return [text]
    return [path.strip() for path in (text.split(",") if "," in text else text.split()) if path.strip()]


def _read_table(file):
    """(rows, prompt style that the file names or None)."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is not a parquet file: {error}") from None
        said = (table.schema.metadata or {}).get(b"prompt", b"").decode()
        return table.to_pylist(), said if said in PROMPT_STYLES else None
    try:
        with (lzma.open if file.suffix in (".lzma", ".xz") else open)(file, "rb") as opened:
            text = opened.read().decode()
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _read_lines(text, file), None
    return _rows_of_json(value, file), None


def _read_lines(text, file):
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: neither JSON nor JSONL ({error.msg})") from None
    return rows


def _rows_of_json(value, file):
    """The rows of a JSON value: a list of them, one, lists by tier, or columns."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file} holds no rows")
    parts = list(value.values())
    if all(isinstance(part, list) and part and isinstance(part[0], dict) for part in parts):
        return [{"tier": tier} | row for tier, rows in value.items() for row in rows]
    if all(isinstance(part, dict) for part in parts):
        parts = [list(part.values()) for part in parts]
    elif not all(isinstance(part, list) for part in parts) or len(set(map(len, parts))) > 1:
        return [value]
    return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]


def _look(row, name):
    """The value at a dotted name, or None."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _read_row(row, wanted, *, number, file):
    """(`Answered`, does the row hold one answer only) of one row."""

    def reject(kind, reason):
        raise UserError(f"{file}, row {number}: field {wanted.get(kind, kind)}: {reason}")

    if not isinstance(row, dict):
        raise UserError(f"{file}, row {number}: not a JSON object")
    found = {}
    for kind, usual in COLUMNS.items():
        names = (wanted[kind],) if kind in wanted else usual
        found[kind] = next((value for name in names if (value := _look(row, name)) is not None), None)
        if found[kind] is None and (kind in wanted or kind not in ("tier", "source")):
            reject(
                kind, f"missing; the row has {', '.join(row) or 'nothing'} (--{kind}-column names another)"
            )
    texts, answer = found["responses"], found["answer"]
    is_single = isinstance(texts, str)
    texts = [texts] if is_single else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        reject("responses", "must be a text or a list of texts that is not empty")
    reasons = row.get("predict_reason") if "responses" not in wanted else None
    if reasons:
        reasons = [reasons] if isinstance(reasons, str) else reasons
        texts = [f"<think>{why}</think>{text}" for why, text in zip(reasons, texts, strict=True)]
    if isinstance(answer, (list, dict)) or not str(answer).strip():
        reject("answer", f"must be a text that is not empty, not {answer!r}")
    asked = _message_text(found["problem"])
    if not asked.strip():
        reject("problem", "must be a text that is not empty")
    problem = Problem(str(number - 1), asked, str(answer).strip(), found["tier"] or "", found["source"] or "")
    told = (_per_sample(row, name, len(texts)) for name in ("response_tokens", "finish_reasons"))
    return Answered(problem, texts, *told), is_single


def _per_sample(row, name, count):
    values = row.get(name)
    return values if isinstance(values, list) and len(values) == count else None


def _append(one, other):
    """Put the samples of `other` behind those of `one`."""
    for name in ("completions", "tokens", "finish_reasons"):
        mine, more = getattr(one, name), getattr(other, name)
        setattr(one, name, None if mine is None or more is None else mine + more)


def _message_text(value):
    """A prompt as text: as it is, or the last user message of a conversation."""
    if isinstance(value, list):
        texts = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = texts[-1] if texts else ""
    return value if isinstance(value, str) else ""


def _list_prompts(row, problem):
    """The texts a completion may begin with, because some tools save the prompt with it."""
    messages = [build_messages(problem, style)[-1]["content"] for style in PROMPT_STYLES]
    bare = problem if len(problem) >= 20 else ""  # a short one may well be how an answer begins
    return [text.strip() for text in (_message_text(row.get("prompt")), *messages, bare)]


def _clean(text, prompts):
    """A completion without the prompt before it and the end tokens behind it."""
    body = text.lstrip()
    for prompt in filter(None, prompts):
        if body.startswith(prompt):
            text = strip_prompt(body, prompt)
            break
        if body.startswith(_TEMPLATE_STARTS) and prompt in body:  # rendered by a chat template
            text = body[body.index(prompt) + len(prompt) :]
            _, header, rest = text.partition("assistant")
            text = rest if header and len(text) - len(rest) < 60 else text
            break
    while (bare := text.rstrip()).endswith(_ENDS):
        text = next(bare.removesuffix(end) for end in _ENDS if bare.endswith(end))
    return text


def _guess_style(answered, raw):
    """The style whose own prompt is there, else the one that most completions answer in."""
    for name, style in PROMPT_STYLES.items():
        if any(style.instruction.partition("{problem}")[0] in text for text in raw):
            return name
    texts = [text for one in answered for text in one.completions]
    if all(text.lstrip().startswith("<think>") for text in texts) and any(
        extract_answer(text, "think_answer") for text in texts
    ):
        return "think_answer"
    return max(("answer_tag", "boxed"), key=lambda name: sum(bool(extract_answer(t, name)) for t in texts))
