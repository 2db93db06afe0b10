"""What a client of the queue sees: progress, previews, caching, interruption, errors, memory."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from ming_univision.tests.comfyui.finding import PACK
from ming_univision.tests.comfyui.server import Run, Server
from PIL import Image

ROUNDS = "multi_round_edit"  # 6: the answer; 9, 11, 13: rounds that draw; 15: the picture that is saved
DRAW = "3"  # the node of text_to_image that draws


def picture(server: Server, done: Run) -> np.ndarray:
    """The only image that a run saved, 0 to 255; previews are not saved."""
    (saved,) = [image for image in done.images if image["type"] == "output"]
    with Image.open(io.BytesIO(server.fetch("/view", **saved))) as image:
        return np.asarray(image).astype(int)


def sources(node: dict) -> set[str]:
    """Ids of the nodes that its inputs are linked to."""
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}


def node_and_what_follows(prompt: dict, changed: str) -> set[str]:
    found, more = set(), {changed}
    while more:
        found |= more
        more = {node_id for node_id, node in prompt.items() if sources(node) & found} - found
    return found


# --- While a node runs --------------------------------------------------------------------------------------------


def test_the_bar_moves_with_the_tokens_of_a_picture_and_of_an_answer(server, workflow):
    done = server.succeed(workflow(ROUNDS, {"6.max_new_tokens": 8}))
    # Newer versions report the first token, the last one that the bar has room for, and ten a second in between.
    for node, updates in {"6": 2, "9": 4, "11": 4, "13": 4}.items():
        values = [value for value, _ in done.progress(node)]
        assert values == sorted(values) and values[0] == 1 and len(set(values)) >= updates
    value, whole = done.progress("13")[-1]
    assert 64 <= value <= whole  # the tokens of a picture


def test_the_answer_is_shown_on_the_node_while_it_is_written(server, workflow):
    done = server.succeed(workflow("describe", {"6.seed": 2, "6.temperature": 0.1}))
    (answer,) = done.outputs["7"]["text"]
    assert done.texts("6")[-1] == answer
    written = [text for text in done.texts("6") if text != " "]  # clears an earlier answer
    assert all(answer.startswith(text) for text in written)


def test_the_picture_is_seen_while_it_is_drawn(server, workflow):
    done = server.succeed(workflow("text_to_image", {f"{DRAW}.seed": 101}))
    assert len(done.previews) > 1
    for frame in done.previews:
        with Image.open(io.BytesIO(frame)) as image:
            assert image.format == "JPEG" and min(image.size) >= 64
    assert done.previews[0] != done.previews[-1]


def test_no_preview_is_sent_where_they_are_switched_off(server_without_previews, workflow):
    done = server_without_previews.succeed(workflow("text_to_image"))
    assert done.progress(DRAW) and not done.previews


def test_an_interrupt_stops_within_a_token_and_the_queue_goes_on(server, workflow):
    slow = workflow("text_to_image", {f"{DRAW}.seed": 102, f"{DRAW}.batch_size": 16, f"{DRAW}.steps": 64})
    quick = workflow("text_to_image", {f"{DRAW}.seed": 103})
    log_before = len(server.log)
    with server.client() as client:
        stopped, next_one = client.queue(slow), client.queue(quick)
        events = client.events(stopped)
        for event in events:
            if event.kind == "progress" and event.data["value"] >= 3:
                break
        assert server.post("/interrupt", {})[0] == 200
        rest = list(events)
        assert rest[-1].kind == "execution_interrupted" and rest[-1].data["node_id"] == DRAW
        # The token that was being computed may still be reported.
        assert len({e.data["value"] for e in rest if e.kind == "progress"}) <= 1
        assert client.follow(next_one).end.kind == "execution_success"
    assert "Traceback" not in server.log[log_before:]


def test_what_was_interrupted_leaves_nothing_behind_that_changes_a_later_result(server, workflow):
    prompt = workflow(ROUNDS, {"9.seed": 104})
    with server.client() as client:
        prompt_id = client.queue(prompt)
        for event in client.events(prompt_id):
            if event.kind == "progress" and event.data["node"] == "11" and event.data["value"] >= 20:
                server.post("/interrupt", {})
        assert event.kind == "execution_interrupted"
    after_interrupt = picture(server, server.succeed(prompt))
    free(server)
    from_nothing = picture(server, server.succeed(prompt))
    assert np.abs(after_interrupt - from_nothing).max() <= 2  # of 255: rounding, not a different image


# --- The cache ----------------------------------------------------------------------------------------------------


def test_the_same_prompt_twice_runs_nothing(server, workflow):
    prompt = workflow(ROUNDS, {"9.seed": 105})
    first, second = server.succeed(prompt), server.succeed(prompt)
    assert {"9", "11", "13", "14", "15"} <= first.ran
    assert second.ran == set() and second.cached == set(prompt)


@pytest.mark.parametrize(
    ("changed", "value"),
    [("11.seed", 8), ("11.instruction", "Change the color of the red circle to pink."), ("13.text_guidance", 2.0)],
    ids=["its seed", "its words", "a guidance"],
)
def test_a_change_in_a_round_runs_that_round_and_what_follows_only(server, workflow, changed, value):
    server.succeed(workflow(ROUNDS, {"9.seed": 105}))
    prompt = workflow(ROUNDS, {"9.seed": 105, changed: value})
    done = server.succeed(prompt)
    assert done.ran == node_and_what_follows(prompt, changed.split(".")[0])
    assert done.cached == set(prompt) - done.ran


# --- Errors -------------------------------------------------------------------------------------------------------


CUSTOM = "custom_validation_failed"
BAD = {
    "too many steps": ("text_to_image", {"3.steps": 99}, "value_bigger_than_max", "steps"),
    "a negative seed": ("text_to_image", {"3.seed": -1}, "value_smaller_than_min", "seed"),
    "an unknown solver": ("text_to_image", {"3.solver": "heun"}, "value_not_in_list", "solver"),
    "a word for a number": ("text_to_image", {"3.batch_size": "many"}, "invalid_input_type", "batch_size"),
    "another socket's value": ("text_to_image", {"3.model": ["1", 1]}, "return_type_mismatch", "MING_UNIVISION"),
    "an unknown precision": ("text_to_image", {"1.precision": "int3"}, "value_not_in_list", "precision"),
    "a model that is not there": ("text_to_image", {"1.model_name": "x"}, CUSTOM, "huggingface.co"),
    "a scene of unknown things": ("describe", {"2.scene": "an elephant"}, CUSTOM, "elephant"),
    "a file that leads out": (
        "save_and_continue",
        {"8.filename_prefix": "../../x"},
        CUSTOM,
        "out of",
    ),
    "features that lead out": ("save_and_continue", {"11.filename_prefix": "/x"}, CUSTOM, "out of"),
}


def branch(prompt: dict, node: str) -> dict:
    """The prompt without the branches that do not involve a node: ComfyUI would run them and answer 200."""
    kept = node_and_what_follows(prompt, node).union(*map(sources, prompt.values()))
    return {node_id: prompt[node_id] for node_id in prompt if node_id in kept}


def refused(server: Server, prompt: dict, node: str) -> dict:
    """The only error of a node."""
    status, answer = server.post("/prompt", {"prompt": branch(prompt, node)})
    assert status == 400
    (error,) = answer["node_errors"][node]["errors"]
    return error


@pytest.mark.parametrize(("name", "changes", "kind", "said"), BAD.values(), ids=BAD)
def test_refused_before_anything_runs(server, workflow, name, changes, kind, said):
    (changed,) = changes
    error = refused(server, workflow(name, changes), changed.split(".")[0])
    assert error["type"] == kind and said in f"{error['message']} {error['details']}"


def test_refused_before_anything_runs_a_file_that_is_not_there(server, workflow):
    prompt = workflow("describe")
    prompt["4"] = {"class_type": "MingLoadFeatures", "inputs": {"file": "ming/absent.safetensors [output]"}}
    error = refused(server, prompt, "4")
    assert error["type"] == CUSTOM and "absent.safetensors" in error["details"]


def test_refused_before_anything_runs_an_empty_instruction_on_that_input_alone(server, workflow):
    prompt = workflow(ROUNDS, {"9.instruction": " "})
    prompt["9"]["inputs"]["features"] = ["4", 0]  # with both a picture and a conversation connected
    error = refused(server, prompt, "9")
    assert error["type"] == CUSTOM and error["extra_info"]["input_name"] == "instruction"


def test_an_edit_without_a_picture_fails_at_once_and_names_the_input(server, workflow):
    prompt = workflow(ROUNDS)
    del prompt["9"]["inputs"]["features"], prompt["9"]["inputs"]["conversation"]
    done = server.run(branch(prompt, "9"))
    assert done.end.kind == "execution_error" and done.end.data["node_id"] == "9"
    message = done.end.data["exception_message"]
    assert message.startswith("features: there is no picture to edit") and "MingGenerate" in message
    assert not done.progress("9") and not {"11", "13"} & done.ran


def test_an_error_of_a_node_reaches_the_client_in_our_words_and_the_next_prompt_works(server, workflow):
    prompt = workflow("draw_then_ask")
    prompt["90"] = {"class_type": "MingConversationPicture", "inputs": {"conversation": [DRAW, 1], "index": 7}}
    prompt["91"] = {"class_type": "MingTokDecode", "inputs": {"mingtok": ["1", 1], "features": ["90", 0]}}
    prompt["92"] = {"class_type": "PreviewImage", "inputs": {"images": ["91", 0]}}
    done = server.run(prompt)
    assert done.end.kind == "execution_error" and done.end.data["node_id"] == "90"
    assert done.end.data["exception_message"].strip() == (
        "there is no picture 7: this conversation has 1 picture (0 to 0, or -1 to -1 from the end)"
    )
    assert len(str(done.end.data["current_inputs"])) < 500  # values have a short repr
    server.succeed(workflow("draw_then_ask"))


# --- Memory -------------------------------------------------------------------------------------------------------


def free(server: Server) -> None:
    """Free memory as the page's button does, several times: a server busy cleaning up after a prompt misses a call.

    Nothing reports when it is done; an idle server takes a moment.
    """
    for _ in range(3):
        assert server.post("/free", {"unload_models": True, "free_memory": True})[0] == 200
        time.sleep(1)


def loads(server: Server) -> int:
    return len(re.findall("loading .*tiny-shapes", server.log))


def test_one_live_model_serves_every_workflow_and_free_lets_it_go(server, workflow):
    server.succeed(workflow("text_to_image", {f"{DRAW}.seed": 106}))
    before = loads(server)
    server.succeed(workflow("describe", {"2.seed": 106}))
    server.succeed(workflow("text_to_image", {f"{DRAW}.seed": 107}))
    assert loads(server) == before
    free(server)
    done = server.succeed(workflow("text_to_image", {f"{DRAW}.seed": 107}))
    assert "1" in done.ran and loads(server) == before + 1


# --- From outside -------------------------------------------------------------------------------------------------


def readme_example() -> str:
    """The Python of the README's section on the queue."""
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"(?ms)^### From the API queue$(.+?)^##", readme)
    (code,) = re.findall(r"(?ms)^```python\n(.+?)^```$", section)
    return code


def test_the_readmes_example_edits_an_uploaded_picture_with_the_standard_library_only(server, tmp_path, monkeypatch):
    Image.new("RGB", (300, 200), "white").save(tmp_path / "photo.png")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code = readme_example().replace("http://127.0.0.1:8188", server.url)
    assert server.url in code and set(re.findall(r"(?m)^(?:import|from) (\w+)", code)) <= sys.stdlib_module_names
    code = code.replace('"workflows/api', f'r"{PACK}/workflows/api')
    (name,) = re.findall(r'client_id = "(.+?)"', code)
    with server.client(name) as client:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        history = server.get("/history")
        (prompt_id,) = [i for i, entry in history.items() if entry["prompt"][3].get("client_id") == name]
        events = list(client.events(prompt_id))
    reported = {e.data["node"] for e in events if e.kind == "progress"}
    assert reported - {"1"} == {
        "3",
        "4",
        "6",
        "9",
        "11",
        "13",
        "14",
    }  # "1": the loader, if it loads
    assert events[-1].kind == "execution_success"
    (answer,) = history[prompt_id]["outputs"]["7"]["text"]
    assert answer in done.stdout
    with Image.open(tmp_path / "edited.png") as image:
        assert image.format == "PNG" and image.size == (512, 512)
