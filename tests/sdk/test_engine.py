from pathlib import Path

import numpy as np

from mdf_sdk.engine import Engine


def test_the_decoder_is_fed_the_rows_behind_the_prefix(toy_engine: Path) -> None:
    with Engine(toy_engine) as engine:
        packed = engine.prompt.pack([engine.prompt.encode(text) for text in ("ab", "abcdef")])
        tensors = engine.text_tensors(packed)
    prefix, total = packed.prefix_length, packed.input_ids.shape[1]
    fed = total - prefix
    assert prefix > 0
    rows = np.load(toy_engine / "embeddings.npy")
    np.testing.assert_array_equal(tensors["inputs_embeds"], rows[packed.input_ids[:, -fed:]])
    np.testing.assert_array_equal(tensors["position_ids"], packed.position_ids[:, -fed:])
    np.testing.assert_array_equal(tensors["body_mask"], packed.body_mask[:, -fed:])
    assert tensors["attention_mask"].shape == (2, 1, fed, total)
    np.testing.assert_array_equal(tensors["attention_mask"][:, 0], packed.attention_mask[:, -fed:])


def test_a_block_is_loaded_once(toy_engine: Path) -> None:
    with Engine(toy_engine) as engine:
        assert engine.open("vision") is engine.open("vision")
