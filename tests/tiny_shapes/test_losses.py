"""The losses: what counts, what does not, and that training computes what inference computes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ming_core import Conversation, Guidance, Solver
from ming_core.conversation import Image, guidance_masks
from ming_core.features import to_grid
from ming_core.kv_cache import DecodeCache
from tiny_shapes.training import images
from tiny_shapes.training.joint_loss import OWN_ERROR, OWN_STEPS, JointLoss, JointWeights, recorded_routing
from tiny_shapes.training.packing import ATTRIBUTES, ORIGINS, pack
from tiny_shapes.training.sequences import IGNORE, TEXT_UNCONDITIONAL, UNCONDITIONAL, tokenize_dialogue
from tiny_shapes.world import Dialogue, random_dialogue

GRID = (4, 4)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def dialogue_of(tasks, number: int = 0, rounds: int = 1, objects=(1, 2)):
    return random_dialogue(np.random.default_rng(number), tasks, objects, rounds=rounds)


def test_patches_without_a_known_label_cost_nothing(make_objective):
    loss = make_objective("mingtok").module
    semantic = torch.randn(1, 4, loss.mingtok.config.semantic_decoder.embed_dim, requires_grad=True)
    unknown = {name: torch.full((1, 4), IGNORE) for name in images.LABELS}
    assert loss.label_loss(semantic, unknown) == 0
    known = unknown | {"shape": torch.tensor([[1, IGNORE, 2, IGNORE]])}
    logits = loss.label_logits(semantic)["shape"][0]
    mean = torch.nn.functional.cross_entropy(logits, known["shape"][0], ignore_index=IGNORE)
    torch.testing.assert_close(loss.label_loss(semantic, known), mean)


def test_routing_is_recorded_while_it_is_asked_for_and_no_longer(engine):
    with recorded_routing(engine.network) as balance, torch.no_grad():
        engine.generate_image(Conversation(), "a red circle", max_new_tokens=1)
    recorded = len(balance)
    engine.generate_image(Conversation(), "a red circle", max_new_tokens=1)
    assert recorded and len(balance) == recorded and all(1 <= float(x) <= 4 for x in balance)


def test_every_object_head_is_trained_on_the_objects_of_prompts(make_objective, chat):
    objective = make_objective("joint")
    batch = pack([tokenize_dialogue(dialogue_of("edit/recolor", n), chat, GRID) for n in range(3)], 0, GRID)
    terms = objective.loss(batch, seeded())
    knows_nothing = sum(math.log(len(values)) for values in ATTRIBUTES.values())
    assert terms["objects"].item() == pytest.approx(knows_nothing)
    terms["objects"].backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in objective.module.object_heads)


def test_an_object_head_reads_what_later_tokens_can_see(make_objective, chat):
    batch = pack([tokenize_dialogue(dialogue_of("edit/move", 3), chat, GRID)], 0, GRID)
    loss = make_objective("joint").module
    *_, last = loss.network.language_model.model.layers
    with torch.no_grad():
        knows_nothing = loss(batch, seeded())["objects"].item()
        torch.nn.init.normal_(loss.object_heads[0].weight, generator=seeded())
        guesses = loss(batch, seeded())["objects"].item()
        assert guesses != pytest.approx(knows_nothing)
        for parameter in last.parameters():  # what it adds comes too late for them
            parameter.normal_(generator=seeded())
        assert loss(batch, seeded())["objects"].item() == pytest.approx(guesses)


def test_the_origin_head_is_trained_on_where_what_each_cell_shows_comes_from(make_objective, chat):
    dialogues = [dialogue_of("few words", 5, objects=(2, 2)), dialogue_of("edit/move", 5, objects=(2, 2))]
    objective = make_objective("joint")
    batch = pack([tokenize_dialogue(dialogue, chat, GRID) for dialogue in dialogues], 0, GRID)
    loss = objective.module
    loss.weights = dataclasses.replace(loss.weights, origins=1.0)
    terms = loss(batch, seeded())
    assert terms["origins"].item() == pytest.approx(math.log(ORIGINS))
    terms["loss"].backward()
    assert loss.origin_head.weight.grad.abs().sum() > 0
    # a head that says the right one costs nothing, and one that says it of another cell costs much
    drawn = batch.origins[batch.drawn]
    told = F.one_hot(drawn, loss.origin_head.in_features).float()
    with torch.no_grad():
        loss.origin_head.weight.copy_(50 * torch.eye(*loss.origin_head.weight.shape))
        assert loss.origin_loss(told, drawn).item() < 1e-3
        assert loss.origin_loss(told.roll(1, 1), drawn).item() > 1


def test_a_batch_without_images_has_a_loss(make_objective, chat):
    batch = pack([tokenize_dialogue(dialogue_of("chat"), chat, GRID)], 0, GRID)
    terms = make_objective("joint").loss(batch, seeded())
    terms["loss"].backward()
    assert terms["flow"].item() == 0 and torch.isfinite(terms["loss"])


def trained_and_network(engine, sequence):
    """Hidden states [T, H] as training computes them for one sequence without noise, and its images' latents."""
    batch = pack([sequence], 0, GRID)
    loss = JointLoss(engine.network, JointWeights(noise=0.0))
    with torch.no_grad():
        latents, features = loss.images(batch, seeded())
        places = batch.image_starts[:, None] + torch.arange(features.shape[1])
        return loss.hidden(batch, features, places), latents, features


