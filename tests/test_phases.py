"""Two phases of a completion: the switch is found in what was generated, once, and for each row alone."""

import pytest
import torch

from lib.draws import SamplingParams, draw_key, draw_tokens, parse_params, parse_phase
from lib.phases import PhaseTracker, count_raw_tokens, token_texts
from lib.sampler import TransformersSampler
from lib.settings import UserError
from tests.test_sampler import PROBLEMS, PROMPTS, VOCABULARY, ToyTokenizer, sample

PIECES = ["<", "answer", ">", "x", "</answer>", " <ans", "wer>4", "<answer", ">>", "a<answer>b", "</", "<<"]


def track(marker, *ids):
    tracker = PhaseTracker(marker, PIECES.__getitem__)
    return [tracker.push(token) for token in ids]


@pytest.mark.parametrize(
    ("ids", "switch"),
    [
        ((3, 0, 1, 2, 3, 3, 3), 4),  # three tokens, and behind from then on
        ((5, 6, 3), 2),  # split elsewhere, with more text around it
        ((0, 7, 8, 3), 3),  # begins again in the middle
        ((11, 1, 2), 3),
        ((9, 3), 1),  # whole within a token
        ((0, 1, 3, 2, 4), None),  # something in between
        ((10, 1, 2), None),  # </answer>
        ((0, 1, 2, 10, 3, 3, 0), 3),  # stays behind whatever comes
    ],
)
def test_the_marker_is_found_in_the_text_of_the_tokens(ids, switch):
    behind = track("<answer>", *ids)
    expected = len(ids) if switch is None else switch - 1
    assert behind == [False] * expected + [True] * (len(ids) - expected)


def test_a_marker_of_one_letter_and_a_long_run_before_it():
    assert track("x", 0, 0, 3, 0) == [False, False, True, True]
    assert track("<answer>", *[0, 1] * 5000, 2) == [False] * 10_000 + [True]


