// What the browser does by itself: the address, the theme, the keyboard, and asking once a second whether anything is new.
"use strict";
(() => {
  const CHOSEN = "#D55E00"; // as drawings.ACCENT
  const THEMES = ["system", "light", "dark"];
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const none = () => window.dash_clientside.no_update;
  const set = (id, props) => window.dash_clientside.set_props(id, props);
  const byId = (id) => document.getElementById(id);

  // ---- the address ----
  function search(changes) {
    const query = new URLSearchParams(window.location.search);
    for (const [name, value] of Object.entries(changes)) {
      query.delete(name);
      for (const item of Array.isArray(value) ? value : [value])
        if (item !== null && item !== undefined && item !== "") query.append(name, item);
    }
    return "?" + query.toString();
  }
  function go(target) {
    if (target !== window.location.search) set("url", {search: target});
  }
  const change = (changes) => go(search(changes));
  const identity = () => {
    const query = new URLSearchParams(window.location.search);
    return `${query.get("sweep") || ""}\n${query.get("with") || ""}`;
  };

  // After the browser's back and forward the controls show what the address says; otherwise it is they who change it.
  function layout(id) {
    try { return window.dash_component_api.getLayout(id)?.props; } catch { return undefined; }
  }
  function put(id, value) {
    const now = layout(id);
    if (now && JSON.stringify(now.value) !== JSON.stringify(value)) set(id, {value});
  }
  window.addEventListener("popstate", () => {
    const query = new URLSearchParams(window.location.search);
    const usual = layout("usual-axes")?.data;
    if (usual) {
      put("axis-x", query.get("x") || usual[0]);
      put("axis-y", query.get("y") || usual[1]);
    }
    for (const [id, name] of [["show-groups", "hide"], ["show-kinds", "skip"]]) {
      const options = layout(id)?.options || [];
      put(id, options.map((one) => one.value).filter((value) => !query.getAll(name).includes(value)));
    }
    const mode = ["need", "lose"].find((name) => query.has(name));
    if (!mode) return;
    put("want", mode);
    const amount = layout("amount");
    if (amount?.className === mode) put("amount", Math.min(Math.max(Number(query.get(mode)), amount.min), amount.max));
  });

  // ---- the theme ----
  let theme = "system";
  try { theme = window.localStorage.getItem("autorank-theme") || theme; } catch { /* storage may be forbidden */ }
  if (!THEMES.includes(theme)) theme = "system";
  const isDark = () => theme === "dark" || (theme === "system" && system.matches);
  const wear = () => { document.documentElement.dataset.theme = isDark() ? "dark" : "light"; };
  wear();
  system.addEventListener("change", () => { wear(); set("dark", {data: isDark()}); });

  // ---- small things ----
  function say(text) {
    const place = byId("said");
    if (place) { place.textContent = ""; setTimeout(() => { place.textContent = text; }, 50); }
  }
  async function copy(button) {
    const source = byId(button.dataset.copy);
    let done = false;
    try { await navigator.clipboard.writeText(source.textContent); done = true; } catch {
      window.getSelection().selectAllChildren(source); // without a secure address: mark it, and try the old way
      try { done = document.execCommand("copy"); } catch { done = false; }
    }
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    say(done ? "The command is copied." : "The command is marked; press Ctrl+C.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }
  function along(step) {
    const links = [...document.querySelectorAll('[data-keys="front"] a')];
    if (!links.length) return;
    const at = links.findIndex((link) => link.getAttribute("aria-current") === "true");
    const next = links[at < 0 ? 0 : Math.min(Math.max(at + step, 0), links.length - 1)];
    next.focus({preventScroll: true});
    next.scrollIntoView({block: "nearest"});
    next.click();
  }

  // ---- what is ticked, chosen and pinned: shown here, so that tables need not be sent again for it ----
  let ticked = [], chosen = null, pinned = null, revealed = [];
  function decorate() {
    for (const box of document.querySelectorAll("[data-mark]"))
      box.setAttribute("aria-checked", String(ticked.includes(box.dataset.mark)));
    const compare = byId("compare");
    if (compare) compare.disabled = ticked.length !== 2;
    const links = [...document.querySelectorAll("[data-point]")];
    const current = links.find((link) => Number(link.dataset.point) === chosen && chosen !== null);
    for (const link of links) {
      const row = link.closest("tr");
      row.classList.toggle("current", link === current);
      row.classList.toggle("pinned", Number(link.dataset.point) === pinned && pinned !== null);
      if (link === current) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      link.tabIndex = link === (current || links[0]) ? 0 : -1; // one stop for the tab key; arrow keys move along
    }
    reveal(current?.closest("tr"));
  }
  function reveal(row) { // scrolls the table alone, and only when another point or another table is shown
    const box = row?.closest('[data-keys="front"]');
    if (!box || (revealed[0] === chosen && revealed[1] === box)) return;
    revealed = [chosen, box];
    const middle = row.offsetTop - box.clientHeight / 2;
    if (row.offsetTop < box.scrollTop + 30 || row.offsetTop + 30 > box.scrollTop + box.clientHeight) box.scrollTop = middle;
  }
  function tick(key) {
    ticked = ticked.includes(key) ? ticked.filter((one) => one !== key) : [...ticked, key].slice(-2);
    decorate();
  }

  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    const link = event.target.closest("a");
    if (link) {
      const href = link.getAttribute("href") || "";
      if (link.dataset.point) { event.preventDefault(); change({point: link.dataset.point, tab: null}); return; }
      if (href.startsWith("?") && !link.target) { event.preventDefault(); go(href === "?" ? "" : href); }
      return;
    }
    const button = event.target.closest("button");
    if (button) {
      if (button.dataset.copy) copy(button);
      if (button.dataset.mark) tick(button.dataset.mark);
      if (button.id === "compare") go("?" + new URLSearchParams({sweep: ticked[0], with: ticked[1]}).toString());
      if (button.id === "help-open") byId("help").showModal();
      if (button.id === "help-close") byId("help").close();
      return;
    }
    const row = event.target.closest('[data-keys="front"] tbody tr');
    if (row) row.querySelector("a").click();
    for (const open of document.querySelectorAll("details.filters[open]"))
      if (!open.contains(event.target)) open.open = false;
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (byId("help")?.open) return;
    const target = event.target;
    if (target.closest('[data-keys="front"]') && ["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) {
      event.preventDefault();
      along({ArrowDown: 1, ArrowUp: -1, Home: -1e9, End: 1e9}[event.key]);
      return;
    }
    if (event.key === "Escape") {
      for (const open of document.querySelectorAll("details.filters[open]")) {
        open.open = false;
        open.querySelector("summary").focus();
      }
      return;
    }
    if (target.closest('input, textarea, select, [role="slider"], [role="listbox"], [role="dialog"], [contenteditable]')) return;
    const press = {"/": "filter", p: "pin", c: "copy-command", t: "theme", l: "go-list", "?": "help-open"}[event.key];
    if (press === "filter") { const box = byId("filter"); if (box) { event.preventDefault(); box.focus(); } }
    else if (press) byId(press)?.click();
    else if (event.key === "j") along(1);
    else if (event.key === "k") along(-1);
  });

  // A part that is sent again loses the focus: give it back, unless the reader went elsewhere.
  let focused = null;
  const CAN = 'a, button, input, summary, [role="slider"], [tabindex]';
  document.addEventListener("focusin", ({target}) => {
    const root = target.closest("[id]");
    focused = root && root.id !== "main" ? [root.id, root === target ? -1 : [...root.querySelectorAll(CAN)].indexOf(target)] : null;
  });
  document.addEventListener("pointerdown", () => { focused = null; }, true);
  new MutationObserver(() => {
    decorate();
    if (!focused || document.activeElement !== document.body) return;
    const root = byId(focused[0]);
    (focused[1] < 0 ? root : root?.querySelectorAll(CAN)[focused[1]])?.focus({preventScroll: true});
  }).observe(document.documentElement, {childList: true, subtree: true});

  // ---- names for those who listen: Dash gives its sliders and its groups of boxes none ----
  function nameControls() {
    for (const control of document.querySelectorAll('[role="slider"], [role="listbox"], input[type="number"]')) {
      const name = control.closest(".amount, fieldset, .card")?.querySelector("legend, label, h2, h3")?.textContent;
      if (name && control.getAttribute("aria-label") !== name) control.setAttribute("aria-label", name);
    }
  }
  new MutationObserver(nameControls).observe(document.documentElement, {childList: true, subtree: true});

  // ---- elements that nothing is connected to, see plain.py ----
  const made = (node, key) => Array.isArray(node) ? node.map(made)
    : typeof node === "string" ? node
    : React.createElement(node.tag, {...node.attributes, key}, ...[node.children].flat().map(made));
  window.autorank_parts = {Plain: ({tree}) => made(tree, "0")};

  // ---- a zoom outlives new trials: plotly.js keeps it only while the figure's own ranges are the same ----
  let ranges = {whose: "", drawn: {xaxis: new Set(), yaxis: new Set()}};
  function zoomed(layout) {
    const shown = document.querySelector("#front .js-plotly-plot")?.layout;
    const kept = {...layout};
    if (ranges.whose !== layout.uirevision) ranges = {whose: layout.uirevision, drawn: {xaxis: new Set(), yaxis: new Set()}};
    for (const [axis, drawn] of Object.entries(ranges.drawn)) {
      const range = shown?.uirevision === layout.uirevision && !shown[axis].autorange && shown[axis].range;
      if (range && drawn.size && !drawn.has(String(range))) kept[axis] = {...layout[axis], range: [...range]};
      if (layout[axis].range) drawn.add(String(layout[axis].range));
    }
    return kept;
  }

  // ---- what Dash calls ----
  const TOLD = {place: "place", title: "title", fresh: "fresh", front: "front-shows", panel: "panel-shows", selected: "selected"};
  let texts = {whose: "", of: new Map()}; // what marks of the front say when they are pointed at, by trial
  let asking = null, told = null, lost = false, last = null;
  const triggered = (id) => window.dash_clientside.callback_context.triggered.some((one) => one.prop_id.startsWith(id + "."));

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.autorank = {
    async poll() {
      const where = window.location.search;
      if (asking === where || (document.hidden && told)) return;
      asking = where;
      const place = byId("offline");
      try {
        const answer = await fetch("standing" + where, {cache: "no-store", signal: AbortSignal.timeout(8000)});
        if (!answer.ok) throw new Error(String(answer.status));
        const now = await answer.json();
        if (where !== window.location.search) return; // the answer for the new address is on its way
        if (place) place.textContent = "";
        if (lost) told = null; // what was asked for meanwhile was not answered: ask for all of it again
        lost = false;
        const before = told || {};
        told = now;
        for (const [name, store] of Object.entries(TOLD))
          if (JSON.stringify(now[name]) !== JSON.stringify(before[name])) set(store, {data: now[name]});
      } catch (error) {
        if (error.name !== "TimeoutError") lost = true; // a server that is slow answers everything in the end
        if (place) place.textContent = "The server does not answer; trying again …";
      } finally {
        if (asking === where) asking = null;
      }
    },
    name(title) {
      if (title) document.title = title;
      const now = identity();
      if (last !== null && now !== last) {
        window.scrollTo(0, 0);
        byId("main")?.focus({preventScroll: true});
        say(title);
      }
      last = now;
    },
    theme() {
      if (triggered("theme")) {
        theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
        try { window.localStorage.setItem("autorank-theme", theme); } catch { /* then it lasts as long as the page */ }
        wear();
      }
      return [isDark(), `Theme: ${theme}`];
    },
    members(selected) {
      [chosen, pinned] = selected || [];
      decorate();
    },
    front(base, selected) {
      if (!base) return none();
      if (base.known && base.known.whose !== texts.whose) texts = {whose: base.known.whose, of: new Map()};
      set("front-known", {data: base.known});
      const traces = base.data.map((trace) => Array.isArray(trace.customdata) ? {...trace, text: trace.customdata.map((number, i) => {
        if (trace.text[i]) texts.of.set(number, trace.text[i]);
        return texts.of.get(number) || "";
      })} : trace);
      const rings = [];
      const [point, pin] = selected || [];
      for (const [number, word, symbol] of [[pin, "pinned", "square-open"], [point, "chosen", "circle-open"]]) {
        for (const trace of number === null || number === undefined ? [] : base.data) {
          const at = (trace.customdata || []).indexOf(number);
          if (at < 0) continue;
          rings.push({
            type: "scatter", mode: "markers+text", name: word, hoverinfo: "skip", legend: "legend2",
            x: [trace.x[at]], y: [trace.y[at]], text: [`#${number}`], textposition: "bottom right",
            textfont: {size: 13, weight: 700},
            marker: {symbol, size: 24, color: CHOSEN, line: {width: 3, color: CHOSEN}},
          });
        }
      }
      return {data: [...traces, ...rings], layout: zoomed(base.layout)};
    },
    take(click) {
      const number = click?.points?.[0]?.customdata;
      if (typeof number === "number") change({point: number, tab: null});
      if (click) set("front", {clickData: null});
    },
    take_column(click) {
      const number = click?.points?.[0]?.customdata;
      if (typeof number === "number") change({point: number, tab: "ranks"});
      else if (Array.isArray(number)) go("?" + new URLSearchParams({sweep: number[0], point: number[1]}).toString());
      if (click) set("panel-figure", {clickData: null});
    },
    axes(x, y, usual) {
      const query = new URLSearchParams(window.location.search);
      const before = {x: query.get("x") || usual[0], y: query.get("y") || usual[1]};
      if (x === before.x && y === before.y) return;
      if (x === y) [x, y] = x === before.x ? [before.y, y] : [x, before.x];
      change(x === usual[0] && y === usual[1] ? {x: null, y: null} : {x, y});
    },
    filters(groups, kinds, allGroups, allKinds) {
      const off = (all, on) => (all || []).map((one) => one.value).filter((value) => !(on || []).includes(value));
      const hide = off(allGroups, groups), skip = off(allKinds, kinds), count = hide.length + skip.length;
      byId("filters-toggle").textContent = count ? `Filters (${count} off)` : "Filters";
      change({hide, skip});
    },
    want(mode, amount, usual) {
      const query = new URLSearchParams(window.location.search);
      if (triggered("want")) amount = query.get(mode) || usual[mode]; // the slider on the page is still the other one
      if (amount === null || amount === undefined || Number(query.get(mode) ?? NaN) === Number(amount)) return;
      change({lose: null, need: null, [mode]: amount, point: null});
    },
  };
})();
