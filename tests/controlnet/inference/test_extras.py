"""LoRAs and embeddings by name: what the prompts and options of infer.py mean by them, and what is said."""

import pytest
import torch
from safetensors.torch import save_file
from small import SMALL

from controlnet.inference.extras import find_extras
from controlnet.inference.options import Options

WIDTH = SMALL.text.width
LORA = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """ink is a LoRA, easynegative and calm are embeddings; tiny is a base that is not one."""
    monkeypatch.setattr("ldm.checkpoints.published.WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    for folder in ("loras", "embeddings", "other"):
        (tmp_path / folder).mkdir()
    factors = {f"{LORA}.lora_down.weight": torch.ones(2, WIDTH), f"{LORA}.lora_up.weight": torch.ones(4 * WIDTH, 2)}
    for path in ("ink.safetensors", "loras/oil.safetensors", "other/pen.safetensors"):
        save_file(factors, path)
    save_file({"emb_params": torch.ones(2, WIDTH)}, "easynegative.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(3, WIDTH)}}, "embeddings/Calm.pt")
    save_file({"emb_params": torch.ones(4, WIDTH)}, "other/mine.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, "tiny.safetensors")
    return tmp_path


def found(recorded=(), **options):
    return find_extras(Options(**options), SMALL, recorded)


def sizes(extras):
    return {name: len(vectors) for name, vectors in extras.embeddings.items()}


def test_loras_of_the_options_and_of_the_prompt(weights):
    extras = found(lora=["ink:0.5", "other/pen.safetensors"], prompt="a <lora:oil:-0.3> bird <lora:ink>")
    assert extras.loras == (
        f"{weights / 'ink.safetensors'}:0.5",
        "other/pen.safetensors:1.0",
        f"{weights / 'loras' / 'oil.safetensors'}:-0.3",
        f"{weights / 'ink.safetensors'}:1.0",
    )
    assert list(extras.files) == ["ink", "other/pen.safetensors", "lora:oil", "lora:ink"]
    assert found(prompt="a tiny bird") == found()


def test_embeddings_are_found_by_their_words(capsys):
    extras = found(prompt="a tiny bird, (calm:1.2)", negative="EasyNegative, embedding:calm")
    assert sizes(extras) == {"easynegative": 2, "Calm": 3}
    assert set(extras.files) == {"embedding:easynegative", "embedding:calm"}
    assert len(extras.tokenizer(SMALL.text).encode("a calm easynegative")) == 3 + 2 + 1
    assert sizes(found(prompt="<lora:ink:1> inky calmness, not easynegative2")) == {}
    assert sizes(found(prompt="mine", embedding=["other/mine.safetensors"])) == {"mine": 4}
    assert capsys.readouterr().err == ""
    assert sizes(found(embedding=["other/mine.safetensors"])) == {"mine": 4}
    assert 'the prompts do not name the embedding "mine": it has no effect' in capsys.readouterr().err


def test_letters_that_match_others_are_no_names():
    """Without regard to case the dotless i of Turkish matches i, and the long s matches s."""
    for name in ("sinif", "sinif2"):
        save_file({"emb_params": torch.ones(2, WIDTH)}, f"embeddings/{name}.safetensors")
    assert sizes(found(prompt="a s\u0131n\u0131f, sinif2")) == {"sinif2": 2}


def test_a_name_of_a_lora_is_no_word_of_the_prompt():
    save_file({"emb_params": torch.ones(2, WIDTH)}, "embeddings/ink.safetensors")
    assert sizes(found(prompt="a bird <lora:ink:0.5>")) == {}


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(prompt="<lora:chalk:0.8>"),
            'there is no LoRA "chalk", neither as a file nor in weights/ or weights/loras/: ',
        ),
        (dict(prompt="<lora:../other/pen:1>"), 'there is no LoRA "../other/pen"'),
        (dict(prompt="<lora:ink:strong>"), '"<lora:ink:strong>" in the prompt has no finite strength'),
        (dict(prompt="<lora:ink:inf>"), "has no finite strength"),
        (dict(negative="<lora:ink:1>"), "the negative prompt names a LoRA, which acts on the whole image"),
        (dict(prompt="<lora:tiny:1>"), "is not a LoRA: it is a diffusion model"),
        (dict(prompt="<lora:ink:1>" * 33), "there are 33 LoRAs, expected at most 32"),
        (dict(lora=["chalk:1"]), 'there is no LoRA "chalk"'),
        (
            dict(prompt="embedding:chalk"),
            'there is no embedding "chalk", neither as a file nor in weights/ or weights/embedd',
        ),
        (dict(negative="easynegative, (embedding:ea:1.2)"), 'there is no embedding "ea"'),
        (dict(embedding=["chalk.pt"]), 'there is no embedding "chalk.pt"'),
        (dict(embedding=["ink"]), "is not an embedding for a word of a prompt: it is a LoRA"),
        (dict(prompt="wide"), "is an embedding for SD 2.x (context width 1024), expected a model (context width 16)"),
    ],
)
def test_what_cannot_be_is_a_sentence(options, said):
    save_file({"emb_params": torch.ones(2, 1024)}, "embeddings/wide.safetensors")
    with pytest.raises(ValueError) as error:
        found(**options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_image_for_again_needs_what_it_was_made_with(capsys):
    with pytest.raises(ValueError, match='there is no embedding "gone"'):
        found(["tiny", "embedding:gone"], prompt="a gone bird")
    assert sizes(found(["tiny", "embedding:gone"], prompt="another bird")) == {}
    found(["tiny", "embedding:calm"], prompt="calm")
    assert capsys.readouterr().err == ""
    found(["tiny"], prompt="calm")
    assert "is an embedding by now: the image was made without it" in capsys.readouterr().err
