"use strict";
// The filter of the table, and opening what an address points to. Everything can be read without it.
(() => {
  const tools = document.getElementById("tools");
  if (tools) {
    const text = document.getElementById("filter");
    const pick = document.getElementById("outcome");
    const told = document.getElementById("told");
    const groups = [...document.querySelectorAll("details.group")];
    const open = groups.map((group) => group.open);
    let rows = null;
    // Gathered at the first use, so that opening the page does not wait for it.
    const gather = () => groups.map((group) => {
      const name = group.querySelector("summary .mono").textContent.toLowerCase();
      return [...group.querySelectorAll("tbody tr")].map((row) => [row, `${name}::${row.textContent.toLowerCase()}`]);
    });
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const outcome = pick.value;
      const any = words.length > 0 || outcome !== "";
      rows = rows || gather();
      let found = 0;
      groups.forEach((group, index) => {
        let here = 0;
        for (const [row, said] of rows[index]) {
          const fits = (outcome === "" || row.className === outcome) && words.every((word) => said.includes(word));
          if (row.hidden === fits) row.hidden = !fits;
          if (fits) here += 1;
        }
        group.hidden = here === 0;
        // Opening thousands of rows at once would be slow; the counts stay true.
        group.open = any ? here > 0 && found < 200 : open[index];
        found += here;
      });
      told.textContent = any ? `${found.toLocaleString("en")} ${found === 1 ? "test fits" : "tests fit"}` : "";
    };
    let waiting = 0;
    text.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
    pick.addEventListener("change", apply);
    tools.hidden = false;
  }
  const reveal = () => {
    let target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch { return; }
    if (!target) return;
    for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  document.documentElement.dataset.ready = "yes";
})();
