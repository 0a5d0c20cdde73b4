"""Every causal-LM architecture of transformers: served with the right numbers, or refused by name.

A few in each run; all of them by ``pytest -m slow tests/rmx/test_zoo.py``.
"""

import pytest
import zoo

HARD = {  # what makes it so
    "bloom": "positions through the row",
    "deepseek_v3": "keys wider than values, experts",
    "falcon_h1": "a state space beside attention",
    "gpt_oss": "attention sinks",
    "lfm2": "convolutions",
    "llama4_text": "a decoder that get_decoder does not find",
    "minicpm3": "states that are scaled before the head",
    "mamba": "a state space",
    "modernbert-decoder": "layers between states and head",
    "prophetnet": "two streams of states",
    "qwen3_5_text": "linear attention",
    "recurrent_gemma": "a softcap under another name, states in its layers",
    "rwkv": "a state that is in no cache",
}
REFUSED = {  # all that are; the rest of HARD is served
    "head": ["modernbert-decoder", "prophetnet"],
    "packing": ["bloom", "falcon_h1", "gpt_oss", "lfm2", "mamba", "qwen3_5_text", "recurrent_gemma", "rwkv"],
    "loop engine": ["recurrent_gemma", "rwkv"],
    "adapter": ["deepseek_v3", "falcon_h1", "llama4_text", "mamba"],
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", zoo.CHECKS)
@pytest.mark.parametrize("kind", [kind for kind in HARD if kind in zoo.architectures()])
def test_hard_architectures(kind: str, name: str) -> None:
    refused = kind in REFUSED[name] + REFUSED["head"]
    assert (zoo.outcome(kind, name) != "yes") == refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", zoo.architectures())
def test_every_architecture(kind: str) -> None:
    """Right or refused: all but an RmxError fails."""
    if why := zoo.why_not_built(kind):
        pytest.skip(f"not built: {why}")
    for name in zoo.CHECKS:
        assert zoo.outcome(kind, name)
