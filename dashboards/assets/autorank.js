// What the browser does by itself: the address, the theme, the keyboard, and asking once a second whether anything is new.
"use strict";
(() => {
  const CHOSEN = "#D55E00"; // as drawings.ACCENT
  const THEMES = ["system", "light", "dark"];
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const none = () => window.dash_clientside.no_update;
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
    if (target !== window.location.search) window.dash_clientside.set_props("url", {search: target});
  }
  const change = (changes) => go(search(changes));
  const identity = () => {
    const query = new URLSearchParams(window.location.search);
    return `${query.get("sweep") || ""}\n${query.get("with") || ""}`;
  };

  // ---- the theme ----
  let theme = "system";
  try { theme = window.localStorage.getItem("autorank-theme") || theme; } catch { /* storage may be forbidden */ }
  if (!THEMES.includes(theme)) theme = "system";
  const isDark = () => theme === "dark" || (theme === "system" && system.matches);
  const wear = () => { document.documentElement.dataset.theme = isDark() ? "dark" : "light"; };
  wear();
  system.addEventListener("change", () => { wear(); window.dash_clientside.set_props("dark", {data: isDark()}); });

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

  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    const link = event.target.closest("a");
    if (link) {
      const href = link.getAttribute("href") || "";
      if (href.startsWith("?") && !link.target) { event.preventDefault(); go(href === "?" ? "" : href); }
      return;
    }
    const button = event.target.closest("button");
    if (button) {
      if (button.dataset.copy) copy(button);
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

  // ---- what Dash calls ----
  const TOLD = ["place", "title", "fresh", "front", "panel", "selected"]; // as in pages.py
  let asking = "", told = null, last = null;
  const triggered = (id) => window.dash_clientside.callback_context.triggered.some((one) => one.prop_id.startsWith(id + "."));
  const marked = (list) => list.flat().filter((one) => (one.value || []).length).map((one) => one.id.key);

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.autorank = {
    async poll() {
      const where = window.location.search, nothing = TOLD.map(none);
      if (asking === where + "." || (document.hidden && told)) return nothing;
      asking = where + ".";
      const place = byId("offline");
      try {
        const answer = await fetch("standing" + where, {cache: "no-store", signal: AbortSignal.timeout(8000)});
        if (!answer.ok) throw new Error(String(answer.status));
        const now = await answer.json();
        if (where !== window.location.search) return nothing; // the answer to the new address is on its way
        if (place?.textContent) {
          place.textContent = "";
          told = null; // what was asked for meanwhile was not answered: ask for all of it again
        }
        const before = told || {};
        told = now;
        return TOLD.map((name) => JSON.stringify(now[name]) === JSON.stringify(before[name]) ? none() : now[name]);
      } catch {
        if (place) place.textContent = "The server does not answer; trying again …";
        return nothing;
      } finally {
        asking = "";
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
    reveal() { // the chosen row of the front, once it is drawn
      setTimeout(() => {
        const row = document.querySelector('[data-keys="front"] tr.current'), box = row?.closest('[data-keys="front"]');
        if (!box) return;
        const head = 30, top = row.offsetTop - head, bottom = row.offsetTop + row.offsetHeight;
        if (top < box.scrollTop) box.scrollTop = top;
        else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
      }, 60);
    },
    front(base, selected) {
      if (!base) return none();
      const rings = [];
      const [chosen, pinned] = selected || [];
      for (const [number, word, symbol] of [[pinned, "pinned", "square-open"], [chosen, "chosen", "circle-open"]]) {
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
      return {data: [...base.data, ...rings], layout: base.layout};
    },
    take(click) {
      const number = click?.points?.[0]?.customdata;
      if (typeof number === "number") change({point: number, tab: null});
      if (click) window.dash_clientside.set_props("front", {clickData: null});
    },
    take_column(click) {
      const number = click?.points?.[0]?.customdata;
      if (typeof number === "number") change({point: number, tab: "ranks"});
      else if (Array.isArray(number)) go("?" + new URLSearchParams({sweep: number[0], point: number[1]}).toString());
      if (click) window.dash_clientside.set_props("panel-figure", {clickData: null});
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
      change({hide: off(allGroups, groups), skip: off(allKinds, kinds)});
    },
    want(mode, amount, usual) {
      if (triggered("want")) amount = usual[mode];
      if (amount === null || amount === undefined) return;
      change({lose: null, need: null, [mode]: amount, point: null});
    },
    marks() {
      const keys = marked(window.dash_clientside.callback_context.inputs_list);
      return [keys.length !== 2, keys.length === 2 || !keys.length ? "Compare two" : `Compare two (${keys.length} ticked)`];
    },
    compare(clicks) {
      const keys = marked(window.dash_clientside.callback_context.states_list);
      if (clicks && keys.length === 2) go("?" + new URLSearchParams({sweep: keys[0], with: keys[1]}).toString());
    },
  };
})();
