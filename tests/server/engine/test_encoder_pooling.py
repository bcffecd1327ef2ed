"""How vectors are pooled: as the files of sentence-transformers beside a model say, or not at all."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import embedded_alone, random_texts, save_encoder, tiny_encoder

from deltaserve.delta_store.errors import UnsupportedCheckpoint
from deltaserve.server.engine.encoder import EncoderEngine
from deltaserve.server.engine.limits import EngineLimits

SMALL = EngineLimits(bank_slots=4, batch_tokens=64, max_running=4, max_waiting=60)

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("config", "cls"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, False),
        ({"pooling_mode": "cls"}, True),
    ],
)
def test_pooling_is_what_the_model_s_files_say(tmp_path: Path, config: Any, cls: bool, normalised: bool) -> None:
    base = tiny_encoder()
    folder = save_encoder(base, tmp_path / "base")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(MODULES if normalised else MODULES[:2]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    engine = EncoderEngine(folder, limits=SMALL)
    assert engine.context_length == 20
    engine.start()
    text = random_texts(1, 4, longest=20)[0]
    expected = embedded_alone(base, text, cls=cls, normalised=normalised)
    (found,) = asyncio.run(engine.embed([text], None))
    engine.stop()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_modules_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_encoder(tiny_encoder(), tmp_path / "base")
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text(json.dumps([*MODULES[:2], dense]))
    with pytest.raises(UnsupportedCheckpoint, match="has a Dense"):
        EncoderEngine(folder, limits=SMALL)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedCheckpoint, match="pools by max_tokens"):
        EncoderEngine(folder, limits=SMALL)
