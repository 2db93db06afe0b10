"""Help pages, translations and guides say what the nodes and the code are, all of it and nothing else."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from ming_univision.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ming_univision.nodes.host import PACK
from ming_univision.tests.sources import nodes_of, text_of


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


SECTIONS = {
    "en": ["Inputs", "Outputs", "Example", "Common mistakes"],
    "zh": ["输入", "输出", "示例", "常见错误"],
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_a_help_page_says_what_the_node_does_its_inputs_an_example_and_mistakes(node_id, language):
    page = (PACK / "web" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
    texts = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    title, *sections = re.split(r"^#+ (?=.+$)", page, flags=re.MULTILINE)[1:]
    name, _, about = title.partition("\n")
    assert name == texts[node_id]["display_name"] and len(about.strip()) > 5
    outputs = NODE_CLASS_MAPPINGS[node_id].RETURN_TYPES
    heads = [s.split("\n")[0] for s in sections]
    assert heads == [head for head in SECTIONS[language] if outputs or head != SECTIONS[language][1]]
    for section in sections:
        assert section.partition("\n")[2].strip(), section
    names = {entry["display_name"] for entry in texts.values()}
    assert set(re.findall(r"「(.+?)」", page)) <= names
    assert {n for n in re.findall(r"\*\*(Ming(?:Tok)? [A-Z][\w ]+)\*\*", page) if language == "en"} <= names


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_both_languages_name_the_same_mistakes_each_in_its_own_words(node_id):
    quoted, counts = [], []
    for language, head in (("en", "## Common mistakes"), ("zh", "## 常见错误")):
        page = (PACK / "web" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
        mistakes = page.partition(head)[2]
        quoted.append(re.findall(r'\*"(.+?)"\*', mistakes))
        counts.append(len(re.findall(r"^- ", mistakes, re.MULTILINE)))
    assert len(quoted[0]) == len(quoted[1]) and counts[0] == counts[1] > 0
    translations = json.loads((PACK / "locales" / "zh" / "messages.json").read_text(encoding="utf-8"))
    for ours, theirs in zip(*quoted, strict=True):
        pairs = [chinese for english, chinese in translations.items() if ours.strip(". ") in english]
        assert any(theirs.strip("…") in chinese for chinese in pairs), (ours, theirs)


def texts() -> list[str]:
    """Every text in the sources."""
    files = [file for room in ("nodes", "ming_core", "tiny_shapes") for file in (PACK / room).rglob("*.py")]
    return [text for file in files for text in map(text_of, nodes_of(file)) if text]


def test_the_messages_that_help_pages_quote_are_those_of_the_sources():
    said = texts()
    for page in (PACK / "web" / "docs").rglob("en.md"):
        for quote in re.findall(r'\*"(.+?)"\*', page.read_text(encoding="utf-8")):
            assert any(quote.strip(". ") in text for text in said), (page.parent.name, quote)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_category_has_a_name(language):
    names = json.loads((PACK / "locales" / language / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    parts = {part for node in NODE_CLASS_MAPPINGS.values() for part in node.CATEGORY.split("/")}
    assert set(names) == parts and all(names.values())
    if language == "en":
        assert all(name == part for part, name in names.items())


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
    for command in ("demo", "run", "download", "test", "comfyui"):
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


@pytest.mark.slow
def test_the_readmes_python_example_runs_and_gives_an_image():
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(?ms)^## In Python$.+?^```python\n(.+?)^```$", readme)
    code += "assert asked.text and images.shape == (1, 128, 128, 3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def glossary() -> list[tuple[str, str]]:
    """The file and the name of every class or function in the glossary."""
    page = (PACK / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\|.+\| (`.+`) \| (`.+`) \|$", page.partition("## Glossary")[2].partition("\n## ")[0], re.MULTILINE
    )
    return [(files, name) for files, names in rows for name in re.findall(r"`(.+?)`", names)]


@pytest.mark.parametrize(("files", "name"), glossary())
def test_the_glossary_names_what_is_there(files, name):
    modules = []
    for file in re.findall(r"`(.+?)`", files):
        path = file if file.startswith("nodes/") else f"ming_core/{file}"
        assert (PACK / path).exists(), path
        modules.append(
            importlib.import_module(f"ming_univision.{path.removesuffix('.py').rstrip('/').replace('/', '.')}")
        )
    head, _, attribute = name.partition(".")
    (found,) = {getattr(module, head) for module in modules if hasattr(module, head)}
    assert (
        not attribute
        or hasattr(found, attribute)
        or attribute in vars(found).get("__annotations__", {})
        or attribute == "linear_proj"
    )


def test_the_guides_link_to_files_that_are_there():
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/ARCHITECTURE.md",
        "docs/TRAINING.md",
        "benchmarks/RESULTS.md",
        "docs/MODELS.md",
        "docs/TROUBLESHOOTING.md",
        "docs/LORA.md",
        "docs/SCALING.md",
    ):
        text = (PACK / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+?)(?:#.+?)?\)", text):
            assert "://" in target or ((PACK / page).parent / target).exists(), (page, target)


def test_the_map_of_the_code_names_every_module():
    figure = (PACK / "docs" / "house.svg").read_text(encoding="utf-8")
    for room in ("world", "training", "evaluation", "ablation"):  # of tiny_shapes: these without their modules
        assert f">{room}/<" in figure
    inner = [f"ming_core/{room}" for room in ("checkpoint", "quantization", "training")]
    for room in ("ming_core", *inner, "nodes", "runner"):
        for path in (PACK / room).glob("[!_]*.py"):
            assert re.search(rf"\b{path.stem}\b", figure), path
