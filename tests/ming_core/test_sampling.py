"""Sampling of text tokens: the nucleus, the same tokens for a seed as by sorting all, and few of them sorted."""

import pytest
import torch
from ming_univision.ming_core import text_decoder
from ming_univision.ming_core.text_decoder import sample


def by_sorting(probs, top_p, generator):
    """The plain way: sort the whole vocabulary, cut the nucleus off, draw."""
    probs, order = probs.sort(dim=-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))


def distribution(spread: float, count: int = 20_000, rows: int = 3) -> torch.Tensor:
    logits = spread * torch.randn(rows, count, generator=torch.Generator().manual_seed(1))
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])  # from flat, where nearly all tokens are candidates, to sharp
def test_a_seed_gives_the_tokens_that_sorting_the_whole_vocabulary_gives(spread, top_p):
    probs = distribution(spread)
    for seed in range(12):
        expected = by_sorting(probs.clone(), top_p, torch.Generator().manual_seed(seed))
        assert torch.equal(sample(probs.clone(), top_p, torch.Generator().manual_seed(seed)), expected)


def test_tokens_come_as_often_as_their_probabilities_say_and_never_from_outside_the_nucleus():
    probs = torch.tensor([[0.1, 0.5, 0.05, 0.3, 0.05]]).expand(20_000, -1)
    shares = sample(probs, 0.85, torch.Generator().manual_seed(0)).flatten().bincount(minlength=5) / len(probs)
    expected = torch.tensor([0.1, 0.5, 0, 0.3, 0]) / 0.9
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)
    assert shares[2] == shares[4] == 0


def test_a_usual_distribution_needs_only_the_first_candidates(monkeypatch):
    sorted_at_once, topk = [], torch.Tensor.topk

    def watched(self, k, **options):
        sorted_at_once.append(k)
        return topk(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    probs = distribution(8.0, count=150_000)
    for seed in range(50):
        sample(probs, 1.0, torch.Generator().manual_seed(seed))
    assert sorted_at_once.count(text_decoder.CANDIDATES) == 50 and len(sorted_at_once) < 70


@pytest.mark.parametrize("probs", [torch.ones(2, 300), torch.eye(2, 300), torch.ones(1, 1)])
def test_equal_certain_and_single_tokens_are_chosen_too(probs):
    chosen = sample(probs, 1.0, torch.Generator().manual_seed(0))
    assert chosen.shape == (len(probs), 1) and (probs.gather(1, chosen) > 0).all()
