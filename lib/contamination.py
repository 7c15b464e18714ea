"""Are test problems in the training data? By normalised text, and by 13 words in a row that both have.

The check of GPT-3 (Brown et al. 2020, appendix C) and its successors: text is lower case without punctuation,
and a problem counts as seen if it equals a training problem or shares one run of 13 words with any. Problems
of fewer words are compared as wholes only.
"""

import re

RUN = 13  # words

_WORD = re.compile(r"[^\W_]+")
_SIGN = re.compile(r"[^\W_]+|[-+*/^=<>!]")


def normalise_text(text):
    """Lower case words, numbers and signs of arithmetic, separated by blanks: what is compared as a whole.

    >>> normalise_text("What is $2+3$,\\n please?")
    'what is 2 + 3 please'
    """
    return " ".join(_SIGN.findall(text.lower()))


def list_runs(text, *, length=RUN):
    """The set of all runs of `length` words in a text."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def find_contaminated(train, test):
    """[(index in test, index in train, "text" or "13-gram")] for each test problem that training has seen.

    train, test   lists of problem texts; the first training problem that matches is named
    """
    wholes, runs = {}, {}
    wanted = set().union(*map(list_runs, test)) if test else set()
    for index, text in enumerate(train):
        wholes.setdefault(normalise_text(text), index)
        for run in list_runs(text) & wanted:
            runs.setdefault(run, index)
    found = []
    for index, text in enumerate(test):
        whole = wholes.get(normalise_text(text))
        shared = [runs[run] for run in list_runs(text) if run in runs]
        if whole is not None:
            found.append((index, whole, "text"))
        elif shared:
            found.append((index, min(shared), f"{RUN}-gram"))
    return found
