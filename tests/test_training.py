"""Test short trainings of the demo model: the same seed gives the same weights, interrupted or not."""

import argparse
import sys

import numpy as np
import pytest
import torch

import verify_proto_tokens as vpt

sys.path.insert(0, str(vpt.DEMO_FOLDER / "training"))
import pictures
import train


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Return a function that builds a training's arguments: a few small steps, and a work folder with this name."""
    monkeypatch.setattr(train, "PICTURES_AT_ONCE", {256: 2, 512: 1})

    def build(name: str) -> argparse.Namespace:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return argparse.Namespace(work_dir=folder, tokenizer_steps=2, generator_steps=2, decoder_steps=2, seed=0)

    return build


@pytest.fixture
def images() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    return {size: rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8) for size in train.SIZES}


def weights_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_background_is_the_same_picture_at_both_sizes():
    small, large = (pictures.draw_backgrounds(size)["on green grass"] for size in train.SIZES)
    shrunk = np.asarray(large.reduce(2), dtype=float)
    assert np.abs(shrunk - np.asarray(small, dtype=float)).mean() < 4


def test_training_leaves_out_fifty_pairs_but_sees_every_thing_in_another_pair():
    captions = pictures.all_captions()
    held_out = pictures.held_out()
    seen = set(captions) - held_out
    assert len(held_out) == 50 and vpt.DEFAULT_PROMPT not in held_out
    for thing in pictures.things():
        assert any(pictures.caption(thing, background) in seen for background in pictures.BACKGROUNDS)


def test_an_interrupted_training_ends_with_the_same_weights(settings):
    def train_small(name: str, stop_at: int | None = None) -> torch.nn.Module:
        torch.manual_seed(0)
        layer, calls = torch.nn.Linear(4, 1), []

        def loss_of_batch(size: int, rng: np.random.Generator) -> torch.Tensor:
            calls.append(size)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return layer(torch.from_numpy(rng.random((2, 4), dtype=np.float32))).square().mean() * size

        optimizers = [train.make_adamw(layer.parameters(), weight_decay=0.01, betas=(0.9, 0.99))]
        training = train.Training("small", layer, optimizers, settings(name), num_steps=9, peak=0.1)
        return training.run(loss_of_batch, train.SIZES, save_every=2)

    whole = train_small("whole")
    with pytest.raises(KeyboardInterrupt):
        train_small("interrupted", stop_at=6)
    assert torch.equal(weights_of(train_small("interrupted")), weights_of(whole))


def test_the_tokenizers_training_is_reproducible(settings, images):
    first, second = (train.train_tokenizer(images, settings(name)) for name in ("first", "second"))
    assert torch.equal(weights_of(first), weights_of(second))


def test_the_decoders_training_is_reproducible(settings, images):
    codes = {size: torch.zeros(4, size // 32, size // 32, dtype=torch.long) for size in train.SIZES}

    def trained(name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return train.train_decoder(train.vq.Decoder(), images, codes, settings(name))

    assert torch.equal(weights_of(trained("first")), weights_of(trained("second")))


def test_the_generators_training_is_reproducible(settings):
    captions = pictures.all_captions()[:60]
    text_tokenizer = train.make_text_tokenizer(captions)
    rng = torch.Generator().manual_seed(0)
    codes = {size: torch.randint(625, (60, size // 32, size // 32), generator=rng) for size in train.SIZES}

    def trained(name: str) -> torch.nn.Module:
        generator = train.make_generator(len(text_tokenizer) + 625, seed=0)
        sequences_at_once = {256: 3, 512: 2}
        return train.train_generator(
            name, generator, text_tokenizer, captions, codes, sequences_at_once, settings(name)
        )

    assert torch.equal(weights_of(trained("first")), weights_of(trained("second")))
    assert vpt.size_token_of(text_tokenizer, 512) and not vpt.size_token_of(text_tokenizer, 256)


def test_a_training_can_start_from_the_bundled_demo_model():
    generator, text_tokenizer = train.load_generator(vpt.DEMO_FOLDER / "generator")
    assert generator.config.vocab_size == len(text_tokenizer) + train.vq.CODEBOOK_SIZE
    assert generator.dtype == torch.float32 and vpt.size_token_of(text_tokenizer, 512)


def test_a_generator_can_be_of_another_width_and_depth():
    shipped = train.load_generator(vpt.DEMO_FOLDER / "generator")[0].config
    usual, other = train.make_generator(99, seed=0).config, train.make_generator(99, 0, 128, 2).config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert getattr(usual, name) == getattr(shipped, name)
    assert (other.hidden_size, other.num_hidden_layers, other.num_attention_heads) == (128, 2, 4)
