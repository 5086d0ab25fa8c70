"""The final rounding: to nearest as torch does it, or stochastic and unbiased."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palinode.weights.arithmetic import all_finite, name_key, random_bits, round_stochastic, round_to

KEY = name_key(0, "model.norm.weight")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=HALVES)
def dtype(request):
    return HALVES[request.param]


def stochastic(values, dtype, *, key=KEY, start=0):
    return round_to(values, dtype, stochastic=True, key=key, start=start)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of the dtype not above the value and the smallest not below it."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    step = torch.tensor(math.inf if float(near) < value else -math.inf, dtype=dtype)
    other = near if float(near) == value else torch.nextafter(near, step)
    return min(float(near), float(other)), max(float(near), float(other))


def every_number(dtype):
    """All finite values of a 16-bit type, -0.0 and subnormals among them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)]


def test_every_number_of_the_type_stays_bit_for_bit(dtype):
    values = every_number(dtype)
    for seed in range(3):
        found = stochastic(values.to(torch.float32), dtype, key=name_key(seed, "x"))
        assert torch.equal(found.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize(
    "value",
    [
        1.001,  # just above a number
        -1.001,
        0.0312,
        -3.1415926,
        1e-3,
        300.7,
        6.1e-5,  # float16: just below its smallest normal number, 2^-14
        -6.1e-5,
        3.3e-6,  # float16: subnormal
        -3.3e-6,
        2.1e-8,  # float16: below its smallest number, 2^-24
        -2.1e-8,
    ],
)
def test_mean_of_many_roundings_is_the_value(value, dtype):
    n = 200_000
    value = float(np.float32(value))
    below, above = neighbours(value, dtype)
    found = stochastic(torch.full((n,), value), dtype).to(torch.float64)
    assert set(found.tolist()) <= {below, above}
    chance = (value - below) / (above - below)
    # Five standard deviations of a mean, and what 13 bits of chance cannot resolve.
    bound = (above - below) * (5 * math.sqrt(chance * (1 - chance) / n) + 2**-13)
    assert abs(float(found.mean()) - value) <= bound


def test_a_vector_lost_by_nearest_rounding_is_kept_on_average():
    # spec/msa.md P3: steps of 1e-5 on weights of N(0, 0.02) mostly vanish in bfloat16.
    weights = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().float()
    moved = weights + 1e-5
    assert float((moved.bfloat16().float() != weights).double().mean()) < 0.2
    kept = float((stochastic(moved, torch.bfloat16).float() - weights).double().mean())
    assert kept == pytest.approx(1e-5, rel=0.05)


def test_nearest_rounding_is_that_of_torch(dtype):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 1e-3
    found = round_to(values, dtype, stochastic=False, key=KEY, start=0)
    assert torch.equal(found, values.to(dtype))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wide_output_is_never_rounded_stochastically(wide):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=wide)
    assert torch.equal(stochastic(values, wide), values)


@given(st.floats(-60000, 60000, width=32), st.sampled_from(sorted(HALVES)), st.integers(0, 2**63))
def test_result_is_one_of_the_two_neighbours(value, name, key):
    found = float(stochastic(torch.full((64,), value), HALVES[name], key=key)[13])
    assert found in neighbours(value, HALVES[name])


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**34), st.integers(1, 300), st.integers(0, 299))
def test_random_bits_of_an_element_depend_on_its_place_only(key, start, count, skip):
    skip = min(skip, count - 1)
    assert torch.equal(random_bits(key, start, count)[skip:], random_bits(key, start + skip, count - skip))


def test_random_bits_go_on_beyond_four_billion_elements():
    start = 2**32 - 50
    across = random_bits(KEY, start, 100)
    assert torch.equal(across[:50], random_bits(KEY, start, 50))
    assert torch.equal(across[50:], random_bits(KEY, 2**32, 50))
    assert not torch.equal(across[50:], random_bits(KEY, 0, 50))


def test_random_bits_are_even_in_every_bit_and_between_neighbours():
    n = 200_000
    bits = random_bits(KEY, 0, n).numpy().view(np.uint32)
    table = (bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(table.mean(axis=0) - 0.5).max() < 5 / math.sqrt(4 * n)
    low = (bits & 0xFFFF).astype(float)
    assert abs(np.corrcoef(low[:-1], low[1:])[0, 1]) < 5 / math.sqrt(n)


def test_names_and_seeds_have_bits_of_their_own():
    keys = [name_key(seed, name) for seed in (0, 1) for name in ("a", "b", "model.norm.weight")]
    drawn = [random_bits(key, 0, 20_000).numpy().view(np.uint32) & 0xFFFF for key in keys]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(20_000)


def test_head_and_embedding_share_their_bits():
    assert name_key(3, "lm_head.weight") == name_key(3, "model.embed_tokens.weight")
    assert name_key(3, "transformer.wte.weight") == name_key(3, "lm_head.weight")
    assert name_key(3, "lm_head.weight") != name_key(4, "lm_head.weight")


def test_too_large_a_value_becomes_infinite_and_is_seen(dtype):
    values = torch.tensor([1.0, 3.4e38])
    for found in (stochastic(values, dtype, key=KEY), values.to(dtype)):
        assert all_finite(found) == bool(torch.isfinite(found).all())
    assert not all_finite(values.to(torch.float16))


def test_finite_values_whose_sum_is_infinite_are_finite():
    assert all_finite(torch.full((10,), 3e38))
    assert all_finite(torch.full((10,), 6e4, dtype=torch.float16))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    assert not all_finite(torch.tensor([1.0, math.nan]))
    assert all_finite(torch.empty(0))


def test_rounding_leaves_its_input_alone(dtype):
    values = torch.full((100,), 1.001)
    round_stochastic(values, dtype, random_bits(KEY, 0, 100))
    assert torch.equal(values, torch.full((100,), 1.001))
