"""Training of LoRAs: what is learned, what changes and what does not, checkpoints, and the file that comes out."""

import copy
import csv
import json
from dataclasses import replace

import pytest
import torch
from ming_univision.ming_core import Conversation, FileError, Solver, load_univision
from ming_univision.ming_core.conversation import guidance_masks
from ming_univision.ming_core.quantization import QuantizedWeight
from ming_univision.ming_core.training import command
from ming_univision.ming_core.training.adapters import GROUPS, TrainedLayers, choose_layers, count_values
from ming_univision.ming_core.training.batches import Noising, SampleStream, collate
from ming_univision.ming_core.training.cache import EncodedImage
from ming_univision.ming_core.training.data import Sample
from ming_univision.ming_core.training.loop import learning_rate_factor
from ming_univision.ming_core.training.loss import LoraLoss, Weights
from ming_univision.ming_core.training.memory import Load, Memory, count_memory, refusal
from ming_univision.ming_core.training.sequences import IGNORE, Round, tokenize
from safetensors.torch import load_file


def image_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = model.mingtok.config.semantic_decoder.in_dim
    return EncodedImage(torch.randn(16, channels, generator=generator), torch.ones(16, dtype=torch.bool))


def collated(model, sequences, **noising):
    return collate(sequences, Noising(**noising), model.mingtok.config.semantic_decoder.in_dim)


def trained_values(training):
    return [p.detach().clone() for p in training.loss.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- Sequences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [False, True])
def test_a_sequence_is_what_inference_forwards(model, edit):
    grid = model.config.drawing_grid
    source, target = image_of(model) if edit else None, image_of(model, 1)
    sequence = tokenize([Round("A cat.", source, target)], model.chat, grid)
    latents = image_of(model).latents.T.unflatten(1, grid)[None]
    features = model.mingtok.semantic_features(latents) if edit else None
    drawn = model.generate_image(Conversation(), "A cat.", solver=Solver(1), max_new_tokens=1, features=features)
    inferred = [i for s in drawn.conversation.segments for i in getattr(s, "ids", [model.chat.patch_id] * s.length)]
    assert sequence.ids == inferred[: len(sequence.ids)]
    assert [t for t in sequence.targets if t != IGNORE] == [model.chat.image_open_id, model.chat.end_id]
    assert [image.start for image in sequence.images][-1] == len(sequence.ids) - 16
    assert [image.weights is not None for image in sequence.images] == [False, True][not edit :]


@pytest.mark.parametrize("row", [1, 2])
def test_a_dropped_prompt_has_the_form_of_the_guidance_row_and_the_words_of_another_sample(model, row):
    grid = model.config.drawing_grid
    own, other = Round("A cat.", image_of(model), image_of(model, 1)), Round("Blue.", image_of(model, 2), None)
    sequence = tokenize([own], model.chat, grid, row, other)
    prompt = model.chat.encode("Blue.")
    assert any(tuple(sequence.ids[i : i + len(prompt)]) == prompt for i in range(len(sequence.ids)))
    seen = sequence.images[0].image
    assert seen is (other.source if row == 1 else own.source)
    assert sequence.images[1].image is own.target
    # the same masks as inference has for this prompt, and positions that count what they leave
    drawing = tokenize([Round("Blue.", own.source, own.target)], model.chat, grid)
    length = len(drawing.ids) - 17  # `<image>` and its tokens
    assert len(sequence.masked) == length and sequence.ids[:length] == drawing.ids[:length]
    assert sequence.positions[length] == int((~sequence.masked).sum())
    assert all(t == IGNORE for t in sequence.targets)  # no text is predicted
    assert (row == 1) == bool(sequence.masked[sequence.images[0].start])


def test_the_hidden_states_of_a_guidance_row_are_those_of_inference(model):
    """What is trained with the prompt masked is what the unconditional row computes when it draws."""
    grid = model.config.drawing_grid
    target = image_of(model)
    donor = Round("A cat.", None, None)
    sequence = tokenize([Round("Ignored.", None, target)], model.chat, grid, 1, donor)
    loss = LoraLoss(model.network, TrainedLayers({}, 1, 1.0))
    batch = collated(model, [sequence], noise=0.0)
    with torch.no_grad():
        trained = loss.hidden(batch, batch.image_starts[:, None] + torch.arange(16))[-17:]
        # inference: the prompt is prefilled whole, then a row forwards the image with the prompt masked
        language_model, chat = model.network.language_model, model.chat
        part = chat.prompt(["A cat."])
        cache = language_model.new_cache(64)
        ids = torch.tensor([i for s in part.segments for i in s.ids])
        language_model.prefill(language_model.embed(ids), cache)
        from ming_univision.ming_core.kv_cache import DecodeCache

        row = DecodeCache(cache, 17, 1, guidance_masks((part,))[1:2])
        features = model.mingtok.semantic_decoder(model.mingtok.denormalise(target.latents[None]))
        opened = language_model.embed(torch.tensor([[chat.image_open_id]]))
        x = torch.cat([opened, model.network.project(features)], 1)
        inferred = language_model.decode(x, row)[0]
    assert torch.allclose(trained, inferred, atol=1e-4)


