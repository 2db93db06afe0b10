"""The network's forward pass over a whole sequence gives what the engine computes step by step."""

import torch
from ming_univision.ming_core import Conversation
from ming_univision.ming_core.conversation import Image


@torch.no_grad()
def test_one_forward_pass_predicts_what_the_engine_emits(model, picture):
    result = model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=6, return_logits=True)
    segments = result.conversation.segments
    width = picture.tokens.shape[2]
    ids = [i for s in segments for i in (getattr(s, "ids", None) or [model.chat.patch_id] * s.length)]
    features = [s.features.tokens[0] if isinstance(s, Image) else torch.zeros(s.length, width) for s in segments]
    image = torch.tensor([isinstance(s, Image) for s in segments for _ in range(s.length)])
    output = model.network(torch.tensor(ids)[None], torch.cat(features)[None], image[None], image[None])
    prompt = result.conversation.parts[0].length
    torch.testing.assert_close(output.logits[0, prompt - 1 :], result.logits, rtol=0, atol=3e-4)
    assert output.conditions.shape == (1, len(ids), model.network.flow_head.vis_head[0].out_features)