def test_the_network_itself_gives_the_same_for_a_sequence_alone(engine, chat):
    sequence = tokenize_dialogue(dialogue_of("edit", 3), chat, GRID)
    trained, _, features = trained_and_network(engine, sequence)
    ids = torch.tensor([sequence.ids])
    inputs, at, seen = torch.zeros(1, len(sequence.ids), features.shape[2]), ids == chat.patch_id, ids < 0
    for image, tokens in zip(sequence.images, features, strict=True):
        place = slice(image.start, image.start + len(tokens))
        inputs[0, place] = tokens
        seen[0, place] = not image.drawn
    with torch.no_grad():
        logits = engine.network(ids, inputs, at, seen).logits[0]
        torch.testing.assert_close(engine.network.language_model.logits(trained), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("row", [UNCONDITIONAL, TEXT_UNCONDITIONAL])
@pytest.mark.parametrize(("tasks", "rounds"), [("generate", 1), ("edit", 1), ("edit", 2)])
def test_a_guidance_row_is_trained_as_inference_computes_it(row, tasks, rounds, engine, chat):
    network = engine.network
    dialogue = dialogue_of(tasks, 3, rounds, (2, 2) if tasks == "generate" else (1, 3))
    # with the dialogue's own prompt in place of a donor's, which is what a guidance row really has there
    sequence = tokenize_dialogue(dialogue, chat, GRID, row, dialogue.tasks[-1])
    trained, latents, features = trained_and_network(engine, sequence)

    conversation, placed = Conversation(), iter(zip(sequence.images, latents, strict=True))

    def next_image():
        image, own = next(placed)
        with torch.no_grad():
            return Image(network.mingtok.semantic_features(to_grid(own[None], GRID)), image.drawn)

    for task in dialogue.tasks:
        contents = [task.prompt] if task.attached is None else [[next_image()], task.prompt]
        conversation = conversation.extended(chat.prompt(contents), "")
        if task is not dialogue.tasks[-1]:
            drawn = chat.prompt([])._replace(generated=True, segments=(chat.answer([chat.image_open_id]), next_image()))
            conversation = conversation.extended(drawn, "")
    masks = guidance_masks(conversation.parts)
    with torch.no_grad():
        model = network.language_model
        embedded, seen = [], []
        for segment in conversation.segments:
            image = isinstance(segment, Image)
            embedded.append(
                network.project(segment.features.tokens[0]) if image else model.embed(torch.tensor(segment.ids))
            )
            seen += [image and not segment.drawn] * segment.length
        cache = model.new_cache(len(seen))
        model.prefill(torch.cat(embedded), cache, torch.tensor(seen))
        rows = DecodeCache(cache, 17, 1, masks[min(row, len(masks) - 1)][None])
        new = torch.cat([model.embed(torch.tensor([chat.image_open_id])), network.project(features[-1])])
        hidden = torch.cat([model.decode(token[None, None], rows)[0] for token in new])
    torch.testing.assert_close(trained[-17:], hidden, rtol=0, atol=1e-4)


def test_kept_tokens_are_fed_as_inference_feeds_them(engine, chat):
    dialogue = dialogue_of("masked edit", 3)
    mask = np.zeros((128, 128), dtype=bool)
    mask[96:] = True  # the last four of 16 tokens
    (task,) = (dataclasses.replace(task, mask=mask) for task in dialogue.tasks)
    sequence = tokenize_dialogue(Dialogue((task,)), chat, GRID)
    _, latents, features = trained_and_network(engine, sequence)
    with torch.no_grad():
        source = engine.mingtok.semantic_features(to_grid(latents[:1], GRID))
    drawn = engine.generate_image(
        Conversation(), task.prompt, features=source, mask=torch.from_numpy(mask), max_new_tokens=1
    ).features
    torch.testing.assert_close(features[1, :12], drawn.tokens[0, :12], rtol=0, atol=1e-5)
    assert not torch.allclose(features[1, 12:], source.tokens[0, 12:], atol=1e-3), "the rest is that of the target"


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_what_a_masked_round_keeps_is_its_source_with_the_errors_that_it_was_fed_with(own, make_objective, chat):
    loss = make_objective("joint").module
    loss.weights = JointWeights(own=own)
    loss.own_drawings = lambda latents, *_: latents + 0.3
    dialogue = dialogue_of({"edit": 1.0, "masked edit": 5.0}, 6, rounds=3)
    assert sum(task.mask is not None for task in dialogue.tasks) > 1
    batch = pack([tokenize_dialogue(dialogue, chat, GRID)], 0, GRID)
    fed = []
    loss.network.mingtok.semantic_decoder.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    latents, _ = loss.images(batch, seeded())
    assert len(fed) == 1 + bool(own)
    fed = (fed[-1] - loss.network.mingtok.config.mean) / loss.network.mingtok.config.scaling_factor
    for i, source in enumerate(batch.sources.tolist()):
        kept = ~batch.opened[i]
        if source >= 0:
            torch.testing.assert_close(fed[i][kept], fed[source][kept])
        if batch.drawn[i] and own:
            torch.testing.assert_close(fed[i][~kept], latents[i][~kept] + 0.3)
        elif batch.drawn[i]:
            assert not torch.allclose(fed[i][~kept], latents[i][~kept], atol=1e-3), "drawn tokens are fed with noise"


def test_its_own_drawings_are_what_the_model_draws_after_the_true_tokens(engine, chat):
    (task,) = dialogue_of("generate", 3).tasks
    batch = pack([tokenize_dialogue(Dialogue((task,)), chat, GRID)], 0, GRID)
    loss = JointLoss(engine.network)
    with torch.no_grad():
        latents = loss.latents(batch)
        own = loss.own_drawings(latents, loss.features(latents, batch), batch, seeded(5))
    drawn = engine.generate_image(
        Conversation(),
        task.prompt,
        noise=torch.randn(latents.shape, generator=seeded(5))[0],
        guidance=Guidance(1, 1),
        solver=Solver(OWN_STEPS),
        max_new_tokens=1,
    ).features
    first = engine.mingtok.normalise(drawn.latents[0, :, 0, 0])  # only before the first one are all tokens true
    torch.testing.assert_close(own[0, 0], first, rtol=0, atol=1e-4)


def test_a_token_that_belongs_to_another_drawing_is_fed_with_noise_instead(make_objective, chat):
    loss = make_objective("joint").module
    batch = pack([tokenize_dialogue(dialogue_of("edit", 3), chat, GRID)], 0, GRID)
    latents = loss.latents(batch)
    wrong = torch.zeros_like(latents)
    wrong[:, :8], wrong[:, 8:] = 0.9 * OWN_ERROR, 1.1 * OWN_ERROR
    loss.own_drawings = lambda latents, *_: latents + wrong
    fed = []
    loss.features = lambda latents, batch: fed.append(latents.clone())
    loss.weights = JointWeights(own=1.0)
    loss.images(batch, seeded())
    noisy, own = fed
    assert batch.drawn.tolist() == [False, True]
    torch.testing.assert_close(own[1, :8], (latents + wrong)[1, :8])
    torch.testing.assert_close(own[1, 8:], noisy[1, 8:])
    torch.testing.assert_close(own[0], latents[0])  # what is seen is fed as it is


def test_kept_tokens_are_not_learned(make_objective, chat):
    objective = make_objective("joint")
    (task,) = dialogue_of("masked edit", 3).tasks
    other = dataclasses.replace(task, target=np.where(task.mask[..., None], task.target, 255 - task.target))
    losses = []
    for each in (task, other):
        batch = pack([tokenize_dialogue(Dialogue((each,)), chat, GRID)], 0, GRID)
        weights = batch.flow_weights[batch.drawn]
        assert (weights[~batch.opened[batch.drawn]] == 0).all() and weights.sum() > 0
        losses.append(objective.loss(batch, seeded())["flow"].item())
    assert all(math.isfinite(value) for value in losses)
