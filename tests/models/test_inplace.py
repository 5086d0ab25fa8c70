"""A sum put into a live model has, parameter by parameter, the bits that `save` would write."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.models import load_model, put
from palinode.models.inplace import LiveModel, rounded
from palinode.weights import Checkpoint, kernels, save_vector
from palinode.weights.arithmetic import name_key

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tiny(seed, *, tied=True, layers=1):
    """A Llama of some thousand weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def write(model, folder) -> Checkpoint:
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(params=["tied", "untied"])
def tied(request):
    return request.param == "tied"


@pytest.fixture
def states(tmp_path, tied):
    """target (bfloat16), base and θ_1 (float32) on disk."""
    start = tiny(0, tied=tied)
    made = []
    for number, (name, dtype) in enumerate(
        (("target", torch.bfloat16), ("base", torch.float32), ("theta_1", torch.float32))
    ):
        model = tiny(0, tied=tied)
        model.load_state_dict(start.state_dict())
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        made.append(write(model.to(dtype), tmp_path / name))
    return made


def load(checkpoint):
    return load_model(checkpoint, device=torch.device("cpu"))


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_put_gives_the_bits_that_save_writes(states, tmp_path, tied, dtype, rounding):
    target, base, theta_1 = states
    point = target - 0.7 * (theta_1 - base)
    saved = point.save(tmp_path / "out", dtype=dtype, rounding=rounding, seed=3)
    live = load(target)
    put(point, live, dtype=dtype, rounding=rounding, seed=3)
    assert same(bits(live), bits(load(saved.checkpoint)))
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in bits(live).items():
        assert torch.equal(values, on_disk[name].float())
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(live(ids).logits, load(saved.checkpoint)(ids).logits)


def test_putting_the_target_brings_it_back_bit_for_bit(states):
    target, base, theta_1 = states
    live = load(target)
    before = bits(live)
    put(target + 2.0 * (theta_1 - base), live)
    assert not same(bits(live), before)
    put(target, live)
    assert same(bits(live), before)


def test_points_can_follow_one_another_in_any_order(states):
    target, base, theta_1 = states
    live, fresh = load(target), load(target)
    for alpha in (0.5, 1.5, 0.25):
        put(target - alpha * (theta_1 - base), live)
    put(target - 0.25 * (theta_1 - base), fresh)
    assert same(bits(live), bits(fresh))


def test_a_tied_model_stays_tied(tmp_path):
    target, base = (write(tiny(seed), tmp_path / str(seed)) for seed in (0, 1))
    live = load(target)
    put(target - 0.5 * (base - target), live)
    assert live.lm_head.weight is live.model.embed_tokens.weight
    d, zero = (load_file(state.folder / "model.safetensors")[EMBEDDING] for state in (target, base))
    assert torch.allclose(live.lm_head.weight, d - 0.5 * (zero - d))


def test_a_tied_model_whose_file_holds_both_copies_loads_tied_after_save(tmp_path):
    target, base = (write(tiny(seed).bfloat16(), tmp_path / str(seed)) for seed in (0, 1))
    tensors = load_file(target.folder / "model.safetensors")
    save_file(
        tensors | {HEAD: tensors[EMBEDDING].clone()}, target.folder / "model.safetensors", {"format": "pt"}
    )
    target = Checkpoint.open(target.folder)
    point = target - 0.3 * (base - target)
    saved = point.save(tmp_path / "out")
    model, live = load(saved.checkpoint), load(target)
    put(point, live)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(bits(model), bits(live))


def test_a_checkpoint_that_does_not_take_part_is_not_opened(states):
    target, base, theta_1 = states
    (theta_1.folder / "model.safetensors").unlink()
    put(target - 0.0 * (theta_1 - base), load(target))
    put(target - (target - base), load(target))


def test_renamed_parameters_are_refused(states, tmp_path):
    target, *_ = states
    live = load(target)
    before = bits(live)
    file = target.folder / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b"up_proj") == 1
    file.write_bytes(content.replace(b"up_proj", b"upwards"))
    with pytest.raises(
        MismatchError, match=r"parameter model\.layers\.0\.mlp\.up_proj\.weight has no counterpart"
    ):
        put(Checkpoint.open(target.folder), live)
    assert same(bits(live), before)


def test_a_model_of_another_shape_is_refused(states, tmp_path, tied):
    with pytest.raises(MismatchError, match="has no counterpart in"):
        put(states[0], tiny(0, tied=tied, layers=2))


def test_an_untied_model_does_not_take_a_tied_checkpoint(tmp_path):
    target = write(tiny(0, tied=True), tmp_path / "target")
    with pytest.raises(MismatchError, match=r"the live model has lm_head\.weight apart from its embedding"):
        put(target, tiny(0, tied=False))


def test_points_that_do_not_fit_together_are_refused(states, tmp_path, tied):
    other = write(tiny(0, tied=not tied), tmp_path / "other")
    with pytest.raises(MismatchError, match="tied to the embedding"):
        put(states[0] - (other - states[1]), load(states[0]))


