"""The final rounding: to nearest as torch does it, or stochastic and unbiased."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palinode.weights import kernels
from palinode.weights.arithmetic import name_key

KEY = name_key(0, "model.norm.weight")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {torch.float16: kernels.FLOAT16, torch.bfloat16: kernels.BFLOAT16}


@pytest.fixture(params=HALVES)
def dtype(request):
    return HALVES[request.param]


def rounded(values, dtype, *, by_chance, key=KEY, start=0):
    """Values rounded by the kernel, which takes them as a sum of one term; and whether all are finite."""
    wides = values[None].numpy()
    none, no_rows = np.empty(0, np.int64), np.empty((0, len(values)), wides.dtype)
    out = np.zeros(len(values), np.uint16), np.zeros(len(values), wides.dtype)
    finite = kernels.combine(
        (False, np.empty((0, 0), np.uint16), wides, no_rows),
        len(values),
        (none, none, np.empty(0, wides.dtype)),
        (KINDS.get(dtype, kernels.AS_IS), by_chance, np.int64(key)),
        np.int64(start),
        (0, 0, np.empty((0, 1), wides.dtype), kernels.totals_of(0)),
        out,
    )
    halved, wide = out
    if dtype == torch.bfloat16:
        return torch.from_numpy(halved.view(np.int16)).view(dtype), finite
    return torch.from_numpy(wide).to(dtype), finite


def stochastic(values, dtype, *, key=KEY, start=0):
    return rounded(values, dtype, by_chance=True, key=key, start=start)[0]


def random_bits(key, start, count):
    """The 32 random bits of each element as the format documents them: a hash of key and index."""
    index = np.arange(start, start + count, dtype=np.uint64)
    x = index.astype(np.uint32) ^ np.uint32(key & 0xFFFFFFFF)
    x += np.uint32(key >> 32 & 0xFFFFFFFF) + (index >> np.uint64(32)).astype(np.uint32) * np.uint32(
        0x9E3779B9
    )
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return x ^ (x >> np.uint32(16))


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
    values = torch.cat(
        [values, every_number(dtype).float(), torch.tensor([65519.99, -65519.99, 6.1e-5, 2e-8])]
    )
    found, finite = rounded(values, dtype, by_chance=False)
    assert torch.equal(found.view(torch.int16), values.to(dtype).view(torch.int16))
    assert finite == bool(torch.isfinite(found).all())


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wide_output_is_never_rounded_stochastically(wide):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=wide)
    assert torch.equal(stochastic(values, wide), values)


@given(st.floats(-60000, 60000, width=32), st.sampled_from(sorted(HALVES)), st.integers(-(2**63), 2**63 - 1))
def test_result_is_one_of_the_two_neighbours(value, name, key):
    found = float(stochastic(torch.full((64,), value), HALVES[name], key=key)[13])
    assert found in neighbours(value, HALVES[name])


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**34), st.integers(1, 5000))
def test_the_noise_is_the_documented_hash(key, start, count):
    """So a value rounds up exactly where its distance to the number below exceeds what the bits leave."""
    values = torch.linspace(1.0, 1.5, count)
    bits = (random_bits(key, start, count) & 0xFFFF).astype(np.int64)
    expected = (values.numpy().view(np.int32) + bits) >> 16
    found = stochastic(values, torch.bfloat16, key=key, start=start)
    assert np.array_equal(found.view(torch.int16).numpy().astype(np.int64), expected)


def test_the_noise_goes_on_beyond_four_billion_elements():
    values = torch.full((100,), 1.001)
    across = stochastic(values, torch.bfloat16, start=2**32 - 50)
    assert torch.equal(across[50:], stochastic(values[:50], torch.bfloat16, start=2**32))
    assert torch.equal(across[:50], stochastic(values[:50], torch.bfloat16, start=2**32 - 50))


def test_random_bits_are_even_in_every_bit_and_between_neighbours():
    n = 200_000
    bits = random_bits(KEY, 0, n)
    table = (bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(table.mean(axis=0) - 0.5).max() < 5 / math.sqrt(4 * n)
    low = (bits & 0xFFFF).astype(float)
    assert abs(np.corrcoef(low[:-1], low[1:])[0, 1]) < 5 / math.sqrt(n)


def test_names_and_seeds_have_bits_of_their_own():
    keys = [name_key(seed, name) for seed in (0, 1) for name in ("a", "b", "model.norm.weight")]
    drawn = [random_bits(key, 0, 20_000) & 0xFFFF for key in keys]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(20_000)


def test_head_and_embedding_share_their_bits():
    assert name_key(3, "lm_head.weight") == name_key(3, "model.embed_tokens.weight")
    assert name_key(3, "transformer.wte.weight") == name_key(3, "lm_head.weight")
    assert name_key(3, "lm_head.weight") != name_key(4, "lm_head.weight")


@pytest.mark.parametrize("by_chance", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_and_is_seen(dtype, by_chance, bad):
    values = torch.tensor([1.0, bad, -2.0])
    found, finite = rounded(values, dtype, by_chance=by_chance)
    assert not finite
    assert torch.equal(found.float(), values) or (math.isnan(bad) and bool(torch.isnan(found[1])))
    assert rounded(values[[0, 2]], dtype, by_chance=by_chance)[1]


@pytest.mark.parametrize("by_chance", [False, True])
def test_too_large_a_value_becomes_infinite_and_is_seen(by_chance):
    for dtype, largest in ((torch.float16, 70000.0), (torch.bfloat16, 3.4028e38)):
        found, finite = rounded(torch.tensor([1.0, largest]), dtype, by_chance=by_chance)
        assert finite == bool(torch.isfinite(found).all())
    assert not rounded(torch.tensor([70000.0]), torch.float16, by_chance=by_chance)[1]


def test_large_finite_values_are_finite():
    assert rounded(torch.full((10,), 3e38), torch.float32, by_chance=False)[1]
    assert rounded(torch.full((10,), 6e4), torch.float16, by_chance=False)[1]
    assert not rounded(torch.tensor([math.inf, -math.inf]), torch.float32, by_chance=False)[1]


def test_rounding_leaves_its_input_alone(dtype):
    values = torch.full((100,), 1.001)
    stochastic(values, dtype)
    assert torch.equal(values, torch.full((100,), 1.001))
