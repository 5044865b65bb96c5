// Sorts a table by the column whose head is clicked: numbers by value, other cells by text.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    const cell = (row) => row.cells[column].textContent.trim();
    const value = (row) => parseFloat(cell(row).replace("−", "-"));
    const body = table.tBodies[0];
    const order = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
      const sign = Number.isNaN(x) ? cell(a).localeCompare(cell(b)) : x - y;
      return descending ? -sign : sign;
    });
    body.append(...order);
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
}
