"""Decoding with a cache is the full forward, and text streams as text."""

from __future__ import annotations

import pytest
import torch

from bs_modules.lm.build import build_model, trained_layout
from bs_modules.lm.generate import Decoder, Rereader, generate, stream_text
from bs_modules.testing import tiny_settings


@pytest.fixture(params=["base", "hierarchical", "dense"])
def model_and_layout(request):
    settings = tiny_settings(attention=request.param)
    model = build_model(settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, trained_layout(settings)


def text_of(length, seed=0):
    return bytes(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("chunks", [[96], [1] * 96, [16] * 6, [5, 1, 40, 3, 47], [95, 1]])
def test_scores_with_a_cache_equal_those_of_the_full_forward(model_and_layout, chunks):
    model, layout = model_and_layout
    text = text_of(96)
    decoder = Decoder(model, layout)
    parts, start = [], 0
    for chunk in chunks:
        parts.append(decoder.feed(text[start : start + chunk]))
        start += chunk
    full = model(torch.tensor(list(text))[None])[0].detach()
    torch.testing.assert_close(torch.cat(parts), full, rtol=1e-4, atol=1e-4)


def test_greedy_generation_is_teacher_forcing(model_and_layout):
    model, layout = model_and_layout
    prompt = text_of(20)
    made = bytes(generate(model, layout, prompt, 76, temperature=0))
    # All 96 at once, because a density makes other rows at other lengths.
    scores = model(torch.tensor(list(prompt + made))[None])[0, 19:-1].detach()
    taken = scores.gather(1, torch.tensor(list(made))[:, None])[:, 0]
    # The likeliest byte at every position, but for ties that rounding may break either way.
    torch.testing.assert_close(taken, scores.max(-1).values, rtol=1e-4, atol=1e-4)


def test_sampling_depends_on_the_seed_alone(model_and_layout):
    model, layout = model_and_layout
    first = bytes(generate(model, layout, b"abc", 40, seed=1))
    assert bytes(generate(model, layout, b"abc", 40, seed=1)) == first
    assert bytes(generate(model, layout, b"abc", 40, seed=2)) != first


def test_top_one_is_greedy(model_and_layout):
    model, layout = model_and_layout
    assert bytes(generate(model, layout, b"abc", 30, top_k=1)) == bytes(
        generate(model, layout, b"abc", 30, temperature=0)
    )


def test_a_text_longer_than_the_context_goes_on(model_and_layout):
    model, layout = model_and_layout
    prompt = text_of(300)
    made = bytes(generate(model, layout, prompt, 130, temperature=0))
    assert len(made) == 130
    scores = Decoder(model, layout).feed(prompt[-95:])[-1]
    assert made[0] == scores.argmax()
    assert list(generate(model, layout, b"x", 0)) == []


def test_the_cache_is_never_overfull(model_and_layout):
    decoder = Decoder(*model_and_layout)
    decoder.feed(text_of(90))
    with pytest.raises(ValueError, match="expected 1 to 6 bytes, got 7"):
        decoder.feed(text_of(7))
    with pytest.raises(ValueError, match="got 0"):
        decoder.feed(b"")


def test_bytes_become_text_when_a_character_is_complete():
    pieces = list(stream_text(iter("aé€😀".encode())))
    assert pieces == ["a", "é", "€", "😀"]
    assert "".join(stream_text(iter(b"a\xffb\xe2\x82"))) == "a�b�"


@pytest.mark.parametrize("query_block_size", [1, 16])
def test_a_gated_model_generates_what_it_would_score_highest(query_block_size):
    settings = tiny_settings(attention="adaptive", query_block_size=query_block_size, density=0.3)
    model = build_model(settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    assert trained_layout(settings) is None
    text = text_of(96)
    full = model(torch.tensor(list(text))[None])[0].detach()
    reader = Rereader(model, 96)
    # What fills the text up is not read: the same bits.
    assert torch.equal(torch.cat([reader.feed(text[:5]), reader.feed(text[5:70]), reader.feed(text[70:])]), full)
    prompt = text_of(20)
    made = bytes(generate(model, 96, prompt, 76, temperature=0))
    scores = model(torch.tensor(list(prompt + made))[None])[0, 19:-1].detach()
    assert list(made) == scores.argmax(-1).tolist()
    assert len(list(generate(model, 96, text_of(300), 60))) == 60
    with pytest.raises(ValueError, match="expected 1 to 96 bytes, got 97"):
        Rereader(model, 96).feed(text_of(97))
