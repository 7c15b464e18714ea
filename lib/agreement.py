"""Do sampler and policy compute the same? Asked before step 1, and of every batch.

A sampler that serves the base, or yesterday's adapter, looks healthy: at the start the adapter equals the
base, and a step changes less than bfloat16 rounds. So before step 1 `probe_sampler` gives it two adapters,
one after the other, with which the model speaks very differently, and it must follow each. From then on
`compare` looks at every batch: the same tokens, the sampler's log-probabilities and the policy's.

Shape suffixes: N completions, T tokens.
"""

from statistics import fmean
from types import SimpleNamespace

import torch

from lib.draws import SamplingParams
from lib.settings import UserError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # mean over tokens [nat]
MOVED = 0.2  # a probe adapter moves the mean log-probability by at least this much [nat]
_PROBE = SimpleNamespace(id="probe")  # a problem, as far as a sampler looks at one
_PROBE_STEP = -3  # of the draws: training counts from 1, evaluation is -1, the chat page -2


def compare(groups, scored, *, tolerance=None):
    """How far the sampler's log-probs are from the policy's, over all sampled tokens: metrics [nat].

    groups     with `sampler_logps`
    scored     the policy's (`policy.Scored`) of the same completions; one that came `later` is nan where
               nothing was computed
    tolerance  of the mean; None is `TOLERANCE` of what the model rounds to
    UserError says what differs and why that happens. Of a policy that computes nan so is the difference: the
    step is skipped for it, and counted, like any other without a finite loss.
    """
    sampled = [logps for group in groups for logps in group.sampler_logps]
    differences = [
        abs(a - b)
        for row, logps in zip(scored.logp_NT.tolist(), sampled, strict=True)
        for a, b in zip(row[: len(logps)], logps, strict=True)
        if a == a or not scored.later
    ]
    if not differences:  # of completions that nobody computed nothing is said
        return {}
    mean = fmean(differences)
    most = max(differences) if mean == mean else mean
    tolerance = TOLERANCE[scored.rounding] if tolerance is None else tolerance
    if mean > tolerance:
        raise UserError(
            f"sampler and policy disagree about the same tokens by {mean:.2g} nat on average, {most:.2g} at "
            f"most (tolerance {tolerance:g}): the sampler serves other weights (an adapter it did not take "
            "over, the base, another quantisation or data type) or another prompt. Compare with --sampler "
            "transformers; --agreement sets the tolerance"
        )
    return {"sampling/sampling_logp_difference/mean": mean, "sampling/sampling_logp_difference/max": most}


def probe_sampler(policy, sampler, prompt_ids, *, tolerance=None):
    """Let the sampler follow two adapters that speak differently, and then the policy's own again.

    prompt_ids   of any prompt
    The policy's weights are the same numbers afterwards, and no random state is touched. Returns the largest
    of the mean differences [nat]. UserError where the sampler does not follow.
    """
    # not neutral: log-probabilities behind temperature and penalty, where raw ones are wanted, would show
    params = SamplingParams(temperature=0.9, repetition_penalty=1.1, max_new_tokens=32)

    def sample(attempt):
        step = {"group_size": 4, "seed": 0, "step": _PROBE_STEP, "attempt": attempt}
        return sampler.sample([_PROBE], [prompt_ids], params, **step)

    def differ(groups):
        scored = policy.logprobs(groups, keep_graph=False)
        if not scored.logp_NT.isfinite().all():
            raise UserError(
                "the policy's log-probabilities are not finite: are the weights of --model damaged?"
            )
        return compare(groups, scored, tolerance=tolerance)

    matrices = {name: p for name, p in policy.trainable.items() if "lora_B" in name}
    own = {name: p.detach().clone() for name, p in matrices.items()}
    measured = [differ(groups := sample(0))]
    try:
        for attempt in (1, 2) if matrices else ():
            _speak_differently(policy, matrices, own, groups=groups, seed=attempt)
            try:
                measured.append(differ(groups := sample(attempt)))
            except UserError as error:
                raise UserError(f"the sampler does not follow the policy's adapter: {error}") from None
    finally:
        with torch.no_grad():
            for name, parameter in matrices.items():
                parameter.copy_(own[name])
    measured.append(differ(sample(3)))
    return max(one["sampling/sampling_logp_difference/mean"] for one in measured)


def _speak_differently(policy, matrices, own, *, groups, seed):
    """Random B matrices, larger and larger until the log-probs of these completions are `MOVED` away from
    what they are now, and from what they are with the policy's `own`."""

    def measure():
        return policy.logprobs(groups, keep_graph=False).logp_NT.detach()

    here_NT = measure()
    with torch.no_grad():
        for name, parameter in matrices.items():
            parameter.copy_(own[name])
    before = (here_NT, measure())
    tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
    size = 1e-3
    while size < 1e3:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in matrices.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        after_NT = measure()
        if min((after_NT - one_NT).abs().sum().item() for one_NT in before) >= MOVED * tokens:
            return
        size *= 2
    raise UserError("an adapter changes nothing in this model: are --lora-targets names of its projections?")
