"use strict";
// Sorts, hides and opens what the page already holds; it makes no markup.
(() => {
  const list = document.getElementById("features");
  if (!list) return;
  const $ = (id) => document.getElementById(id);
  const rows = [...list.children];
  const searched = new Map(); // row -> its text in lower case, gathered when first asked for

  function textOf(row) {
    if (!searched.has(row)) {
      const parts = [...row.querySelectorAll(".searched")].map((node) => node.textContent);
      searched.set(row, parts.join("\n").toLowerCase());
    }
    return searched.get(row);
  }

  function filter() {
    const wanted = $("filter-text").value.toLowerCase();
    const dictionary = $("filter-dictionary").value;
    const state = $("filter-state").value;
    let shown = 0;
    for (const row of rows) {
      row.hidden =
        (dictionary && row.dataset.dictionary !== dictionary) ||
        (state && row.dataset.state !== state) ||
        (wanted && !textOf(row).includes(wanted));
      shown += !row.hidden;
    }
    $("count").textContent = `${shown} of ${rows.length}`;
  }

  const heads = [...document.querySelectorAll("#toolbar button")];

  function sort(head) {
    const key = head.dataset.key;
    // Numbers start with the largest, units in the run's order; a second press turns it round
    const first = key === "unit" ? "ascending" : "descending";
    const other = key === "unit" ? "descending" : "ascending";
    const direction = head.dataset.direction === first ? other : first;
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => (key === "unit" ? rows.indexOf(row) : row.dataset[key] === undefined ? NaN : +row.dataset[key]);
    const keyed = rows.map((row) => [value(row), row]);
    // Units without the number come last either way
    keyed.sort(([a], [b]) => (isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b)));
    list.append(...keyed.map(([, row]) => row));
    for (const button of heads) {
      button.setAttribute("aria-pressed", String(button === head));
      button.removeAttribute("title");
      delete button.dataset.direction;
    }
    head.dataset.direction = direction;
    head.title = `sorted, ${direction}`;
  }

  function openFromHash() {
    const row = $(decodeURIComponent(location.hash.slice(1)));
    if (!row || !row.matches("details.feature")) return;
    if (row.hidden) {
      for (const name of ["text", "dictionary", "state"]) $(`filter-${name}`).value = "";
      filter();
    }
    row.open = true;
    // Twice: rows scrolled past take their real height only once they have been near the screen
    row.scrollIntoView();
    requestAnimationFrame(() => row.scrollIntoView());
  }

  $("filter-text").addEventListener("input", filter);
  for (const name of ["text", "dictionary", "state"]) $(`filter-${name}`).addEventListener("change", filter);
  for (const head of heads) head.addEventListener("click", () => sort(head));
  $("swap").addEventListener("change", () => list.classList.toggle("swapped", $("swap").checked));
  addEventListener("hashchange", openFromHash);
  $("toolbar").hidden = false;
  filter();
  openFromHash();
})();
