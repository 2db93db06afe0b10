// The words of the templates in Chinese, where the page is Chinese: ComfyUI has one file per template for all languages.
//
// Only what a template says itself is replaced: a word that people changed stays as they wrote it.
import { app } from "../../scripts/app.js";

const TEMPLATE = "00000000-0000-0000-0000-000000000000"; // the id of every template's graph

async function words() {
  const answer = await fetch(new URL("template_words.json", import.meta.url));
  return answer.json();
}

function translate(graph, { names, groups, labels, notes }) {
  for (const group of graph.groups ?? []) group.title = groups[group.title] ?? group.title;
  for (const node of graph.nodes) {
    if (node.type === "MarkdownNote") {
      node.title = notes[node.title] ?? node.title;
      node.widgets_values = node.widgets_values.map((text) => notes[text] ?? text);
    } else if (node.title) {
      const [name, label] = node.title.split(": ");
      const shown = LiteGraph.registered_node_types[node.type]?.title ?? name;
      if (name === names[node.type] && labels[label]) node.title = `${shown}：${labels[label]}`;
    }
  }
}

app.registerExtension({
  name: "MingUniVision.TemplateWords",
  async beforeConfigureGraph(graph) {
    if (graph.id !== TEMPLATE || app.ui.settings.getSettingValue("Comfy.Locale") !== "zh") return;
    translate(graph, await words());
  },
});
