"""Every pure loss against the worked examples of spec/baselines.md, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from palinode.training import losses

# The worked example of §0: V = 4, two sequences of four tokens; the last token of row 2 is padding.
ROW_1 = [[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1], [0.5, 0, 0, 0]]
ROW_2 = [[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0.5, 0]]
REFERENCE_1 = [[1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 1], [0.5, 0, 0, 0]]
REFERENCE_2 = [[0, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 3], [0, 0, 0.5, 0]]
LABELS = torch.tensor([[-100, -100, 1, 2], [-100, 0, 3, -100]])
WIN_LABELS = torch.tensor([[-100, -100, 3, 0], [-100, 2, 2, -100]])


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


LOGITS, REFERENCE = exact([ROW_1, ROW_2]), exact([REFERENCE_1, REFERENCE_2])


def scored(logits, labels=LABELS):
    """(z_NV, labels_N, rows_N): the logits at t - 1 predict the label at t."""
    places = labels[:, 1:] != -100
    return logits[:, :-1][places], labels[:, 1:][places], places.nonzero()[:, 0]


def row_nll(logits, labels=LABELS):
    z, wanted, rows = scored(logits, labels)
    return losses.row_sums(losses.token_nll(z, wanted), rows, 2)


def close(value):
    return pytest.approx(value, abs=1e-5)


NLL = losses.token_nll(*scored(LOGITS)[:2])


def test_nll_of_each_row():
    assert row_nll(LOGITS).tolist() == close([1.347162, 3.750077])
    assert row_nll(REFERENCE).tolist() == close([0.633018, 4.237480])
    assert NLL.mean().item() == close(1.274310)


def test_gradient_ascent():
    assert losses.gradient_ascent(NLL).mean().item() == close(-1.274310)


def test_kl_to_the_reference_over_all_and_over_scored_positions():
    everywhere = losses.kl_to_reference(LOGITS.flatten(0, 1), REFERENCE.flatten(0, 1))
    answers = losses.kl_to_reference(scored(LOGITS)[0], scored(REFERENCE)[0])
    assert everywhere.mean().item() == close(0.048622)
    assert everywhere.sum().item() == close(0.388976)
    assert answers.mean().item() == close(0.079345)
    assert losses.kl_to_reference(LOGITS, LOGITS).abs().max().item() < 1e-15


def test_npo():
    found = losses.npo(row_nll(LOGITS), row_nll(REFERENCE), beta=0.1)
    assert found.mean().item() == close(13.758916)


def test_npo_is_gradient_ascent_when_beta_goes_to_zero():
    current, reference = row_nll(LOGITS), row_nll(REFERENCE)
    beta = 1e-5
    found = losses.npo(current, reference, beta=beta).mean().item() - (2 / beta) * math.log(2)
    assert found == close(-0.1133695)
    assert (reference - current).mean().item() == close(-0.113370)


def test_npo_at_the_reference_is_two_logarithms_of_two_by_beta():
    same = row_nll(REFERENCE)
    assert losses.npo(same, same, beta=0.1).tolist() == close([13.862944, 13.862944])


def test_simnpo():
    numbers = exact([2, 2])
    assert losses.simnpo(row_nll(LOGITS) / numbers, beta=4.5, delta=0.0).mean().item() == close(0.010522)


def test_simnpo_margin_of_the_paper_is_beta_times_delta():
    mean = row_nll(LOGITS) / 2
    paper = -(2 / 0.7) * torch.nn.functional.logsigmoid(0.7 * mean - 3.0)
    torch.testing.assert_close(losses.simnpo(mean, beta=0.7, delta=3.0 / 0.7), paper)


def test_dpo_plain_and_as_open_unlearning_scales_it():
    win, win_reference = row_nll(LOGITS, WIN_LABELS), row_nll(REFERENCE, WIN_LABELS)
    assert win.tolist() == close([4.347162, 3.750077])
    assert win_reference.tolist() == close([5.633018, 4.237480])
    found = losses.dpo(win, row_nll(LOGITS), win_reference, row_nll(REFERENCE), beta=0.1).mean().item()
    assert found == close(0.645643)
    assert (2 / 0.1) * found == close(12.912860)


def test_misdirection():
    hidden = exact([[[1, 2], [3, 4]], [[0, 0], [1, 1]]])
    labelled = torch.tensor([[False, True], [True, True]])
    rows = labelled.nonzero()[:, 0]
    found = losses.misdirection(hidden[labelled], exact([1.2, 1.6]), rows, 2)
    assert found.tolist() == close([4.5, 1.1])
    assert found.mean().item() == close(2.8)


def test_undial_over_scored_and_over_all_positions():
    answers = losses.undial(scored(LOGITS)[0], scored(REFERENCE)[0], scored(LOGITS)[1], beta=10.0)
    everywhere = losses.undial(
        LOGITS[:, :-1].flatten(0, 1), REFERENCE[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), beta=10.0
    )
    assert answers.mean().item() == close(1.508602)
    assert everywhere.mean().item() == close(1.317227)


def test_undial_is_least_where_the_model_is_the_soft_target():
    z, wanted, _ = scored(REFERENCE)
    target = z - 10.0 * torch.nn.functional.one_hot(wanted, 4)
    entropy = -(target.softmax(-1) * target.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses.undial(target, z, wanted, beta=10.0), entropy)


def test_weighted_ascent():
    assert losses.weighted_ascent(NLL, beta=1.0).mean().item() == close(-0.296240)
    torch.testing.assert_close(losses.weighted_ascent(NLL, beta=0.0), losses.gradient_ascent(NLL))


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_weighted_ascent_is_bounded(beta):
    wide = torch.linspace(0, 1000, 100_001, dtype=torch.float64)
    found = losses.weighted_ascent(wide, beta=beta)
    assert -found.min().item() <= 1 / (math.e * beta) + 1e-12


def test_saturation_importance():
    assert losses.saturation_importance(NLL, beta1=5.0, beta2=1.0).mean().item() == close(-0.005597)


def test_saturation_importance_takes_zero_to_the_power_of_zero_as_one():
    certain = exact([0.0])
    assert losses.saturation_importance(certain + 1.0, beta1=0.0, beta2=0.0).item() == -1.0
    assert losses.saturation_importance(certain, beta1=5.0, beta2=0.0).item() == 0.0
    assert math.isfinite(losses.saturation_importance(certain, beta1=5.0, beta2=1.0).item())


def test_cross_entropy_unlearning():
    z, wanted, rows = scored(LOGITS)
    found = losses.cross_entropy_unlearning(z, wanted)
    assert found.mean().item() == close(1.525092)
    later = torch.tensor([False, True, False, True])  # all but the first of each row
    assert rows.tolist() == [0, 0, 1, 1]
    assert found[later].mean().item() == close(1.296032)


def test_cross_entropy_unlearning_has_the_gradient_of_its_paper():
    z, wanted, _ = scored(LOGITS)
    z = z.clone().requires_grad_()
    losses.cross_entropy_unlearning(z, wanted).sum().backward()
    p = z.detach().softmax(-1)
    own = p.gather(1, wanted[:, None])
    expected = -own * p / (1 - own)
    expected.scatter_(1, wanted[:, None], own)
    torch.testing.assert_close(z.grad, expected)


def test_logit_flatness_at_labelled_and_at_predicting_positions():
    assert losses.logit_flatness(LOGITS[LABELS != -100]).mean().item() == close(0.722656)
    assert losses.logit_flatness(scored(LOGITS)[0]).mean().item() == close(0.828125)


# Gradients

Z, WANTED, ROWS = scored(LOGITS + 0.1 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))
THERE = scored(REFERENCE)[0]


def sums(z):
    return losses.row_sums(losses.token_nll(z, WANTED), ROWS, 2)


SMOOTH = {
    "nll": lambda z: losses.token_nll(z, WANTED),
    "ascent": lambda z: losses.gradient_ascent(losses.token_nll(z, WANTED)),
    "kl": lambda z: losses.kl_to_reference(z, THERE),
    "undial": lambda z: losses.undial(z, THERE, WANTED, beta=10.0),
    "flatness": losses.logit_flatness,
    "npo": lambda z: losses.npo(sums(z), row_nll(REFERENCE), beta=0.1),
    "simnpo": lambda z: losses.simnpo(sums(z) / 2, beta=4.5, delta=0.2),
    "dpo": lambda z: losses.dpo(
        sums(z).flip(0), sums(z), row_nll(REFERENCE, WIN_LABELS), row_nll(REFERENCE), beta=0.5
    ),
    "rmu": lambda z: losses.misdirection(z, exact([1, 2, 3, 4]), ROWS, 2),
}
HELD = {
    "wga": (
        lambda z: losses.weighted_ascent(losses.token_nll(z, WANTED), beta=1.0),
        lambda z, p: -p * losses.token_nll(z, WANTED),
    ),
    "satimp": (
        lambda z: losses.saturation_importance(losses.token_nll(z, WANTED), beta1=5.0, beta2=1.0),
        lambda z, p: -(p**5) * (1 - p) * losses.token_nll(z, WANTED),
    ),
    "ce_u": (
        lambda z: losses.cross_entropy_unlearning(z, WANTED),
        lambda z, p: (
            -(Z.scatter(1, WANTED[:, None], -torch.inf).softmax(-1) * z.log_softmax(-1)).sum(-1) + 0 * p
        ),
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_agrees_with_finite_differences(name):
    assert torch.autograd.gradcheck(SMOOTH[name], (Z.clone().requires_grad_(),))


@pytest.mark.parametrize("name", HELD)
def test_gradient_with_held_weights_agrees_with_finite_differences(name):
    """What the paper holds constant is constant here by hand, and differences are taken of the rest."""
    found, by_hand = HELD[name]
    p = Z.softmax(-1).gather(1, WANTED[:, None])[:, 0]
    z = Z.clone().requires_grad_()
    torch.testing.assert_close(found(z), by_hand(z, p))
    (gradient,) = torch.autograd.grad(found(z).sum(), z)
    differences = torch.zeros_like(Z)
    for place in range(Z.numel()):
        step = torch.zeros_like(Z).flatten()
        step[place] = 1e-6
        step = step.view_as(Z)
        differences.view(-1)[place] = (by_hand(Z + step, p) - by_hand(Z - step, p)).sum() / 2e-6
    torch.testing.assert_close(gradient, differences, atol=1e-8, rtol=1e-6)
