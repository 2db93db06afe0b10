"""Help pages and translations say what the nodes are, all of it and nothing else."""

import json
import re

import pytest
from ming_univision.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ming_univision.nodes.host import PACK


def inputs_of(node_id: str) -> dict:
    declared = NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    return declared["required"] | declared.get("optional", {})


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_every_node_has_a_help_page_that_names_each_input_and_output_and_no_other(node_id, language):
    page = (PACK / "web" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
    named = re.findall(r"^- \*\*(\w+)\*\* ?[(（]", page, re.MULTILINE)
    assert named == [*inputs_of(node_id), *getattr(NODE_CLASS_MAPPINGS[node_id], "RETURN_NAMES", ())]
    workflows = {p.stem for p in (PACK / "workflows").glob("*.json")}
    for sentence in re.findall(r"(?:Templates?: |模板：)(.+)", page):
        assert set(re.findall(r"`(\w+)`", sentence)) <= workflows


def test_there_is_no_page_without_a_node():
    assert {p.name for p in (PACK / "web" / "docs").iterdir()} == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_cover_every_text_of_every_node(language):
    texts = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(NODE_CLASS_MAPPINGS)
    for node_id, text in texts.items():
        node = NODE_CLASS_MAPPINGS[node_id]
        assert list(text["inputs"]) == list(inputs_of(node_id))
        assert list(text.get("outputs", {})) == [str(i) for i in range(len(node.RETURN_TYPES))]
        entries = [*text["inputs"].values(), *text.get("outputs", {}).values()]
        assert all(e["name"] and e["tooltip"] for e in entries) and text["display_name"] and text["description"]
        if language == "en":
            assert (text["display_name"], text["description"]) == (
                NODE_DISPLAY_NAME_MAPPINGS[node_id],
                node.DESCRIPTION,
            )
            tooltips = [options["tooltip"] for _, options in inputs_of(node_id).values()]
            assert [e["tooltip"] for e in entries] == tooltips + list(getattr(node, "OUTPUT_TOOLTIPS", ()))
        else:
            assert all(re.search(r"[\u4e00-\u9fff]", e["tooltip"]) for e in entries)


def test_the_readme_gives_the_commands_and_names_every_node_and_workflow():
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "run", "test", "comfyui"):
        assert f"python quickstart.py {command}" in readme
    said = readme.replace("Save / Load", "Save").replace("\n", " ")
    for name in NODE_DISPLAY_NAME_MAPPINGS.values():
        assert (
            f"**{name.replace('Ming Load Conv', 'Ming Save Conv').replace('Ming Load Feat', 'Ming Save Feat')}**"
            in said
        )
    for workflow in (PACK / "workflows").glob("*.json"):
        assert f"`{workflow.stem}`" in readme
    for picture in re.findall(r"!\[.+?\]\((.+?)\)", readme):
        assert (PACK / picture).is_file(), picture
