"""Attention of one new token a sequence: the native kernel against torch's, and what is left to transformers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny import save_tiny_model
from torch import Tensor

from rmx.attention import decode as decode_attention
from rmx.attention.decode import decode, fits
from rmx.config import ModelConfig
from rmx.models.model import CausalLM, load
from rmx.sampling import engines
from rmx.sampling.engines import Decoder
from rmx_kernels import native

needs_native = pytest.mark.skipif(bool(native.missing()), reason="the native kernels were not built")


def tensors(B: int, Hk: int, G: int, L: int, D: int, room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B * L + D)
    q = torch.randn(B, Hk * G, 1, D, generator=generator)
    k, v = (torch.randn(B, Hk, L + room, D, generator=generator)[:, :, :L] for _ in range(2))
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """[B, 1, Hq, D] in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    bias = None if bias is None or bias.dtype == torch.bool else bias.double()
    out: Tensor = F.scaled_dot_product_attention(q.double(), k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)


@needs_native
@pytest.mark.parametrize(
    ("B", "Hk", "G", "L", "D"),
    [
        (1, 1, 1, 1, 16),
        (3, 3, 3, 70, 64),
        (2, 2, 8, 65, 128),
        (5, 1, 64, 130, 80),
        (2, 4, 1, 64, 32),
        (1, 2, 3, 17, 96),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_attention(B: int, Hk: int, G: int, L: int, D: int, scale: float | None) -> None:
    q, k, v = tensors(B, Hk, G, L, D, room=5)
    seen = torch.ones(B, 1, 1, L, dtype=torch.bool)
    for row in range(B):
        seen[row, ..., : min(row, L - 1)] = False
    bias = torch.zeros(B, 1, 1, L).masked_fill(~seen, float("-inf"))
    expected = exact(q, k, v, bias, scale)
    for mask in (seen, bias):
        assert fits(q, k, v, mask)
        got = decode(q, k, v, mask, scale)
        assert got.shape == (B, 1, Hk * G, D)
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(decode(q, k, v, None, scale).double(), exact(q, k, v, None, scale), atol=2e-6, rtol=2e-6)


@needs_native
def test_hidden_keys_do_not_matter() -> None:
    q, k, v = tensors(2, 3, 3, 40, 64)
    seen = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    seen[..., :7] = False
    before = decode(q, k, v, seen, None)
    k[:, :, :7], v[:, :, :7] = 1e30, 1e30
    assert torch.equal(decode(q, k, v, seen, None), before)


@needs_native
def test_a_row_depends_on_nothing_else_and_large_scores_do_not_overflow() -> None:
    q, k, v = tensors(33, 3, 3, 50, 64)
    q *= 200
    whole = decode(q, k, v, None, None)
    assert bool(torch.isfinite(whole).all())
    torch.set_num_threads(2)
    try:
        assert torch.equal(decode(q, k, v, None, None), whole)
    finally:
        torch.set_num_threads(1)
    for row in (0, 17, 32):
        assert torch.equal(decode(q[row : row + 1], k[row : row + 1], v[row : row + 1], None, None)[0], whole[row])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (torch.cat([q, q], 2), k, v),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q[..., :8], k[..., :8].contiguous(), v[..., :8].contiguous()),
        lambda q, k, v: (q, k, v[..., :32].contiguous()),
        lambda q, k, v: (q.requires_grad_(), k, v),
    ],
)
def test_what_the_kernel_does_not_do_is_left_alone(change: Any) -> None:
    assert not fits(*change(*tensors(2, 2, 3, 20, 64)), None)


@needs_native
def test_decoding_uses_it_and_gives_the_hidden_states_of_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(ModelConfig(name=str(save_tiny_model(tmp_path / "tiny", hidden_size=64)), dtype="float32", device="cpu"))

    def states() -> Tensor:
        with torch.no_grad():
            decoder = Decoder(lm, [[5, 6, 7], [8, 9, 10, 11, 12]], 2)
            for token in (3, 4, 5):
                decoder.read(torch.full((4,), token))
        assert lm.model.config._attn_implementation == "sdpa"
        return decoder.hidden

    with mock.patch.object(decode_attention, "decode", wraps=decode) as kernel:
        got = states()
    assert kernel.call_count == 3 * lm.model.config.num_hidden_layers
    monkeypatch.setattr(engines, "decoding", nullcontext)
    torch.testing.assert_close(got, states(), atol=1e-5, rtol=1e-5)


def test_without_the_kernel_it_is_sdpa(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's heads are 8 wide, which the kernel does not take."""
    with mock.patch.object(decode_attention, "decode", wraps=decode) as kernel, torch.no_grad():
        got = Decoder(tiny, [[5, 6, 7], [8, 9]], 1)
        got.read(torch.tensor([3, 4]))
    assert kernel.call_count == 0
    monkeypatch.setattr(engines, "decoding", nullcontext)
    with torch.no_grad():
        expected = Decoder(tiny, [[5, 6, 7], [8, 9]], 1)
        expected.read(torch.tensor([3, 4]))
    assert torch.equal(got.hidden, expected.hidden)
