"""Steps played back as CUDA graphs, with a stand-in that plays back on the CPU what a graph would on a GPU."""

import pytest
import torch
from ming_univision.ming_core import Conversation, Guidance, Solver, cuda_graphs, load_univision
from ming_univision.ming_core.cuda_graphs import CapturedStep, recorder
from ming_univision.ming_core.experts import Experts, OneExpert, SortedRows, StackedLinear
from ming_univision.ming_core.offload import all_on
from ming_univision.ming_core.quantization import FORMATS
from ming_univision.nodes.host import PACK
from ming_univision.tests.kernels import int4_kernel
from ming_univision.tests.loras import write_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations of a run, which `replay` does once more with the same tensors, into the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.operations:
            memory = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(operation(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in memory:  # neither a view nor in place
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def record(run):
    with Tape() as tape:
        outputs = run()
    return tape.replay, outputs


@pytest.fixture
def graphs(monkeypatch, captured_steps):
    """Captures as on a GPU; gives the steps of the last drawing."""
    monkeypatch.setattr(cuda_graphs, "recorder", lambda device, *modules: record)
    monkeypatch.setattr(StackedLinear, "serves", lambda self, kind, x, pairs: kind is not SortedRows)
    return captured_steps


DRAWINGS = {
    "from a prompt": {},
    "an edit, with three rows": {"edit": True, "guidance": Guidance(2.0, 1.3)},
    "inside a mask, in runs": {"edit": True, "mask": torch.tensor([[False, True, True, False]] * 4)},
    "without guidance": {"guidance": Guidance(1.0, 1.0)},
    "two pictures": {"seeds": [1, 3]},
    "second order and renorm": {"solver": Solver(4, "ab2", renorm=True)},
    "second order in the data": {"solver": Solver(4, "data_ab2")},
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_by_graphs_is_the_drawing(model, picture, graphs, monkeypatch, name):
    options = {"seeds": [1], **DRAWINGS[name]}
    if options.pop("edit", False):
        options["features"] = picture

    def rounds():
        """The drawing, and a second one that goes on from the first picture of it."""
        model.prefix_cache.clear()
        turns = model.generate_images(Conversation(), "a red circle", max_new_tokens=3, **options)
        return [*turns, model.generate_image(turns[0].conversation, "make it blue", max_new_tokens=3)]

    by_graphs = rounds()
    assert {name: step.replaying for name, step in graphs.items()} == {"condition": True, "flow": True, "expand": True}
    monkeypatch.undo()
    for found, plain in zip(by_graphs, rounds(), strict=True):
        torch.testing.assert_close(found.features.latents, plain.features.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.features.tokens, plain.features.tokens, rtol=1e-4, atol=1e-4)
        assert found.token_ids == plain.token_ids


def test_a_drawing_by_graphs_has_the_lora_of_its_engine(model, graphs, monkeypatch, tmp_path):
    engines = [model.with_lora(write_lora(tmp_path / "lora.safetensors", model.network)), model]

    def draw(engine):
        model.prefix_cache.clear()
        return engine.generate_image(Conversation(), "a red circle", max_new_tokens=1, solver=Solver(4)).features

    by_graphs = []
    for engine in engines:
        by_graphs.append(draw(engine).tokens)
        assert all(step.replaying for step in graphs.values())
    monkeypatch.undo()
    for found, engine in zip(by_graphs, engines, strict=True):
        torch.testing.assert_close(found, draw(engine).tokens, rtol=1e-4, atol=1e-4)
    assert (by_graphs[0] - by_graphs[1]).abs().max() > 0.1


@pytest.mark.slow
@int4_kernel
@pytest.mark.parametrize("quantised", FORMATS)
def test_quantised_experts_are_replayed_too(graphs, request, quantised):
    """The built-in model, whose experts have shapes that the int4 kernel takes."""
    model = load_univision(PACK / "models" / "tiny-shapes", dtype=torch.bfloat16, quantization=quantised)
    plain = model.generate_image(Conversation(), "a red circle", seed=3, max_new_tokens=1).features
    request.getfixturevalue("quantised_as_on_a_gpu")
    found = model.generate_image(Conversation(), "a red circle", seed=3, max_new_tokens=1).features
    assert {name: step.replaying for name, step in graphs.items()} == {"condition": True, "flow": True, "expand": True}
    assert torch.cosine_similarity(found.tokens.flatten(), plain.tokens.flatten(), dim=0) > 0.98


def test_a_step_that_waits_for_the_device_is_not_recorded_and_the_others_are(model, graphs, monkeypatch):
    monkeypatch.setattr(Experts, "dispatch", lambda self, x, pairs: OneExpert)
    model.generate_image(Conversation(), "a red circle", max_new_tokens=3)
    assert {name: step.replaying for name, step in graphs.items()} == {"condition": False, "flow": True, "expand": True}


def test_a_function_that_cannot_be_recorded_goes_on_as_it_is(caplog):
    double = CapturedStep(lambda x: (x * float(x.sum().item()),), record)
    for i in range(5):
        assert double(torch.tensor([2.0 + i]))[0] == (2.0 + i) ** 2
    assert not double.replaying and "not permitted" in caplog.text


def test_a_replay_that_gives_other_numbers_is_not_used(caplog):
    count = 0

    def forgetful(x):
        """Python's count would be frozen in a graph."""
        nonlocal count
        count += 1
        return (x * count,)

    step, x = CapturedStep(forgetful, record), torch.ones(2)
    found = [float(step(x)[0][0]) for _ in range(6)]
    assert not step.replaying and "differs" in caplog.text
    assert found == sorted(found) and len(set(found)) == 6  # never a frozen one


def test_numbers_out_of_range_are_not_trusted_to_a_graph():
    step = CapturedStep(lambda x: (x, x / 0 * 0), record)
    for _ in range(5):
        step(torch.ones(2))
    assert not step.replaying


def test_a_replay_that_differs_leaves_no_trace_in_what_is_remembered():
    """A step writes at its place what it was given; a graph that was recorded wrong would write something else."""
    memory = torch.zeros(3)

    def remember(x):
        memory[1:2] = x
        return (memory.clone(),)

    step = CapturedStep(remember, lambda run: (lambda: memory.fill_(7), run()))
    for i in range(4):
        step(torch.tensor([float(i + 1)]))
    assert not step.replaying and memory[1] == 4


def test_a_replay_that_fails_is_given_up():
    def fail():
        raise torch.OutOfMemoryError("no memory")

    step = CapturedStep(lambda x: (2 * x,), lambda run: (fail, run()))
    assert [step(torch.tensor([float(i)]))[0].item() for i in range(4)] == [0, 2, 4, 6] and not step.replaying


@pytest.fixture
def gpu(model, monkeypatch):
    """A device that the decision takes for a GPU; the model is on it."""
    monkeypatch.setattr(cuda_graphs, "Recorder", lambda device: record)
    cuda_graphs.Recorder.failed = False
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(0))
    monkeypatch.setattr(cuda_graphs, "all_on", lambda device, *modules: all_on(torch.device("cpu"), *modules))
    return torch.device("cuda")


def test_there_are_graphs_on_a_gpu_without_asking_and_never_after_a_failure(model, gpu, monkeypatch):
    assert recorder(gpu, model.network) is record
    assert recorder(torch.device("cpu"), model.network) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert recorder(gpu, model.network) is None
    monkeypatch.setattr(torch.version, "hip", None)
    cuda_graphs.Recorder.failed = True
    assert recorder(gpu, model.network) is None


def test_a_model_that_is_partly_loaded_has_no_graphs(model, gpu):
    model.network.flow_head.net.res_blocks[1].to("meta")  # as good as any other device
    assert recorder(gpu, model.network) is None


def test_a_host_that_turns_graphs_off_gets_none(model, graphs):
    model.network.language_model.cuda_graphs = False
    model.generate_image(Conversation(), "a red circle", max_new_tokens=3)
    assert {name: step.replaying for name, step in graphs.items()} == dict.fromkeys(
        ("condition", "flow", "expand"), False
    )


def test_room_for_the_copies_of_a_graph_is_asked_for_only_where_there_can_be_one(model, monkeypatch):
    language_model = model.network.language_model
    monkeypatch.setattr(Experts, "gathered_bytes", lambda self, pairs: 1 << 30)
    without = language_model.working_memory(1, 2, 16)
    monkeypatch.setattr("ming_univision.ming_core.language_model.graphs_possible", lambda device: True)
    assert language_model.working_memory(1, 2, 16) == without + (1 << 30)
    language_model.cuda_graphs = False
    assert language_model.working_memory(1, 2, 16) == without


def test_weights_that_rest_elsewhere_are_noticed(model):
    here = torch.device("cpu")
    assert all_on(here, model.network.language_model, model.network.flow_head)
    model.network.language_model.model.layers[1].mlp.experts.to("meta")  # as good as any other device
    assert not all_on(here, model.network.language_model, model.network.flow_head)