def test_values_that_are_not_finite_are_refused(states):
    target, base, theta_1 = states
    live = load(target)
    tensors = load_file(theta_1.folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, theta_1.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"theta_1 holds 1 NaN and 0 infinite values in 1 tensors \(first: model\.norm"
    ):
        put(target - (Checkpoint.open(theta_1.folder) - base), live)
    with pytest.raises(InputError, match="that float16 cannot hold"):
        put(target - 1e9 * (base - target), live, dtype="float16")


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"rounding": "up"}])
def test_options_are_checked(states, options):
    with pytest.raises(InputError, match="choose one of"):
        put(states[0], load(states[0]), **options)


def test_threads_are_left_as_they_were(states):
    target, base, theta_1 = states
    threads = torch.get_num_threads()
    put(target - (theta_1 - base), load(target))
    assert torch.get_num_threads() == threads


@pytest.fixture
def sums(states, tmp_path):
    """Sums of the states, with a stored vector, terms that cancel, and another pivot than the target."""
    target, base, theta_1 = states
    stored = save_vector(theta_1 - base, tmp_path / "vector", rank=2)
    return [
        target - 0.7 * (theta_1 - base),
        target - 0.7 * (theta_1 - base) + 0.7 * (base - target),
        target - 0.3 * stored,
        target,
        target - 0.3 * stored + 0.1 * (base - theta_1),
        theta_1 + 0.5 * (base - target),
        target + 0.25 * (theta_1 - theta_1),
    ]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32", "float64"])
def test_sums_of_what_a_device_holds_have_the_same_bits(states, sums, dtype, rounding, precision):
    target = states[0]
    held, plain = LiveModel(load(target), held=True), load(target)
    for scale in (1.0, 40.0):
        for place, point in enumerate(sums):
            moved = target + scale * (point - target) if place else point
            settings = {"dtype": dtype, "rounding": rounding, "seed": place, "precision": precision}
            held.put(moved, **settings)
            put(moved, plain, **settings)
            assert same(bits(held.model), bits(plain))


def test_sums_of_float64_and_of_float32_follow_one_another(states, tmp_path):
    target, base, theta_1 = states
    wide = write(load(base).double(), tmp_path / "wide")
    held, plain = LiveModel(load(target), held=True), load(target)
    stored = save_vector(theta_1 - base, tmp_path / "vector", rank=2)
    for point in (
        target - 0.3 * stored,
        target - 0.3 * stored + 0.2 * (theta_1 - wide),
        target - 0.5 * stored,
    ):
        held.put(point, dtype="float32")
        put(point, plain, dtype="float32")
        assert same(bits(held.model), bits(plain))


@pytest.mark.parametrize("held", [True, False])
def test_a_sum_that_no_tensor_takes_leaves_the_model_as_it_is(states, held):
    target, base, theta_1 = states
    model = load(target)
    before = bits(model)
    LiveModel(model, held=held).put(target - (theta_1 - base), only=lambda _: False)
    assert same(bits(model), before)


@pytest.mark.parametrize("first", [0, 12_288, (1 << 32) - (1 << 15), 5 << 32])
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, kernels.BFLOAT16), (torch.float16, kernels.FLOAT16)]
)
def test_rounding_on_a_device_has_the_bits_of_the_kernels(first, dtype, kind):
    """For every exponent from denormal numbers to the largest, of both signs, anywhere in a large tensor."""
    noise = np.random.default_rng(0).integers(0, 1 << 23, 255 * 64, dtype=np.uint32)
    values = (noise | np.repeat(np.arange(255, dtype=np.uint32) << 23, 64)).view(np.float32)
    values = np.concatenate([values, -values])
    key = name_key(3, "a.weight")
    halves, wides = np.empty(len(values), np.uint16), np.empty_like(values)
    kernels.combine(
        (False, np.empty((0, 0), np.uint16), values[None], np.empty((0, len(values)), np.float32)),
        len(values),
        (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)),
        (kind, True, np.int64(key)),
        np.int64(first),
        (0, 0, np.empty((0, 1), np.float32), kernels.totals_of(0)),
        (halves, wides),
    )
    found = rounded(torch.from_numpy(values), dtype, key, first)
    with np.errstate(over="ignore"):
        wanted = halves if kind == kernels.BFLOAT16 else wides.astype(np.float16).view(np.uint16)
    assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16), wanted)


def test_a_point_on_a_device_reads_no_file_and_waits_once(states, tmp_path):
    target, base, theta_1 = states
    stored, held = save_vector(theta_1 - base, tmp_path / "vector"), LiveModel(load(target), held=True)
    held.put(target - 0.3 * stored, rounding="nearest")
    opened = []
    sys.addaudithook(lambda event, facts: opened.append(facts[0]) if event == "open" else None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        held.put(target - 0.4 * stored, rounding="nearest")
    read = [str(place) for place in opened if str(place).endswith(".safetensors")]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert read in ([], [str(target.folder / "model.safetensors")])  # its header, to see that it is the same
    assert counts["aten::_local_scalar_dense"] == 1
    assert counts["aten::mul"] <= len(target.tensors) + 1  # a scale each, and one for the end
