"""A chat without adding nodes: the conversation saved under a name, continued by every run."""

import pytest
from ming_univision.ming_core import Conversation, FileError
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.nodes.filenames import filled

Resume, Save = NODE_CLASS_MAPPINGS["MingContinueConversation"], NODE_CLASS_MAPPINGS["MingSaveConversation"]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with host.folders(output=tmp_path, input=tmp_path):
        yield tmp_path / "ming"


@pytest.fixture
def loaded(model):
    return host.managed(model, "small")


def press_queue(loaded, name="chat"):
    (conversation,) = Resume().resume(loaded, name)
    after = loaded.model.understand(conversation, f"Round {conversation.rounds}", max_new_tokens=2).conversation
    Save().save(after, name, overwrite=True)
    return after


def test_a_chat_begins_empty_and_every_run_adds_a_round(loaded, folder):
    assert Resume().resume(loaded, "chat") == (Conversation(),)
    rounds = [press_queue(loaded) for _ in range(3)]
    assert [conversation.rounds for conversation in rounds] == [1, 2, 3]
    assert Resume().resume(loaded, "chat") == (rounds[-1],)
    assert [path.name for path in folder.iterdir()] == ["chat.safetensors"]


def test_another_name_is_another_chat_and_fields_are_filled_alike(loaded, folder):
    press_queue(loaded)
    press_queue(loaded, "friends/%year%")
    assert (folder / "friends" / f"{filled('%year%')}.safetensors").is_file()
    assert Resume().resume(loaded, "friends/%year%")[0].rounds == 1


def test_the_file_is_read_again_only_when_it_changed(loaded):
    before = Resume.IS_CHANGED(name="chat", model=None)
    press_queue(loaded)
    after = Resume.IS_CHANGED(name="chat", model=None)
    assert before != after == Resume.IS_CHANGED(name="chat", model=None)


def test_a_save_that_fails_leaves_the_file_as_it_was(loaded, folder, monkeypatch):
    press_queue(loaded)
    before = (folder / "chat.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FileError, match="space"):
        press_queue(loaded)
    assert [path.name for path in folder.iterdir()] == ["chat.safetensors"]
    assert (folder / "chat.safetensors").read_bytes() == before


def test_without_overwrite_nothing_is_replaced(loaded, folder):
    conversation = press_queue(loaded)
    assert Save().save(conversation, "chat")["ui"]["text"] == ["ming/chat_00001_.safetensors [output]"]
    assert Save().save(conversation, "chat", overwrite=False)["ui"]["text"] == ["ming/chat_00002_.safetensors [output]"]


@pytest.mark.parametrize("name", ["../chat", "", "a\nb", "x" * 300])
def test_a_name_that_is_no_file_name_is_refused_before_anything_runs(loaded, name):
    assert isinstance(Resume.VALIDATE_INPUTS(name), str)
    with pytest.raises(FileError):
        Resume().resume(loaded, name)


def test_a_file_that_is_no_conversation_is_named_before_anything_runs(loaded, folder):
    folder.mkdir()
    (folder / "chat.safetensors").write_bytes(b"something else")
    assert "chat.safetensors" in Resume.VALIDATE_INPUTS("chat")


def test_a_linked_name_is_checked_when_the_node_runs():
    assert Resume.VALIDATE_INPUTS(None) is True
    changed = Resume.IS_CHANGED(name=None, model=None)
    assert changed != changed  # not a number: run again
