"""From hidden states to the log-probabilities of tokens, and back, without the logits of all positions.

The logits of 8,192 tokens are 5 GB in float32 at a vocabulary of 151,936, and a backward pass holds several
copies. Here the vocabulary is computed for a chunk of positions at a time, and its gradient with it: what is
needed beside the hidden states grows neither with the tokens nor with the vocabulary.

Shape suffixes: M positions, C positions of a chunk, H hidden, V vocabulary.
"""

from functools import partial

import torch

from lib.settings import shorten_reason

CHUNK_BYTES = 2**27  # float32 logits of a chunk; about three times this is the workspace
KERNEL_TOLERANCE = 0.01  # mean |difference| of log-probabilities that a kernel may have [nat]


def measure_logps(head, hidden_MH, target_M, *, kernel=None):
    """(M,) log-probabilities of the target tokens, without a graph [nat].

    head    the module that computes logits from hidden states, with an adapter of its own or not
    kernel  what `find_kernel` returned
    """
    with torch.no_grad():
        if kernel:
            return -kernel(hidden_MH, head.weight, target_M)
        chunks = []
        for hidden_CH, target_C in _split(head, hidden_MH, target_M):
            logits_CV = head(hidden_CH).float()
            chunks.append(logits_CV.gather(1, target_C[:, None])[:, 0] - logits_CV.logsumexp(dim=-1))
        return torch.cat(chunks)


def pull_logps(head, hidden_MH, target_M, *, weight_M, kernel=None):
    """Back-propagate sum(weight * logp) to the hidden states: ((M,) logp, (M, H) gradient).

    What is trainable in `head` gets its gradient on the way. The graph of `hidden_MH` is left alone.
    The gradient of a log-probability is known, weight * (one-hot - softmax), so the softmax needs no graph.
    """
    if kernel:
        leaf_MH = hidden_MH.detach().requires_grad_()
        logp_M = -kernel(leaf_MH, head.weight, target_M)
        (logp_M * weight_M).sum().backward()
        return logp_M.detach(), leaf_MH.grad
    logps, gradients = [], []
    for hidden_CH, target_C, weight_C in _split(head, hidden_MH.detach(), target_M, weight_M):
        logits_CV = head(hidden_CH.requires_grad_())
        with torch.no_grad():
            wide_CV = logits_CV.float()
            total_C = wide_CV.logsumexp(dim=-1)
            logps.append(wide_CV.gather(1, target_C[:, None])[:, 0] - total_C)
            push_CV = (wide_CV - total_C[:, None]).exp_().mul_(-weight_C[:, None])
            push_CV.scatter_add_(1, target_C[:, None], weight_C[:, None])
            del wide_CV
            push_CV = push_CV.to(logits_CV.dtype)
        logits_CV.backward(push_CV)
        gradients.append(hidden_CH.grad)
    return torch.cat(logps), torch.cat(gradients)


def find_kernel(head):
    """Cut cross-entropy as a kernel for this head, or None where the chunks serve better.

    It needs a card, a plain frozen head in 16 bit, and the package cut-cross-entropy. Its version 25.1.1
    multiplies the target's logit in 16 bit and adds up the gradient in 16 bit: whether that is good enough is
    measured on the head itself before it is used. Its gradient filter, which leaves out small probabilities,
    is off: of 152,000 tokens they are many. It saves the workspace of the chunks, and little time.
    """
    weight = getattr(head, "weight", None)
    plain = isinstance(head, torch.nn.Linear) and head.bias is None and not weight.requires_grad
    if not plain or weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from cut_cross_entropy import linear_cross_entropy
        from triton.errors import TritonError
    except ImportError:
        return None
    kernel = partial(linear_cross_entropy, reduction="none", filter_eps=None)
    try:
        return kernel if agrees_with_chunks(kernel, head) else None
    except (TritonError, RuntimeError, AssertionError) as error:  # what a kernel says to a card it cannot use
        print(f"cut-cross-entropy is not used: {shorten_reason(error)}")
        return None


def agrees_with_chunks(kernel, head, *, positions=256):
    """Does a kernel compute what the chunks compute, log-probabilities and gradient, on random positions?

    kernel   (hidden_MH, weight_VH, target_M) -> (M,) negative log-probabilities
    """
    draw = torch.Generator().manual_seed(0)
    where = {"device": head.weight.device, "dtype": head.weight.dtype}
    hidden_MH = torch.randn(positions, head.in_features, generator=draw).to(**where)
    target_M = torch.randint(head.out_features, (positions,), generator=draw).to(where["device"])
    weight_M = torch.randn(positions, generator=draw).to(where["device"])
    (ours_M, pulled_MH), (its_M, its_MH) = (
        pull_logps(head, hidden_MH, target_M, weight_M=weight_M, kernel=one) for one in (None, kernel)
    )
    likeness = torch.cosine_similarity(pulled_MH.float().flatten(), its_MH.float().flatten(), dim=0)
    return bool((ours_M - its_M).abs().mean() <= KERNEL_TOLERANCE and likeness > 0.999)


def _split(head, *tensors_M):
    # A head inside PEFT's wrappers still says how many tokens it knows: the rows of its weight.
    size = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    return zip(*(tensor_M.split(size) for tensor_M in tensors_M), strict=True)
