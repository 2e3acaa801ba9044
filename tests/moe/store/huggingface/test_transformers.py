"""transformers itself loads what was exported, and computes what it computed before."""

import numpy as np
import pytest

from tests.moe.store.huggingface import models
from tests.moe.store.huggingface.models import DECODERS, FIXTURES, exchange

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [*DECODERS, "vit"])
def test_an_export_is_loaded(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    exchange("import", FIXTURES / name, tmp_path / "run")
    away = exchange("export", tmp_path / "run", tmp_path / "away")
    images = name in models.VITS
    kind = "AutoModelForImageClassification" if images else "AutoModelForCausalLM"
    model, report = getattr(transformers, kind).from_pretrained(
        away, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    told = models.expected(name)
    inputs = told["images"].transpose(0, 3, 1, 2) if images else told["tokens"].astype(np.int64)
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(np.ascontiguousarray(inputs))).logits.numpy()
    np.testing.assert_allclose(found, told["logits"], rtol=0, atol=1e-4)
    if not images:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(away / "tokenizer.json")
        )
        assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
