"""Where weights and moments lie while training: what each choice does to the result, and how one follows."""

from __future__ import annotations

import pytest
import torch
from test_passes import after, assert_alike, model, rows_of, settings

from palinode.models.loading import free_memory
from palinode.settings import TrainingSettings
from palinode.training import optimizers
from palinode.training.optimizers import BYTES


def trained(name: str, **others):
    live = model()
    curve = after(live, rows_of(12), chosen=settings(optimizer=name), **others)
    return live, [point.loss for point in curve]


@pytest.mark.parametrize("size", [64, optimizers.PIECE])
def test_weights_in_host_memory_are_trained_bit_for_bit_alike(monkeypatch, size):
    """In pieces too: all of a tensor are of one step."""
    monkeypatch.setattr(optimizers, "PIECE", size)
    (plain, losses), (held, again) = trained("device"), trained("host")
    assert losses == again
    for name, value in held.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_moments_in_8_bits_lead_nearly_to_the_same_weights():
    pytest.importorskip("bitsandbytes")
    (plain, losses), (held, again) = trained("device"), trained("8bit")
    assert again == pytest.approx(losses, rel=1e-2)
    start, moved, other = (
        torch.cat([value.flatten() for value in one.parameters()]) for one in (model(), plain, held)
    )
    assert torch.cosine_similarity(moved - start, other - start, dim=0) > 0.9


def test_bfloat16_copies_are_trained_by_their_float32_weights():
    live, plain = model(), model()
    narrow = settings(optimizer="host").model_copy(update={"precision": "bfloat16"})
    after(live, rows_of(12), chosen=narrow)
    after(plain, rows_of(12), chosen=narrow.model_copy(update={"optimizer": "device"}))
    assert {value.dtype for value in live.parameters()} == {torch.bfloat16}
    for name, value in live.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, plain.state_dict()[name], rtol=0, atol=2e-3)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in live.state_dict().values())
    assert live.state_dict()["lm_head.weight"] is live.state_dict()["model.embed_tokens.weight"]


class Stop(KeyboardInterrupt):
    pass


def at_the_third_step():
    """What hears of steps, and is interrupted at the third."""
    left = [3]

    def stop(_tokens):
        left[0] -= 1
        if not left[0]:
            raise Stop

    return stop


@pytest.mark.parametrize("name", ["device", "8bit", "host"])
def test_a_run_that_was_interrupted_goes_on_alike(tmp_path, name):
    if name == "8bit":
        pytest.importorskip("bitsandbytes")
    whole, losses = trained(name)
    with pytest.raises(Stop):
        trained(name, state=tmp_path / "state", on_progress=at_the_third_step())
    again, rest = trained(name, state=tmp_path / "state")
    assert rest == losses
    assert_alike(whole, again)


@pytest.mark.filterwarnings("ignore")
def test_where_passes_cannot_be_divided_further_the_optimiser_makes_room(tmp_path):
    plain, losses = trained("device")
    live, said = model(), list[str]()

    def look(_model, _args, given):
        if live.training and not any("host memory" in line for line in said):
            raise torch.OutOfMemoryError("CUDA out of memory")

    live.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Stop):
        after(live, rows_of(12), state=tmp_path / "state", say=said.append, on_progress=at_the_third_step())
    assert "(optimizer = 'host')" in said[-1]
    again = model()  # which begins as the settings say, and finds that the run had gone on otherwise
    curve = after(again, rows_of(12), state=tmp_path / "state")
    assert {point.optimizer for point in curve} == {"host"}
    assert [point.loss for point in curve] == pytest.approx(losses, abs=1e-5)
    for name, value in again.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[name], rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_moments_that_have_no_room_are_made_elsewhere(monkeypatch):
    plain, losses = trained("device")

    def full(_self, *_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    live, said = model(), list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", full)
        patched.setattr("importlib.util.find_spec", lambda _name: None)
        curve = after(live, rows_of(12), say=said.append)
    assert said[0].startswith("there is no room for the moments of all weights")
    assert len(curve) == len(losses)
    start, moved, other = (
        torch.cat([value.flatten() for value in one.state_dict().values()]) for one in (model(), plain, live)
    )
    assert torch.cosine_similarity(moved - start, other - start, dim=0) > 0.9


def test_what_torch_keeps_for_later_is_free(monkeypatch):
    for name, found in {"mem_get_info": (10, 80), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, found=found: found)
    assert free_memory(torch.device("cuda")) == 40


def test_each_choice_holds_less_on_the_device():
    there = [sum(own[:3]) for own in BYTES.values()]
    assert there == sorted(there, reverse=True)


def test_the_choice_decides_the_result_unless_it_is_the_usual_one():
    keys = [TrainingSettings(optimizer=name).key() for name in ("auto", "device", "8bit", "host")]
    assert keys[0] == keys[1] == TrainingSettings().key()
    assert len({str(key) for key in keys}) == 3
