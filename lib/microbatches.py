"""Rows in micro-batches, under a token budget that gives way when memory runs out.

A row is (prompt ids, completion ids). What runs out of memory is done again in smaller micro-batches: the
gradient of a micro-batch counts as a whole or not at all, so that the gradient of a step stays the same.
"""

import torch

from lib.memory import is_out_of_memory
from lib.settings import UserError

BUSY_TOKENS = 1024  # a forward of so many tokens costs the same per token as a larger one


def plan_microbatches(lengths, *, budget):
    """Row indices of each micro-batch: similar lengths together, at most `budget` padded tokens in one.

    A row longer than the budget gets a micro-batch of its own. A micro-batch that is large enough to keep the
    machine busy ends where the next row would pad it by more than a tenth.

    >>> plan_microbatches([3, 9, 2, 4], budget=9)
    [[2, 0], [3], [1]]
    """
    batches, real = [], 0  # real: tokens of the last micro-batch without its padding
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = lengths[index] * (len(batches[-1]) + 1) if batches else 0
        wasteful = padded >= BUSY_TOKENS and padded > 1.1 * (real + lengths[index])
        if batches and padded <= budget and not wasteful:
            batches[-1].append(index)
            real += lengths[index]
        else:
            batches.append([index])
            real = lengths[index]
    return batches


def count_padded(plan, rows):
    """Tokens that a plan (row indices of each micro-batch) computes, padding included."""
    return sum(len(part) * max(sum(map(len, rows[i])) for i in part) for part in plan)


class TokenBudget:
    """How many padded tokens a micro-batch may have, and work that is done within it.

    parameters   those whose `.grad` the work adds to
    `tokens` is halved, for good, each time memory runs out.
    """

    def __init__(self, tokens, parameters):
        self.tokens, self.parameters = tokens, parameters

    def plan(self, rows, indices):
        """Micro-batches of the rows with these indices, as lists of indices."""
        totals = [sum(map(len, rows[i])) for i in indices]
        plan = plan_microbatches(totals, budget=self.tokens)
        return [[indices[place] for place in places] for places in plan]

    def work_off(self, rows, indices, work, *, held):
        """Call `work(indices of a micro-batch)` until every row had its turn.

        held   a list of what the work keeps in memory: emptied when memory runs out
        """
        plan = self.plan(rows, indices)
        while plan:
            if self.attempt(work, plan[0]):
                plan.pop(0)
            else:
                self.shrink(rows, plan[0], held=held)
                plan = self.plan(rows, [i for part in plan for i in part])

    def attempt(self, work, *arguments):
        """Do it: True. False, with the gradients as they were, where memory ran out."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # work that breaks off has added to some of them
        try:
            work(*arguments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
            return False
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return True

    def shrink(self, rows, part, *, held):
        """A smaller budget after `part` ran out of memory; UserError if it cannot be smaller."""
        if len(part) == 1 and not held:
            raise UserError(
                f"out of memory with one completion, {count_padded([part], rows)} tokens with its prompt: "
                "turn on --gradient-checkpointing, or lower --max-new-tokens"
            )
        self.tokens = max(1, min(self.tokens, count_padded([part], rows)) // 2)
        held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory: micro-batches of at most {self.tokens} tokens from here on")
