"""What a policy is measured from: where it was a moment ago, where it began, or a slow copy behind it.

    mode          the anchor is                                    extra memory             extra forward
    on_policy     the policy that sampled the batch                none                     none
    fixed         where training began                             none; one adapter if     one per batch
                                                                   it began from one
    ema           decay * anchor + (1 - decay) * policy,           one adapter              one per update
                  after every optimizer step
    kl_triggered  the policy of some steps ago, copied over when   one adapter              one per batch
                  the two have drifted apart

The adapter is a second one in the same PEFT model, float32, without gradients or optimizer state: 66.5 MiB
for Qwen3-1.7B at rank 16 on all projections. It holds the factors A and B like the policy's own: their EMA is
not the EMA of their product, but follows it.

Shape suffixes: N rows (completions), T completion tokens.
"""

import contextlib
import copy
import math
import re
from collections import deque
from statistics import fmean

import torch

from lib.losses import anchor_kl, mask_tokens, sequence_logprob

MODES = ("on_policy", "fixed", "ema", "kl_triggered")
_OURS, _ITS = "default", "anchor"  # names of the two adapters in the PEFT model


def measure_distance(scored, anchor_NT, reduction):
    """How far the policy is from its anchor, in three measures by name.

    anchor_drift   mean over completions of |s - a|, which are sums or means over tokens as `reduction` says
    token_drift    the same per token, whatever the reduction [nat/token]
    anchor_kl      the estimate of the KL per token of `losses.anchor_kl`
    """
    logp_NT, length_N = scored.logp_NT.detach(), scored.length_N
    apart = {how: sequence_logprob(logp_NT - anchor_NT, length_N, reduction=how) for how in ("sum", "mean")}
    return {
        "anchor_drift": apart[reduction].abs().mean().item(),
        "token_drift": apart["mean"].abs().mean().item(),
        "anchor_kl": anchor_kl(logp_NT, anchor_NT, mask_tokens(length_N, logp_NT.shape[1])).item(),
    }


def explain_flat_loss(size):
    """Why the cross entropy of anchored log-probabilities may stand still, in two lines for the log."""
    return (
        "where the policy is its own anchor, as at the first update of every on-policy batch,\n"
        f"all completions of a group stand alike, and the loss is ln {size} = {math.log(size):.3f} "
        "whatever is learned: watch reward and grad_norm"
    )


class Anchor:
    """The anchor of a `Policy` whose model is a PEFT model.

    policy        a `policy.Policy`
    mode          on_policy | fixed | ema | kl_triggered
    from_adapter  whether training begins from an adapter and not from the bare base: `fixed` keeps a copy of
                  it, and needs none of the base, which is the model with its adapter disabled
    decay         share of the ema anchor that stays at an optimizer step, in [0, 1]
    threshold     mean drift over a full window above which the policy is copied over [nat/token]
    window        optimizer steps in a window; the next one begins empty after a copy

    `updates` counts how often the stored weights have changed: every step for ema, every copy for
    kl_triggered, and never for the others. Raises ValueError for an unknown mode or a value out of range.
    """

    def __init__(self, policy, mode, *, from_adapter=False, decay=0.99, threshold=0.1, window=10):
        if mode not in MODES:
            raise ValueError(f"anchor is one of {', '.join(MODES)}, not {mode!r}")
        if not 0 <= decay <= 1 or not threshold > 0 or window < 1:
            raise ValueError("an anchor needs decay in [0, 1], threshold > 0 and window >= 1")
        self.policy, self.mode = policy, mode
        self.decay, self.threshold = decay, threshold
        self.updates, self._drifts = 0, deque(maxlen=window)
        self._groups = self._logp_NT = None  # the batch at hand, and what the anchor says about it
        self._weights = {}  # by the policy's name: (the policy's parameter, the anchor's)
        if mode in ("ema", "kl_triggered") or (mode == "fixed" and from_adapter):
            self._add_adapter()

    def logprobs(self, groups, scored):
        """(N, T) token log-probabilities of all completions under the anchor, without a graph.

        groups   a batch, the same list at each of its updates: what cannot have changed is not computed again
        scored   the policy's own (`Policy.logprobs`) at this update; on_policy keeps those of the first one,
                 exactly: a second forward would differ in its last digits
        """
        if self._groups is not groups:
            self._groups, self._logp_NT = groups, None
        if self._logp_NT is None and self.mode == "on_policy":
            self._logp_NT = scored.logp_NT.detach()
        elif self._logp_NT is None:
            with self._in_charge():
                self._logp_NT = self.policy.logprobs(groups, keep_graph=False).logp_NT.detach()
        return self._logp_NT

    def follow(self, drift, *, stepped=True):
        """Move the anchor after an optimizer step.

        drift    how far the policy was from it before: `token_drift` of `measure_distance` [nat/token]
        stepped  whether there was a step: if the optimizer skipped it nothing is moved or remembered
        """
        if not stepped:
            return
        if self.mode == "ema":
            self._move(1 - self.decay)
        elif self.mode == "kl_triggered":
            self._drifts.append(drift)
            if len(self._drifts) == self._drifts.maxlen and fmean(self._drifts) > self.threshold:
                self._move(1.0)
                self._drifts.clear()

    def state_tensors(self):
        """Everything that continues the anchor exactly."""
        weights = {f"weights.{name}": its.detach() for name, (_, its) in self._weights.items()}
        drifts = torch.tensor(list(self._drifts), dtype=torch.float64)
        return {"updates": torch.tensor(self.updates), "drifts": drifts, **weights}

    def load_state_tensors(self, tensors):
        """Restore what `state_tensors` returned, into an anchor made with the same arguments."""
        self.updates = int(tensors["updates"])
        self._drifts.extend(tensors["drifts"].tolist())
        with torch.no_grad():
            for name, (_, its) in self._weights.items():
                its.copy_(tensors[f"weights.{name}"])

    def _add_adapter(self):
        """Give the model a second adapter that starts as a copy of the policy's."""
        model = self.policy.model
        config = copy.deepcopy(model.peft_config[_OURS])
        config.init_lora_weights = True  # the numbers are replaced; other ways to begin would change the base
        model.add_adapter(_ITS, config)
        model.set_requires_grad(_ITS, requires_grad=False)
        parameters = dict(model.named_parameters())
        for name, ours in self.policy.trainable.items():
            its = parameters[re.sub(rf"\.{_OURS}(?=\.|$)", f".{_ITS}", name)]
            self._weights[name] = ours, its
        self._move(1.0)
        self.updates = 0

    @torch.no_grad()
    def _move(self, share):
        """anchor <- anchor + share * (policy - anchor), in float32."""
        for ours, its in self._weights.values():
            its.copy_(ours) if share == 1 else its.lerp_(ours.to(its.dtype), share)
        self.updates += 1
        self._logp_NT = None

    @contextlib.contextmanager
    def _in_charge(self):
        """In this block the model computes as the anchor."""
        model = self.policy.model
        if not self._weights:
            with model.disable_adapter():
                yield
            return
        model.set_adapter(_ITS, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(_OURS)
