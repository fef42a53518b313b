// Draws plots when they come into view, sorts and filters tables, and turns light into dark.
"use strict";
(() => {
  const root = document.documentElement;
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map(); // canvas -> a function that draws it again

  // Colours are names of the style sheet's until they are drawn.
  const coloured = (value, style) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((one) => coloured(one, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, coloured(one, style)]));
  };

  const axis = (own) => ({
    gridcolor: "--rule", zerolinecolor: "--rule", linecolor: "--rule", automargin: true, fixedrange: true, ...own,
  });

  const layoutOf = (own, narrow) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    font: { color: "--text", family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 14 },
    hoverlabel: { bgcolor: "--raised", bordercolor: "--rule", font: { color: "--text" } },
    margin: { l: narrow ? 30 : 60, r: narrow ? 24 : 30, t: 20, b: 50 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...own, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  });

  const prepare = (figure) => {
    const canvas = figure.querySelector(".canvas");
    const variants = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const chooser = figure.querySelector("select");
    const named = figure.querySelector(".named");
    const draw = () => {
      const { traces, layout } = variants[chooser ? Number(chooser.value) : 0];
      const narrow = canvas.clientWidth < 560;
      const style = getComputedStyle(root);
      const shown = coloured(traces, style).map((trace) =>
        narrow && trace.colorbar ? { ...trace, showscale: false } : trace);
      const whole = coloured(layoutOf(layout, narrow), style);
      return Plotly.react(canvas, shown, whole, { displayModeBar: false, responsive: true });
    };
    chooser?.addEventListener("change", draw);
    draw().then(() => {
      canvas.dataset.drawn = "yes";
      canvas.on("plotly_click", ({ points }) => { named.textContent = points[0].text ?? ""; });
    });
    drawn.set(canvas, draw);
  };

  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      prepare(target);
    }
  }, { rootMargin: "300px" });
  document.querySelectorAll("figure.plot").forEach((figure) => observer.observe(figure));

  const button = document.getElementById("theme");
  const turn = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    drawn.forEach((draw) => draw());
  };
  button.hidden = false;
  button.addEventListener("click", () => turn(root.dataset.theme !== "dark"));
  preferred.addEventListener("change", ({ matches }) => turn(matches));
  turn(preferred.matches);

  // Numbers by their value, with what has none last; texts as people order them.
  const compare = (a, b, falling) => {
    const [x, y] = [a.dataset.sort, b.dataset.sort];
    if (x !== undefined && y !== undefined) return (falling ? -1 : 1) * (Number(x) - Number(y));
    if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
    return (falling ? -1 : 1) * a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  };

  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
      const falling = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((one) => one.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], falling));
      body.append(...rows);
    }));
  }

  for (const input of document.querySelectorAll(".filter input")) {
    const place = input.closest(".table");
    const rows = [...place.querySelector("tbody").rows];
    const found = place.querySelector(".filter output");
    const filter = () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      found.textContent = wanted ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", filter);
    filter();
  }
})();
