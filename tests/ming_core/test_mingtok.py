"""MingTok's stages: what they compute in, and what they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from ming_univision.ming_core import load_mingtok
from ming_univision.ming_core.attention import single_query_attention
from ming_univision.ming_core.mingtok import upcast_forward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def features(model):
    return model.mingtok.semantic_features(torch.randn(1, model.network.flow_head.net.channels, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pixels_are_decoded_in_float32_from_the_weights_as_they_are_stored(checkpoint_folder, features, dtype):
    half, exact = load_mingtok(checkpoint_folder, dtype=dtype), load_mingtok(checkpoint_folder)
    for parameter in exact.parameters():
        parameter.data = parameter.data.to(dtype).float()
    torch.testing.assert_close(half.decode(features), exact.decode(features), rtol=0, atol=1e-6)
    assert {p.dtype for p in half.parameters()} == {dtype} and all(
        isinstance(p, nn.Parameter) for p in half.parameters()
    )


def test_a_layer_that_brings_its_weights_over_itself_is_given_what_to_compute_in():
    class Offloaded(nn.Linear):
        def forward(self, x):
            assert self.weight.is_meta and self.weight.dtype == torch.bfloat16
            return x

    layer = Offloaded(2, 2, device="meta", dtype=torch.bfloat16)
    assert upcast_forward(layer, torch.ones(1, 2)).dtype == torch.float32


def test_encoding_asks_for_no_convolution_which_a_gpu_would_round_to_tf32(model):
    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "conv" not in str(func)
            return func(*args, **(kwargs or {}))

    with Asked():
        model.mingtok.encode(torch.zeros(1, 3, 32, 64))


def test_features_do_not_change_with_the_latents_that_they_were_made_from(model):
    latents = torch.randn(1, model.network.flow_head.net.channels, 4, 4)
    features = model.mingtok.semantic_features(latents)
    before = features.digest()
    latents.zero_()
    assert features.digest() == before


def test_latents_that_outgrow_fp16_are_refused_with_the_remedy(checkpoint_folder):
    tok = load_mingtok(checkpoint_folder, dtype=torch.float16)
    tok.low_level_encoder.patch_embed.proj.weight.fill_(60000.0)
    with pytest.raises(RuntimeError, match=r"float16: choose fp32 \(or bf16\)"):
        tok.encode(torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("seen", [None, 3])
def test_one_query_attends_as_torch_would_have_it(seen):
    q, k, v = (torch.randn(2, 4, n, 64) for n in (1, 9, 9))
    mask = None if seen is None else (torch.arange(9) < seen)[None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(single_query_attention(q, k, v, mask), expected)


def test_features_that_outgrow_fp16_are_refused_with_the_remedy(checkpoint_folder):
    tok = load_mingtok(checkpoint_folder, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"float16: choose fp32 \(or bf16\)"):
        tok.semantic_features(torch.full((1, tok.config.semantic_decoder.in_dim, 2, 2), 60000.0))


@pytest.mark.parametrize("value", [3e38, float("inf")])
def test_weights_that_overflow_are_named_where_a_black_picture_would_come_out(checkpoint_folder, features, value):
    tok = load_mingtok(checkpoint_folder)
    assert tok.decode(features).isfinite().all()
    tok.pixel_decoder.blocks.layers[0].mlp.fc1.weight.data[0].fill_(value)
    with pytest.raises(RuntimeError, match="NaN or infinite values in float32: the weights are damaged"):
        tok.decode(features)


def test_a_stream_of_latents_takes_one_or_several_at_a_time_and_no_more_than_its_capacity(model):
    latents = torch.randn(1, 4, model.network.flow_head.net.channels, generator=torch.Generator().manual_seed(1))
    at_once = model.mingtok.stream(1, 4).append(latents)
    for runs in ([1, 1, 1, 1], [1, 2, 1], [2, 2], [1, 3]):
        stream = model.mingtok.stream(1, 4)
        found = torch.cat([stream.append(run) for run in latents.split(runs, dim=1)], dim=1)
        torch.testing.assert_close(found, at_once, rtol=1e-4, atol=1e-5)
    stream = model.mingtok.stream(1, 3)
    stream.append(latents[:, :2])
    with pytest.raises(ValueError, match="4 tokens exceed the cache's capacity of 3"):
        stream.append(latents[:, 2:])
