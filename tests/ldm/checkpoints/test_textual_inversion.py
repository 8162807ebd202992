"""Embeddings: the same vectors in every kind of file, and what is none."""

import pytest
import torch
from safetensors.torch import save_file
from small import error_of

from ldm.checkpoints.textual_inversion import read_embedding

VECTORS = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
A1111 = {"name": "x", "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None, "string_to_token": {"*": 265}}
FIRST = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": VECTORS})}
FILES = {
    "a.pt": {**A1111, "string_to_param": {"*": VECTORS.clone().requires_grad_()}},
    "first.pt": FIRST,
    "a.bin": {"<cat-toy>": VECTORS},
    "a.safetensors": {"emb_params": VECTORS},
    "b.safetensors": {"<cat-toy>": VECTORS},
}


def written(path, values):
    (save_file if path.suffix == ".safetensors" else torch.save)(values, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_same_vectors_from_every_kind_of_file(tmp_path, name):
    path = written(tmp_path / name, FILES[name])
    assert torch.equal(read_embedding(path, 768), VECTORS)
    said = "is an embedding for SD 1.x (context width 768), expected SD 2.x (context width 1024)"
    assert said in error_of(read_embedding, path, 1024)


def test_one_vector_and_half_precision(tmp_path):
    one = VECTORS[0].half()
    assert torch.equal(read_embedding(written(tmp_path / "a.bin", {"<cat>": one}), 768), one[None].float())


@pytest.mark.parametrize(
    "values, said",
    [
        ({"clip_l": VECTORS, "clip_g": torch.zeros(3, 1280)}, "is an embedding for SDXL or a later family, and only"),
        ({"<a>": VECTORS, "<b>": VECTORS + 1}, "it is damaged, or for several words"),
        ({"emb_params": torch.zeros(3, 768, dtype=torch.int32)}, "it is damaged"),
        ({"emb_params": torch.zeros(1, 3, 768)}, "it is damaged"),
        ({"emb_params": torch.zeros(0, 768)}, "has 0 vectors, expected 1 to 75"),
        ({"emb_params": torch.zeros(76, 768)}, "has 76 vectors, expected 1 to 75"),
        ({"emb_params": torch.full((2, 768), torch.nan)}, "has NaN or infinite numbers"),
        (
            {"lora_unet_x.alpha": torch.ones(2), "y": torch.ones(2)},
            "not an embedding for a word of a prompt: it is a LoRA",
        ),
        ({"model.diffusion_model.x": torch.zeros(2), "y": torch.ones(2)}, "it is a diffusion model of another"),
    ],
)
def test_what_is_none_is_said(tmp_path, values, said):
    assert said in error_of(read_embedding, written(tmp_path / "a.safetensors", values), 768)