def test_questions_become_rounds_about_one_image(model):
    rounds = [Round("What?", image_of(model), None, "A dog."), Round("Sure?", None, None, "Yes.")]
    sequence = tokenize(rounds, model.chat, model.config.drawing_grid)
    said = [t for t in sequence.targets if t != IGNORE]
    assert said == [*model.chat.encode("A dog."), model.chat.end_id, *model.chat.encode("Yes."), model.chat.end_id]
    assert len(sequence.images) == 1 and sequence.flow_weight == 0


# --- Batches ------------------------------------------------------------------------------------------------------


def stream_of(model, samples, **options):
    images = {path: image_of(model, i) for i, path in enumerate({p for s in samples for p in s.pictures})}
    return SampleStream(samples, images, model.chat, model.config.drawing_grid, **options)


def drawings(tmp_path, count, word="cat"):
    return [Sample(f"{word}{i}", f"{word} {i}", target=tmp_path / f"{word}{i}.png") for i in range(count)]


def test_every_pass_over_the_samples_has_each_once_in_an_order_of_its_own(model, tmp_path):
    stream = stream_of(model, drawings(tmp_path, 6), dropping=0.0)
    passes = [[stream[i].ids for i in range(6 * n, 6 * n + 6)] for n in range(3)]
    assert all(sorted(each) == sorted(passes[0]) for each in passes)
    assert passes[0] != passes[1]
    assert stream[4].ids == stream[4].ids and stream[4].seed == stream[4].seed


def test_others_have_their_share_and_prompts_are_dropped_as_often_as_asked(model, tmp_path):
    others = drawings(tmp_path, 3, "dog")
    stream = stream_of(model, [*drawings(tmp_path, 4), *others], dropping=0.0)
    mixed = SampleStream(
        drawings(tmp_path, 4), stream.images, model.chat, stream.grid, dropping=0.3, others=(others, 0.25)
    )
    assert sum(mixed[i].kept for i in range(100)) == 25
    assert 0.15 < sum(bool(len(mixed[i].masked)) for i in range(200)) / 200 < 0.45


def test_images_to_draw_are_fed_with_noise_and_images_that_are_seen_are_not(model):
    sequence = tokenize([Round("Edit.", image_of(model), image_of(model, 1))], model.chat, model.config.drawing_grid)
    batch = collated(model, [sequence], times=3)
    assert not batch.fed_noise[0].any() and batch.fed_noise[1].any()
    assert batch.times.shape == (1, 3, 16) and batch.noise.shape[:3] == (1, 3, 16)
    assert ((batch.times > 0) & (batch.times < 1)).all()


def test_padding_changes_nothing(model):
    grid, chat = model.config.drawing_grid, model.chat
    short = tokenize([Round("A.", None, image_of(model))], chat, grid)
    long = tokenize([Round("A very long prompt about a cat.", None, image_of(model, 1))], chat, grid)
    dropped = tokenize([Round("A.", None, image_of(model))], chat, grid, 1, Round("B."))
    loss = LoraLoss(model.network, TrainedLayers({}, 1, 1.0))
    for sequences in ([short, long], [dropped, long]):
        together = sum(loss(collated(model, [s]), Weights(1.0, 100.0))[0] for s in sequences)
        at_once = loss(collated(model, sequences), Weights(1.0, 100.0))[0]
        assert torch.allclose(together, at_once, rtol=1e-4)


# --- Training -----------------------------------------------------------------------------------------------------


