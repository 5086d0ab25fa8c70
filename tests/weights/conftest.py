"""Hand-made model folders for the tests of the weight layer, written and read by safetensors itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palinode.weights import Checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


class Models:
    """Writes model folders below one place and reads them back."""

    def __init__(self, place: Path):
        self.place = place

    def write(self, name, tensors, *, shards=1, **config) -> Path:
        """Write a folder; with several shards, tensors are dealt out to them in turn."""
        folder = self.place / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        hands = [dict(list(tensors.items())[start::shards]) for start in range(shards)]
        files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
        for file, hand in zip(files, hands, strict=True):
            save_file(hand, folder / file, {"format": "pt"})
        index = {name: file for file, hand in zip(files, hands, strict=True) for name in hand}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        )
        return folder

    def make(self, name, tensors, **options) -> Checkpoint:
        return Checkpoint.open(self.write(name, tensors, **options))

    @staticmethod
    def read(folder) -> dict[str, torch.Tensor]:
        """All tensors of a folder, as the safetensors library reads them."""
        return {
            name: tensor
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    @staticmethod
    def config(folder) -> dict:
        return json.loads((Path(folder) / "config.json").read_text())

    @staticmethod
    def noise(seed, *shape, scale=1.0, dtype=torch.float32) -> torch.Tensor:
        """Normal numbers that every run sees alike."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    @staticmethod
    def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
        """Equal in dtype, shape and every bit: 0.0 is not -0.0 here."""
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    def same_model(self, first, second) -> bool:
        a, b = self.read(first), self.read(second)
        return a.keys() == b.keys() and all(self.same_bits(a[name], b[name]) for name in a)


@pytest.fixture
def models(tmp_path) -> Models:
    return Models(tmp_path)


@pytest.fixture
def four(models):
    """target, base, θ_1, θ_2: neighbouring float32 states of one small model."""
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (8, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (12, 8),
    }

    def state(seed):
        return {
            name: models.noise(place, *shape) + models.noise(10 * place + seed, *shape, scale=1e-3)
            for place, (name, shape) in enumerate(shapes.items(), start=1)
        }

    return [models.make(name, state(i)) for i, name in enumerate(["target", "base", "theta_1", "theta_2"])]
