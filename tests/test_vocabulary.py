"""The vocabulary in chunks, and in a kernel, against autograd through all logits."""

import pytest
import torch

from lib import vocabulary
from lib.vocabulary import agrees_with_chunks, find_kernel, measure_logps, pull_logps


@pytest.fixture
def case():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False)
    head.weight.requires_grad_(False)
    return head, torch.randn(23, 16), torch.randint(50, (23,)), torch.randn(23)


def by_autograd(hidden_MH, weight_VH, target_M):
    """The slow way, in the signature of a kernel."""
    return torch.nn.functional.cross_entropy(hidden_MH @ weight_VH.T, target_M, reduction="none")


@pytest.mark.parametrize("positions", [1, 5, 100])
def test_chunks_equal_autograd(case, monkeypatch, positions):
    head, hidden_MH, target_M, weight_M = case
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 50 * positions)
    leaf_MH = hidden_MH.clone().requires_grad_()
    logp_M = -by_autograd(leaf_MH, head.weight, target_M)
    (logp_M * weight_M).sum().backward()
    ours_M, gradient_MH = pull_logps(head, hidden_MH, target_M, weight_M=weight_M)
    torch.testing.assert_close(ours_M, logp_M.detach())
    torch.testing.assert_close(gradient_MH, leaf_MH.grad)
    torch.testing.assert_close(measure_logps(head, hidden_MH, target_M), logp_M.detach())


def test_a_kernel_is_used_for_both(case):
    head, hidden_MH, target_M, weight_M = case
    ours = pull_logps(head, hidden_MH, target_M, weight_M=weight_M)
    its = pull_logps(head, hidden_MH, target_M, weight_M=weight_M, kernel=by_autograd)
    torch.testing.assert_close(its, ours)
    torch.testing.assert_close(measure_logps(head, hidden_MH, target_M, kernel=by_autograd), ours[0])


def test_a_kernel_that_is_wrong_is_found_out(case):
    head = case[0]
    assert agrees_with_chunks(by_autograd, head)
    assert not agrees_with_chunks(lambda h, w, t: by_autograd(h, w, t.roll(1)), head)
    assert not agrees_with_chunks(lambda h, w, t: by_autograd(h.detach() + 0 * h, w, t), head)
    assert not agrees_with_chunks(lambda h, w, t: by_autograd(h, w, t) + 0.05, head)


def test_no_kernel_without_a_card(case):
    assert find_kernel(case[0].bfloat16()) is None
