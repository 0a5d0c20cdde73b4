"""train.activation_checkpointing=offload: the bits of checkpointing alone, with what enters the layers elsewhere."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import CONFIG, sequences
from torch import nn

from rmx.attention.packing import PackingError
from rmx.config import ConfigError, LoraConfig, TrainConfig
from rmx.config_file import load_config
from rmx.models import forward, lora
from rmx.models.model import CausalLM
from rmx.training.train import train_adapter


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are saved on the host."""
    shapes: list[tuple[int, ...]] = []
    own = torch.autograd.graph.save_on_cpu

    class Seen(own):  # type: ignore[misc, valid-type]
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook

            def counted(tensor: torch.Tensor) -> Any:
                shapes.append(tuple(tensor.shape))
                return pack(tensor)

            self.pack_hook = counted

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Seen)
    return shapes


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_it_gives_the_bits_of_checkpointing_alone(
    tiny: CausalLM, moved: list[tuple[int, ...]], first_layer: int, packing: bool
) -> None:
    lm = dataclasses.replace(tiny, packing=packing)
    found = {}
    for how in (True, "offload"):
        adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4, first_layer=first_layer), 0)
        settings = TrainConfig.model_validate({**CONFIG.model_dump(), "epochs": 0.5, "activation_checkpointing": how})
        history = train_adapter(lm, adapter, sequences(), settings, 0)
        found[how] = [m.loss for m in history], [p.detach().clone() for p in adapter.parameters()], len(moved)
        lora.detach(lm.model, adapter)
    assert found[True][0] == found["offload"][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found["offload"][1], strict=True))
    assert (found[True][2] == 0) and moved
    tokens = [shape for shape in moved if shape[-1:] == (32,) and len(shape) == 3]
    assert len(tokens) == len(moved)  # hidden states, and neither weights nor anything of the loss
    passes = len(found[True][0])
    assert len(moved) % (2 - first_layer) == 0 and len(moved) >= passes * (2 - first_layer)


def test_the_layers_are_left_as_they_were(tiny: CausalLM) -> None:
    with forward.layer_options(tiny, TrainConfig(activation_checkpointing="offload")):
        assert all(layer.training for layer in tiny.model.model.layers)
    assert not any(module.training for module in tiny.model.modules())
    hidden = forward.final_hidden(tiny, [[5, 6, 7]])
    assert bool(torch.isfinite(hidden).all())


def test_layers_that_do_not_checkpoint_by_themselves_are_refused() -> None:
    with pytest.raises(PackingError, match=r"Linear cannot checkpoint its own activations: set train.activ"):
        forward._offloaded(nn.Linear(2, 2))


def test_another_word_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\nmodel: {name: m}\nproblems: {sources: [{jsonl: p.jsonl}]}\n")
    for value in ("disk", "1", "null"):
        message = r"train.activation_checkpointing: .*expected true, false or offload, got"
        with pytest.raises(ConfigError, match=message):
            load_config(path, [f"train.activation_checkpointing={value}"])
    assert load_config(path, ["train.activation_checkpointing=offload"]).train.activation_checkpointing == "offload"
    with pytest.raises(ConfigError, match="cannot be combined"):
        load_config(path, ["train={activation_checkpointing: offload, compile: true}"])
