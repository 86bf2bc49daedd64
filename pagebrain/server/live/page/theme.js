// Light or dark theme. A classic script in the head, because the theme must be set before the first paint.
"use strict";
(() => {
  const KEY = "pagebrain-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEY);
  } catch {
    // storage is switched off: use the system's theme
  }

  function apply() {
    const theme = chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new CustomEvent("pagebrain:theme", { detail: theme }));
  }

  system.addEventListener("change", apply);
  document.addEventListener("pagebrain:toggle-theme", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(KEY, chosen);
    } catch {
      // storage is switched off: the choice lasts until the page is closed
    }
    apply();
  });
  apply();
})();
