"""MingTok against numbers recorded from the published code: 1e-5 a module."""

import pytest
import torch
from ming_univision.ming_core import load_mingtok

TOLERANCE = 1e-5


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_encoder_gives_the_recorded_latents(golden):
    case = golden("mingtok_encode")
    tok, io = load_mingtok(case.folder), case.io
    assert_close(tok.low_level_encoder.embed(io["image"]), io["tokens_in"])
    assert_close(tok.low_level_encoder(io["image"]), io["latent_raw"])
    assert_close(tok.encode(io["image"]).flatten(2).mT, io["latent_norm"][:, :-1])


@pytest.mark.parametrize("size", ["128x128", "96x96", "128x96", "64x64"])
def test_the_encoder_stretches_its_positions_to_other_sizes_as_recorded(golden, size):
    case = golden("mingtok_encode_interp")
    encoder, image = load_mingtok(case.folder).low_level_encoder, case.io[f"image_{size}"]
    assert_close(encoder.positions((image.shape[2] // 16, image.shape[3] // 16)), case.io[f"pos_{size}"])
    assert_close(encoder(image), case.io[f"latent_raw_{size}"])


def test_the_semantic_decoder_gives_the_recorded_features_at_once_and_token_by_token(golden):
    case = golden("mingtok_semantic")
    tok, io = load_mingtok(case.folder), case.io
    latents = io["latent_norm"]
    assert_close(tok.semantic_decoder.embed(io["latent_raw"]), io["in_proj_out"])
    assert_close(tok.semantic_decoder(io["latent_raw"]), io["full_x_norm"])
    at_once = tok.semantic_features(latents[:, :-1].mT.unflatten(2, (4, 4))).tokens
    assert_close(at_once, io["full_patchtokens"])

    stream = tok.stream(1, latents.shape[1])
    one_by_one = torch.cat([stream.append(latents[:, i : i + 1]) for i in range(latents.shape[1])], dim=1)
    assert_close(one_by_one, io["cached_tokens"])
    assert_close(one_by_one[:, :-1], at_once)


def test_the_pixel_decoder_gives_the_recorded_picture(golden):
    case = golden("mingtok_pixel")
    tok, io = load_mingtok(case.folder), case.io
    patches = tok.patches(io["sem"])
    assert_close(tok.assemble(patches, (4, 4)), io["image_preclamp"])
    assert_close(tok.assemble(patches, (4, 4)).clamp(-1, 1), io["image"])


def test_a_round_trip_gives_the_recorded_picture(golden):
    case = golden("mingtok_roundtrip")
    tok, io = load_mingtok(case.folder), case.io
    latents = tok.encode(io["image"])
    features = tok.semantic_features(latents)
    assert_close(latents.flatten(2).mT, io["latent_norm"][:, :-1])
    assert_close(features.tokens, io["sem"])
    assert_close(tok.decode(features), io["recon"])


def test_a_preview_of_all_tokens_is_the_picture_and_of_some_its_beginning(golden):
    case = golden("mingtok_roundtrip")
    tok = load_mingtok(case.folder)
    features = tok.semantic_features(tok.encode(case.io["image"]))
    assert_close(tok.preview(features.tokens, features.grid), tok.decode(features))
    half = tok.preview(features.tokens[:, :8], features.grid)
    assert half[:, :, :16].abs().sum() > 0 and half[:, :, 16:].abs().sum() == 0  # grey below
    assert tok.calls["preview"] == 2


def test_gradients_flow_from_pixels_to_pixels(golden):
    tok = load_mingtok(golden("mingtok_roundtrip").folder)
    with torch.enable_grad():
        pixels = (torch.rand(1, 3, 32, 32) - 0.5).requires_grad_()
        tok.decode(tok.semantic_features(tok.encode(pixels))).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