def test_only_the_adapters_change(model, train):
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    training = train(3, lr=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    assert all(p.any() for p in training.loss.adapters.up)  # every layer has learned something
    assert not any(module._forward_hooks for module in model.network.modules())


def test_training_on_one_picture_lowers_the_loss(data, train):
    for path in data.iterdir():
        if not path.name.startswith("cat"):
            path.unlink()
    training = train(
        60, dropping=0.0, lr=1e-2, rank=8, groups=("attention", "shared_expert", "projection", "flow_head")
    )
    first, last = training.rows[0]["loss"], training.rows[-1]["loss"]
    assert last < 0.7 * first and training.rows[-1]["text"] < 0.2 * training.rows[0]["text"]


def test_gradient_checkpointing_and_passes_change_nothing(train, tmp_path):
    plain = train(3, work=tmp_path / "a", checkpointing=False)
    kept = train(3, work=tmp_path / "b", checkpointing=True)
    passes = train(3, work=tmp_path / "c", pass_batch=1)
    for other in (kept, passes):
        assert all(
            torch.allclose(a, b, atol=2e-3) for a, b in zip(trained_values(plain), trained_values(other), strict=True)
        )
        assert plain.rows[0]["loss"] == pytest.approx(other.rows[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_beside_quantized_weights_get_the_gradients_of_the_dequantized_ones(checkpoint_folder, kind, train):
    from ming_univision.ming_core.quantization.formats import dequantize

    quantized = load_univision(checkpoint_folder, quantization=kind)
    plain = load_univision(checkpoint_folder)
    for name, module in quantized.network.named_modules():
        if isinstance(module, QuantizedWeight):
            original = plain.network.get_submodule(name)
            weight = original.weight if isinstance(original, torch.nn.Linear) else original.values
            weight.data.copy_(dequantize(module.values, module.scale.float()))

    def gradients(engine, name):
        training = train(1, engine=engine, run=False)
        for up in training.loss.adapters.up:  # zeros give no gradient to what is below them
            up.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
        batch = collated(engine, [training.stream[i] for i in range(4)])
        with training.loss.in_place():
            training.loss(batch, Weights(1.0, 100.0))[0].backward()
        return {name: p.grad for name, p in training.loss.adapters.named_parameters()}

    found, expected = gradients(quantized, "q"), gradients(plain, "p")
    assert all(torch.allclose(found[n], expected[n], rtol=1e-2, atol=1e-4 * expected[n].abs().max()) for n in expected)
    assert all(m.order == "plain" for m in quantized.network.modules() if isinstance(m, QuantizedWeight))
    assert any(value.any() for value in found.values())


def test_a_quantized_model_trains(checkpoint_folder, train):
    training = train(20, engine=load_univision(checkpoint_folder, quantization="int4"), lr=1e-2)
    assert training.rows[-1]["loss"] < training.rows[0]["loss"]


def test_training_in_bf16_keeps_its_adapters_in_float32(checkpoint_folder, train):
    training = train(2, engine=load_univision(checkpoint_folder, dtype=torch.bfloat16))
    assert {p.dtype for p in training.loss.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in training.loss.parameters())


def test_stacked_experts_can_be_trained_too(model, train, tmp_path):
    training = train(4, groups=("experts", "output"), lr=1e-2)
    assert all(p.any() for p in training.loss.adapters.up)
    _reproduces(model, training, tmp_path / "work" / "lora.safetensors")


def test_a_batch_of_texts_alone_trains(data, train):
    for path in data.iterdir():
        if path.name != "hello.jsonl":
            path.unlink()
    training = train(10, lr=1e-2)
    assert training.rows[-1]["flow"] == 0 and training.rows[-1]["text"] > 0


def test_a_gradient_that_is_not_finite_stops_the_training(train):
    training = train(3, run=False)
    training.loss.adapters.up[0].data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="lower --lr"):
        training.run()


def test_samples_to_keep_teach_what_the_model_does_without_the_lora(model, train, tmp_path):
    """A fresh LoRA has nothing to learn from them; one that has spoiled something is brought back by them."""
    training = train(1, run=False)
    own = training.stream
    keeping = SampleStream(own.samples, own.images, own.chat, own.grid, dropping=0.3, others=(own.samples, 1.0))
    batch = collated(model, [keeping[i] for i in range(6)])
    weights = Weights(1.0, 100.0)
    adapters = list(training.loss.adapters.parameters())

    def gradients():
        with training.loss.in_place():
            loss = training.loss(batch, weights)[0]
            return loss, torch.autograd.grad(loss, adapters)

    fresh, nothing = gradients()
    assert max(float(g.abs().max()) for g in nothing) < 1e-5
    for up in training.loss.adapters.up:
        up.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    spoiled, _ = gradients()
    assert spoiled > fresh + 0.01
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        for parameter, gradient in zip(adapters, gradients()[1], strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert gradients()[0] - fresh < 0.5 * (spoiled - fresh)


def test_samples_to_keep_leave_those_to_learn_what_they_were(model, train):
    training = train(1, run=False)
    for up in training.loss.adapters.up:
        up.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    sequences = [training.stream[i] for i in range(4)]
    weights = Weights(1.0, 100.0)
    with training.loss.in_place(), torch.no_grad():
        alone = training.loss(collated(model, sequences), weights)[0]
        beside = training.loss(collated(model, [replace(s, kept=False) for s in sequences]), weights)[0]
    assert torch.equal(alone, beside)


# --- The file that comes out --------------------------------------------------------------------------------------


def _reproduces(model, training, file):
    prompt = "A cat."
    with training.loss.in_place(), torch.no_grad():
        model.prefix_cache.clear()
        # the engine's own adapters would take the place of these
        plan = model.plan(Conversation(), prompt, command_options())
        as_trained = type(model).write.__wrapped__.__wrapped__(model, plan)
    model.prefix_cache.clear()
    engine = model.with_lora(file)
    loaded = engine.write(engine.plan(Conversation(), prompt, command_options()))
    model.prefix_cache.clear()
    base = model.write(model.plan(Conversation(), prompt, command_options()))
    assert torch.allclose(as_trained.logits, loaded.logits, atol=1e-4)
    assert not torch.allclose(base.logits, loaded.logits, atol=1e-2)


def command_options():
    from ming_univision.ming_core.options import TextOptions

    return TextOptions(1, return_logits=True)


def test_the_file_gives_the_engine_what_was_trained(model, train, tmp_path):
    training = train(10, lr=1e-2)
    _reproduces(model, training, tmp_path / "work" / "lora.safetensors")


# --- Checkpoints --------------------------------------------------------------------------------------------------


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(train, tmp_path):
    whole = train(12, work=tmp_path / "whole")
    train(12, work=tmp_path / "parts", stop_after=5)
    resumed = train(12, work=tmp_path / "parts", resume=True)
    assert equal(trained_values(resumed), trained_values(whole))
    assert resumed.rows == whole.rows and resumed.samples == whole.samples == 24
    files = [(tmp_path / name / "lora.safetensors") for name in ("whole", "parts")]
    one, other = map(load_file, files)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_log_has_a_row_for_every_ten_steps(train, tmp_path):
    train(25)
    with (tmp_path / "work" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "20", "25"]
    assert all(float(r["loss"]) == pytest.approx(float(r["text"]) + float(r["flow"]), abs=1e-5) for r in rows)


def test_a_checkpoint_of_another_kind_of_training_is_refused(train):
    train(2)
    with pytest.raises(FileError, match="rank was 4 when this training began, and is 2 now"):
        train(2, rank=2, resume=True)


def test_a_damaged_checkpoint_is_refused(train, tmp_path):
    train(2)
    state = tmp_path / "work" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(FileError, match=r"damaged|cut off"):
        train(2, resume=True)


def test_an_interrupt_writes_a_checkpoint(train, tmp_path):
    import os
    import signal

    training = train(50, run=False)
    update = training.update

    def interrupted():
        terms = update()
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    training.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert training.step < 50 and (tmp_path / "work" / "state.safetensors").exists()
    assert train(50, run=False, resume=True).step == training.step


def test_the_learning_rate_rises_stays_and_decays():
    rates = [learning_rate_factor(step / 100, step, 10, 0.5) for step in range(101)]
    assert rates[0] == 0.1 and rates[10:50] == [1.0] * 40 and rates[100] == pytest.approx(0.02)
    assert rates[50:] == sorted(rates[50:], reverse=True) and 0.4 < rates[75] < 0.6


# --- Layers and memory --------------------------------------------------------------------------------------------


def test_routers_embeddings_and_norms_are_never_trained(model):
    every = choose_layers(model.network, GROUPS)
    assert not [name for name in every if name.endswith(("gate", "image_gate", "word_embeddings")) or "norm" in name]
    assert {name.split(".")[0] for name in every} == {"language_model", "linear_proj", "flow_head"}


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_values_are_counted_before_they_are_there(model, rank):
    layers = choose_layers(model.network, GROUPS)
    assert count_values(layers, rank) == sum(p.numel() for p in TrainedLayers(layers, rank, rank).parameters())


def load(sequences=1, length=600):
    return Load(sequences, length, sequences, 2, 2)


def published(kind=None, dtype=torch.bfloat16):
    from ming_univision.ming_core import UniVision
    from ming_univision.ming_core.quantization import quantize

    network = UniVision(device="meta", dtype=dtype)
    if kind:
        quantize(network, kind)
    return network


def test_the_memory_of_the_published_model_is_that_of_its_weights_and_some_gigabytes():
    layers = choose_layers(published(), ("attention", "shared_expert", "projection", "flow_head"))
    values = count_values(layers, 16)
    plain, int4 = (count_memory(published(kind), values, load()) for kind in (None, "int4"))
    assert 37e9 < plain.weights < 38.5e9 and 11.5e9 < int4.weights < 12.5e9
    assert plain.trained == 16 * values
    assert 0.3e9 < plain.activations < 8e9
    assert int4.activations > plain.activations  # the weights of a layer, dequantized
    assert "GB (weights" in str(plain)


def test_memory_grows_with_samples_and_is_more_without_checkpointing():
    network = published()
    one, four = (count_memory(network, 0, load(n)).activations for n in (1, 4))
    assert 2 * one < four < 4.5 * one
    assert count_memory(network, 0, load(), checkpointing=False).activations > 4 * one


def test_processes_that_share_out_the_layers_hold_their_share_and_one_layer_more():
    network = published()
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in network.language_model.model.layers]
    whole, shared = (count_memory(network, 0, load(), shards=shards) for shards in (1, 4))
    assert shared.activations == whole.activations
    assert shared.weights == pytest.approx(whole.weights - 0.75 * sum(layers) + 2 * max(layers), abs=4)


def test_a_training_that_cannot_fit_is_refused_with_the_figure():
    memory, cpu = Memory(30, 2, 1)._replace(weights=30_000_000_000), torch.device("cpu")
    why = refusal(memory, 24_000_000_000, cpu)
    assert "30.00 GB" in why and "24.00 GB free" in why and "--precision int8" in why
    assert refusal(memory, 31_000_000_000, cpu) is None and refusal(memory, None, cpu) is None


# --- Command ------------------------------------------------------------------------------------------------------


def run(checkpoint_folder, data, out, *more):
    arguments = ["--model", checkpoint_folder, "--data", data, "--out", out, "--steps", "3", "--rank", "2", *more]
    return command.main([*map(str, arguments), "--device", "cpu", "--batch", "2"])


def test_the_command_trains_resumes_and_writes(checkpoint_folder, data, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "my.safetensors"
    assert run(checkpoint_folder, data, out) == 0
    said = caplog.text
    assert "1 drawings, 1 edits, 2 questions; 0 files left out" in said and "memory: " in said
    assert said.index("files left out") < said.index("memory: ") < said.index("written: ")
    assert load_univision(checkpoint_folder).with_lora(out).adapters.strengths
    # again: refused, unless it is to be continued
    assert run(checkpoint_folder, data, out) == 1
    assert "add --resume to continue it" in capsys.readouterr().err
    assert run(checkpoint_folder, data, out, "--resume", "--steps", "5") == 0
    assert "continuing from step 3" in caplog.text


def test_the_command_refuses_what_does_not_fit_before_it_loads_the_model(
    checkpoint_folder, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "free_memory", lambda device: 1000)
    monkeypatch.setattr(command, "load_univision", lambda *args, **kwargs: pytest.fail("it was loaded"))
    assert run(checkpoint_folder, data, tmp_path / "my.safetensors") == 1
    assert "this training takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--out", "my.pt"], "ends in .safetensors"),
        (["--data", "nowhere"], "is not a folder"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(checkpoint_folder, data, tmp_path, capsys, arguments, why):
    assert run(checkpoint_folder, data, tmp_path / "my.safetensors", *arguments) == 1
    assert why in capsys.readouterr().err


def test_the_command_shares_out_layers_among_several_processes_only(checkpoint_folder, data, tmp_path, capsys):
    assert run(checkpoint_folder, data, tmp_path / "my.safetensors", "--shard") == 1
    assert "--shard is for several processes" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_command_writes_a_lora_in_the_precision_asked_for(checkpoint_folder, data, tmp_path, precision, dtype):
    out = tmp_path / "my.safetensors"
    assert run(checkpoint_folder, data, out, "--save-precision", precision) == 0
    tensors = load_file(out)
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {dtype}
    assert load_univision(checkpoint_folder).with_lora(out).adapters.strengths


def test_the_command_trains_a_quantized_model(checkpoint_folder, data, tmp_path):
    out = tmp_path / "my.safetensors"
    assert run(checkpoint_folder, data, out, "--precision", "int4") == 0
    assert load_univision(checkpoint_folder, quantization="int4").with_lora(out).adapters.strengths


def test_what_is_written_beside_the_lora_is_plain(checkpoint_folder, data, tmp_path):
    run(checkpoint_folder, data, tmp_path / "my.safetensors")
    work = tmp_path / "my.training"
    assert {path.name for path in work.iterdir()} - {"loss.png"} == {"cache", "log.csv", "state.safetensors"}
    assert not list(tmp_path.rglob(".*"))
    assert json.dumps(copy.deepcopy(sorted(load_file(tmp_path / "my.safetensors"))))
