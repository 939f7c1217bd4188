// Light or dark theme: the system setting, unless the user chooses.

const KEY = "d2llm-theme";
const NEXT = { system: "light", light: "dark", dark: "system" };

export function installTheme(button) {
  const show = () => {
    const chosen = localStorage.getItem(KEY) || "system";
    if (chosen === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  button.addEventListener("click", () => {
    const chosen = NEXT[localStorage.getItem(KEY) || "system"];
    if (chosen === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, chosen);
    show();
  });
  show();
}
