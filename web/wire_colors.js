// A color for each type of value of this pack, on sockets and wires.
//
// The page keeps the colors of types in two tables, which a color palette fills anew whenever one is chosen; a type that
// the palette does not know gets no color. Nodes 2.0 reads the colors of sockets from CSS variables instead.
import { app } from "../../scripts/app.js";

const COLORS = {
  MING_UNIVISION: "#a78bfa",
  MINGTOK: "#2dd4bf",
  MING_FEATURES: "#facc15",
  MING_CONVERSATION: "#fb7185",
};

function colorTables() {
  Object.assign(app.canvas.default_connection_color_byType, COLORS);
  Object.assign(app.canvas.constructor.link_type_colors, COLORS);
  app.canvas.setDirty(true, true);
}

function addVariables() {
  const variables = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
  const style = document.createElement("style");
  style.textContent = `:root { ${variables.join(" ")} }`;
  document.head.append(style);
}

app.registerExtension({
  name: "MingUniVision.WireColors",
  setup() {
    addVariables();
    colorTables();
    // The palette is applied right after this event.
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(colorTables));
  },
  afterConfigureGraph: colorTables, // the first palette is applied after setup
});
