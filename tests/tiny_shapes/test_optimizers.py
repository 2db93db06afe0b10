"""Muon, the learning rate, and the moving average of the weights."""

import copy

import pytest
import torch

from tiny_shapes.training.optimizers import (
    Muon,
    make_average,
    make_schedulers,
    orthogonalize,
)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 8, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    result = orthogonalize(torch.randn(shape, generator=seeded()))
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.4 and values.max() < 1.6


def test_matrices_of_one_shape_step_together_as_they_would_alone():
    def step(shapes, grads):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        Muon(params, lr=0.1).step()
        return [p.detach() for p in params]

    a, b = torch.randn(4, 6, generator=seeded(1)), torch.randn(2, 4, 6, generator=seeded(2))
    together = step([a.shape, b.shape], [a, b])
    assert torch.allclose(together[0], step([a.shape], [a])[0], atol=1e-6)
    assert torch.allclose(together[1][1], step([a.shape], [b[1]])[0], atol=1e-6)
    # as large as a step of AdamW would be: 0.2 for each value
    assert 0.1 * 0.2 * 0.5 < float(together[0].square().mean().sqrt()) < 0.1 * 0.2 * 1.5


def test_schedulers_begin_at_any_step_with_the_rate_that_is_given():
    layer = torch.nn.Linear(2, 2)
    optimizers = [Muon([layer.weight], lr=5.0), torch.optim.AdamW([layer.bias], lr=5.0)]
    schedulers = make_schedulers(optimizers, 2.0, lambda step: 1 / (1 + step), step=3)
    rates = [scheduler.get_last_lr() for scheduler in schedulers]
    assert rates == [[0.5]] * len(optimizers)
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        optimizer.step()
        scheduler.step()
    assert [scheduler.get_last_lr() for scheduler in schedulers] == [[0.4]] * len(optimizers)


def test_the_average_is_young_at_first_and_leaves_the_weights_alone():
    layer = torch.nn.Linear(2, 2)
    average = make_average(layer, 0.9)
    expected = None
    for step in range(1, 40):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        own = copy.deepcopy(layer.weight)
        average.update_parameters(layer)
        decay = min(0.9, step / (step + 10))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
        assert torch.equal(layer.weight, own)
        torch.testing.assert_close(average.module.weight, torch.full((2, 2), expected))


def test_without_decay_the_average_is_the_weights_themselves():
    layer = torch.nn.Linear(2, 2)
    average = make_average(layer, 0.0)
    for _ in range(3):
        with torch.no_grad():
            layer.weight.normal_(generator=seeded())
        average.update_parameters(layer)
        assert torch.equal(average.module.weight, layer.weight)
