"""Embeddings as words: ids beyond the vocabulary, and their vectors in the text encoder's table."""

import pytest
import torch
from small import SMALLEST, small_sd

from ldm.config import SD15, SD21
from ldm.embeddings import EmbeddingTokenizer, with_embeddings
from ldm.tokenizer import Tokenizer


@pytest.mark.parametrize("config", [SD15, SD21], ids=lambda config: config.name)
def test_a_name_has_its_ids_where_it_is_a_word(config):
    tokenizer = EmbeddingTokenizer(config.text, {"easynegative": 2, "bad-hands-5": 1, "bad-hands": 3, "<Cat-Toy>": 1})
    plain = Tokenizer(config.text).encode
    first = config.text.vocabulary
    easy, five, hands, cat = [first, first + 1], [first + 2], [first + 3, first + 4, first + 5], [first + 6]
    for text, want in [
        ("easynegative", easy),
        ("a EasyNegative, blurry", plain("a") + easy + plain(", blurry")),
        ("embedding:easynegative", easy),
        ("bad-hands-5 bad-hands", five + hands),  # the longer name comes first
        ("a <cat-toy>", plain("a") + cat),
        ("easynegative2", plain("easynegative2")),
        ("myeasynegative", plain("myeasynegative")),
        ("easy negative", plain("easy negative")),
        ("ea\u017fynegative", plain("ea\u017fynegative")),  # the long s matches s, and is none
        ("", []),
    ]:
        assert tokenizer.encode(text) == want, text
    assert (
        tokenizer.decode(tokenizer.encode("a red easynegative circle <Cat-Toy>"))
        == "a red easynegative circle <cat-toy>"
    )
    assert tokenizer.inner == {easy[1], *hands[1:]}


def test_vectors_stand_in_for_tokens():
    """Vectors that are the table's own rows give what those tokens give."""
    sd = small_sd(SMALLEST)
    ids = sd.tokenizer.encode("red circle")
    vectors = sd.text_encoder.token_embedding.weight[ids].clone()
    other = with_embeddings(sd, {"thing": vectors, "second": torch.zeros(1, SMALLEST.text.width)})
    prompts = ["a thing, small", "a small THING"]
    assert torch.equal(other.encode_text(prompts), sd.encode_text(["a red circle, small", "a small red circle"]))
    assert torch.equal(other.encode_text(["a second"]), other.encode_text(["a embedding:second"]))
    assert not torch.equal(other.encode_text(["a second"]), sd.encode_text(["a second"]))
    # The model that was given does not know them, and shares all else.
    assert len(sd.text_encoder.token_embedding.weight) == SMALLEST.text.vocabulary
    assert other.unet is sd.unet and other.text_encoder.blocks is sd.text_encoder.blocks
    assert with_embeddings(sd, {}) is sd


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_take_the_models_type(dtype):
    sd = small_sd(SMALLEST)
    sd.text_encoder.to(dtype)
    other = with_embeddings(sd, {"thing": torch.zeros(2, SMALLEST.text.width)})
    assert other.text_encoder.token_embedding.weight.dtype == dtype
    assert not other.text_encoder.token_embedding.weight.requires_grad