def test_the_shipped_tokenizer_writes_markers_in_several_tokens(tiny_tokenizer):
    text_of = token_texts(tiny_tokenizer)
    for text, marker in (("so <answer>4</answer>", "<answer>"), ("hm</think>\n4", "</think>")):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        tracker = PhaseTracker(marker, text_of)
        switch = next(i for i, token in enumerate(ids, start=1) if tracker.push(token))
        before = tiny_tokenizer.decode(ids[:switch])
        assert marker in before
        assert marker not in tiny_tokenizer.decode(ids[: switch - 1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("T1.1,p0.99,k20,m0.05,r1.2", SamplingParams(1.1, 0.99, 20, 0.05, 1.2)),
        ("T0", SamplingParams(temperature=0)),
        (" p.5 , T2 ", SamplingParams(2.0, 0.5)),
    ],
)
def test_the_short_form_of_sampling_parameters(text, expected):
    assert parse_params(text, option="--phase") == expected
    base = SamplingParams(min_p=0.1, max_new_tokens=7, phase="a: T0")
    assert parse_params("T0.5", option="--x", base=base) == SamplingParams(
        0.5, min_p=0.1, max_new_tokens=7, phase="a: T0"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("</think>", "write a marker, a colon, parameters"),
        (": T1", "write a marker"),
        ("答: T1", "must be plain ASCII"),
        ("a: ", "--phase: cannot read ''"),
        ("a: T", "cannot read 'T' in 'T'"),
        ("a: T1,q2", "cannot read 'q2' in 'T1,q2'"),
        ("a: T-1", "cannot read 'T-1'"),
        ("a: p0", "top_p must be > 0 and <= 1, not 0"),
        ("a: p1.5", "top_p must be > 0 and <= 1, not 1.5"),
        ("a: k2.5", "top_k must be a whole number >= 0, not 2.5"),
        ("a: m2", "min_p must be >= 0 and <= 1"),
        ("a: r0", "repetition_penalty must be > 0"),
        ("a: T1,T2", "temperature stands there twice"),
    ],
)
def test_a_wrong_setting_is_named(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_phase(text)


def test_a_phase_is_a_marker_and_parameters():
    assert parse_phase("") == ("", None)
    assert parse_phase("</think>: T0.6,p0.95") == ("</think>", SamplingParams(0.6, 0.95))
    assert parse_phase("Answer:: T0") == ("Answer:", SamplingParams(0.0))


@pytest.fixture
def sampler(toy_model):
    toy_model.generation_config.eos_token_id = [53, 54]
    return TransformersSampler(toy_model, ToyTokenizer())


# Tokens are decimal numbers: "1" is written by many of them, "12" by 12, by 1 and 2, and by 31 and 25.
PHASES = ["1: T0", "1: m0.3", "12: T0.3,p0.8", "1: T1.7,r1.5", "12: k1"]


@pytest.mark.parametrize("phase", PHASES)
def test_the_same_completions_however_they_are_batched(sampler, phase):
    options = {"phase": phase, "max_new_tokens": 40, "temperature": 1.3}
    together = sample(sampler, **options)
    alone = [sample(sampler, chosen=slice(i, i + 1), **options)[0] for i in range(4)]
    sampler.max_rows = 12
    in_twos = sample(sampler, **options)
    assert [g.completion_ids for g in together] == [g.completion_ids for g in alone]
    assert [g.completion_ids for g in together] == [g.completion_ids for g in in_twos]
    plain = sample(sampler, **options | {"phase": ""})
    assert [g.completion_ids for g in together] != [g.completion_ids for g in plain]
    keys = [draw_key(1, 1, "p1", attempt=0, member=member) for member in range(6)]
    params = SamplingParams(**options)
    streamed = [list(row) for row in zip(*sampler.stream(PROMPTS[1], keys, params), strict=True)]
    assert [[t for t in row if t is not None] for row in streamed] == together[1].completion_ids


@pytest.mark.parametrize("phase", PHASES)
def test_every_token_is_drawn_as_its_phase_says(sampler, toy_model, phase):
    """Token by token from a plain forward: the first phase up to the marker, the second to the very end."""
    first, (marker, second) = SamplingParams(temperature=1.3, top_p=0.95), parse_phase(phase)
    groups = sample(sampler, phase=phase, temperature=1.3, top_p=0.95, max_new_tokens=16, group_size=4)
    lengths = []
    for problem, prompt, group in zip(PROBLEMS, PROMPTS, groups, strict=True):
        for member, ids in enumerate(group.completion_ids):
            key = draw_key(1, 1, problem.id, attempt=0, member=member)
            key_N, text, later = torch.tensor([key - 2**64 if key >= 2**63 else key]), "", 0
            for position, token in enumerate(ids):
                with torch.no_grad():
                    logits = toy_model(torch.tensor([prompt + ids[:position]])).logits[:, -1, :].float()
                logits[:, VOCABULARY:] = -torch.inf
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[0, prompt + ids[:position]] = True
                params = second if marker in text else first
                later += marker in text
                drawn = draw_tokens(logits, params, key_N, position=position, seen_NV=seen)
                assert token == drawn.item(), f"position {position} of {ids}, text {text}"
                text += str(token)
            lengths.append(later)
    assert max(lengths) > 3, "the second phase lasts"
    if marker == "12":
        assert min(lengths) == 0, "rows switch each for itself"


def test_a_marker_in_the_prompt_does_not_count(sampler):
    assert PROMPTS[2] == [12]
    options = {"chosen": slice(2, 3), "max_new_tokens": 12, "group_size": 30}
    plain = sample(sampler, **options)[0].completion_ids
    phased = sample(sampler, phase="12: T0", **options)[0].completion_ids
    untouched = [i for i, ids in enumerate(plain) if "12" not in "".join(map(str, ids))]
    assert len(untouched) > 10
    assert [phased[i] for i in untouched] == [plain[i] for i in untouched]
    assert phased != plain


def test_raw_tokens_are_counted_by_phase():
    rows, text_of = [[3, 1, 2, 5], [4, 4]], str
    count = {
        "": (6, 0),
        "12: T0.5": (5, 0),  # the first row switches behind 3 1 2
        "12: T1": (6, 1),
    }
    for phase, (raw, tempered) in count.items():
        assert count_raw_tokens(rows, SamplingParams(phase=phase), text_of) == raw
        assert count_raw_tokens(rows, SamplingParams(top_p=0.9, phase=phase), text_of) == tempered
