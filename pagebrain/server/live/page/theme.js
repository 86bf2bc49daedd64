// Light or dark, settled before the first paint: a classic script in the head. The page's button asks for a change by an event.
"use strict";
(() => {
  const KEY = "pagebrain-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEY);
  } catch {
    // storage is switched off: the system decides
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
      // it holds until the page is left
    }
    apply();
  });
  apply();
})();
