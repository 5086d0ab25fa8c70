"""A sum put into a live model has, parameter by parameter, the bits that `save` would write."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.models import load_model, put
from palinode.weights import Checkpoint

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
