// Tells the server the language of this page, so that errors of this pack come in it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let told = "";

function tell() {
  const language = app.ui.settings.getSettingValue("Comfy.Locale") ?? "en";
  const client = api.clientId ?? api.initialClientId;
  const words = JSON.stringify({ client, language });
  if (!client || words === told) return;
  told = words;
  api.fetchApi("/ming_univision/language", { method: "POST", body: words }).catch(() => (told = ""));
}

app.registerExtension({
  name: "MingUniVision.PageLanguage",
  setup() {
    tell();
    api.addEventListener("status", tell); // the first one comes with the page's id
    api.addEventListener("reconnected", () => {
      told = ""; // the server may have been started again
      tell();
    });
    app.ui.settings.addEventListener("Comfy.Locale.change", () => setTimeout(tell));
  },
});
