"""Which checkpoints the page offers."""

from ldm.checkpoints import published
from tools.page import models


def test_checkpoints_have_the_names_by_which_infer_py_finds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "WEIGHTS", tmp_path)
    monkeypatch.setattr(models, "kind_of", lambda *_: "base")
    (tmp_path / "sd-v1.5").mkdir()
    (tmp_path / "sd-v1.5" / "model_index.json").touch()
    (tmp_path / "v2.1.safetensors").touch()
    assert models.named("base") == ["sd-v1.5", "v2.1"] and not models.named("ControlNet")
    assert [published.find(name)[0].name for name in models.named("base")] == ["sd-v1.5", "v2.1.safetensors"]
