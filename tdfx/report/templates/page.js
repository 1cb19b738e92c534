"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const spectra = JSON.parse(document.getElementById("data").textContent);
  const body = document.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...document.querySelectorAll("thead th")];
  const filter = document.getElementById("filter");
  const dialog = document.getElementById("detail");
  const texts = rows.map((row) => row.innerText.toLowerCase());
  let shown = 0;
  let opener = null;

  /* Sorting: numbers by value, texts with the numbers in them by value; rows without a value always come last. */
  const compare = new Intl.Collator("en", { numeric: true }).compare;

  function sort(column, descending) {
    const numeric = "numeric" in heads[column].firstElementChild.dataset;
    const key = (row) => row.cells[column].dataset.key;
    const order = (a, b) => (numeric ? Number(a) - Number(b) : compare(a, b)) * (descending ? -1 : 1);
    rows.sort((a, b) => {
      const [first, second] = [key(a), key(b)];
      if (first === "" || second === "") return (first === "") - (second === "");
      return order(first, second);
    });
    body.append(...rows);
    heads.forEach((head, index) => {
      head.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending");
    });
  }

  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => sort(column, head.getAttribute("aria-sort") === "ascending"));
  });

  /* Filtering: every word must occur in the row. */
  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = texts[Number(row.id.slice(5))];
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    document.getElementById("count").textContent = `${count} of ${rows.length} sites`;
    document.getElementById("none").hidden = count > 0;
  }

  filter.addEventListener("input", narrow);

  /* Drawing */
  function make(name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const percent = (share) => `${(100 * share).toFixed(share > 0.9995 && share < 1 ? 3 : 1)} %`;

  function draw(curve) {
    /* As wide as the dialog, so that letters keep their size on a phone. */
    const width = Math.max(240, Math.min(680, document.getElementById("curves").clientWidth));
    const [height, left, right, top, bottom] = [220, 40, 12, 18, 28];
    const floor = 1e-4;
    const least = Math.max(floor, Math.min(...curve.values.filter((value) => value > 0), 0.1));
    const decades = Math.ceil(-Math.log10(least) - 1e-9);
    const x = (place) => left + ((place - 0.5) / curve.full) * (width - left - right);
    const y = (value) => top + (Math.min(decades, -Math.log10(Math.max(value, 1e-30))) / decades) * (height - top - bottom);
    const name = curve.mode ? `Singular values, ${curve.mode}` : "Singular values";
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describe(curve, name) });
    for (let decade = 0; decade <= decades; decade += 1) {
      const at = y(10 ** -decade);
      svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
      svg.append(make("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, decade ? (decade > 2 ? `10⁻${"⁰¹²³⁴"[decade]}` : String(10 ** -decade)) : "1"));
    }
    const points = curve.at.map((place, index) => [x(place), y(curve.values[index])]);
    const path = (corners) => corners.map(([px, py], index) => `${index ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    if (curve.rank) {
      const cut = x(curve.rank + 0.5);
      const kept = points.filter((_, index) => curve.at[index] <= curve.rank);
      const base = height - bottom;
      const area = [[left, base], [left, kept[0][1]], ...kept, [cut, kept.at(-1)[1]], [cut, base]];
      svg.append(make("path", { class: "area", d: `${path(area)}Z` }));
      svg.append(make("line", { class: "rank", x1: cut, x2: cut, y1: top - 4, y2: base }));
      const late = cut > width * 0.7;
      svg.append(make("text", { class: "mark", x: cut + (late ? -6 : 6), y: top + 6, "text-anchor": late ? "end" : "start" }, `rank ${curve.rank}`));
    }
    svg.append(make("path", { class: "line", d: path(points) }));
    if (points.length === 1) svg.append(make("circle", { cx: points[0][0], cy: points[0][1], r: 4, class: "line" }));
    svg.append(make("text", { x: left, y: height - 10 }, "1"));
    svg.append(make("text", { x: width - right, y: height - 10, "text-anchor": "end" }, String(curve.full)));
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = describe(curve, name);
    figure.append(caption, svg);
    return figure;
  }

  function describe(curve, name) {
    if (!curve.rank) return `${name}, relative to the largest: kept at full rank ${curve.full}`;
    return `${name}, relative to the largest: rank ${curve.rank} of ${curve.full} keeps ${percent(curve.energy)} of the energy`;
  }

  /* The dialog */
  const visible = () => rows.filter((row) => !row.hidden);

  function show(site) {
    shown = site;
    if (!dialog.open) dialog.showModal();
    const row = document.getElementById(`site-${site}`);
    document.getElementById("detail-title").textContent = row.cells[0].innerText;
    const curves = document.getElementById("curves");
    curves.replaceChildren(...spectra[site].map(draw));
    if (!spectra[site].length) curves.textContent = "No scheme fits this site, or its weight has no values: there is no spectrum.";
    const facts = document.getElementById("facts");
    facts.replaceChildren();
    for (const cell of [...row.cells].slice(1)) {
      if (!cell.textContent) continue;
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = cell.dataset.title;
      value.textContent = cell.textContent;
      facts.append(term, value);
    }
    const place = visible().indexOf(row);
    document.getElementById("previous").disabled = place <= 0;
    document.getElementById("next").disabled = place < 0 || place === visible().length - 1;
  }

  function step(by) {
    const all = visible();
    const next = all[all.indexOf(document.getElementById(`site-${shown}`)) + by];
    if (next) show(Number(next.id.slice(5)));
  }

  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-site], [data-filter]");
    if (!target) return;
    event.preventDefault();
    if (target.dataset.filter !== undefined) {
      filter.value = target.dataset.filter;
      narrow();
      document.getElementById("sites").scrollIntoView();
      filter.focus();
      return;
    }
    opener = target;
    show(Number(target.dataset.site));
  });
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("close", () => {
    if (opener) opener.focus();
  });
})();
