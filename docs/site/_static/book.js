// Tables of the ledger: sorting by any column, filtering by some, by mouse or keyboard. No library, no request.
"use strict";

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.key ?? cell.textContent.trim();
}

// Numbers by value, words by the alphabet; empty cells last in either direction.
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = !Number.isNaN(Number(a)) && !Number.isNaN(Number(b));
  return direction * (numbers ? Number(a) - Number(b) : a.localeCompare(b, "en"));
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells;
  const direction = head[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const cell of head) cell.removeAttribute("aria-sort");
  head[column].setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compare(key(a, column), key(b, column), direction));
  table.tBodies[0].append(...rows);
}

function addFilters(table) {
  const rows = [...table.tBodies[0].rows];
  const form = document.createElement("form");
  form.className = "filters";
  form.addEventListener("submit", (event) => event.preventDefault());
  const fields = [];
  const add = (label, control, matches) => {
    const holder = document.createElement("label");
    holder.append(label + " ", control);
    form.append(holder);
    fields.push({ control, matches });
    control.addEventListener("input", apply);
  };
  const text = document.createElement("input");
  text.type = "search";
  add("words", text, (row, value) => row.textContent.toLowerCase().includes(value.toLowerCase()));
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!("filter" in head.dataset)) return;
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const value of new Set(rows.map((row) => key(row, column)))) select.append(new Option(value, value));
    add(head.textContent, select, (row, value) => key(row, column) === value);
  });
  const count = document.createElement("output");
  form.append(count);
  function apply() {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !fields.every(({ control, matches }) => control.value === "" || matches(row, control.value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  apply();
  table.closest(".ledger").before(form);
}

for (const table of document.querySelectorAll("table.sortable")) {
  addFilters(table);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column));
    head.append(button);
  });
}

// A table or a block of output that scrolls sideways must be reachable by keyboard, and say what it is.
for (const box of document.querySelectorAll(".cell_output .output, .pst-scrollable-table-container, .table-wrapper, .bd-article p:has(> img)")) {
  if (box.scrollWidth > box.clientWidth && !box.hasAttribute("tabindex")) {
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Table, picture or output, scrolls sideways");
  }
}
