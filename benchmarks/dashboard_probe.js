// What benchmarks/dashboard.py asks of the page: when something was drawn, and what was sent for it.
"use strict";
window.probe = (() => {
  performance.setResourceTimingBufferSize(20000);
  const shown = (id) => document.querySelector(`#${id} .js-plotly-plot`);
  const marks = (id) => {
    const figure = shown(id), numbers = (figure?.data || []).flatMap((trace) => trace.customdata || []);
    const drawn = figure ? figure.querySelectorAll(".scatterlayer .point").length : 0;
    return drawn >= numbers.length ? numbers : [];
  };
  const met = {
    rows: (count) => document.querySelectorAll("#sweeps tbody tr").length >= count,
    read: (count) => met.rows(count) && !document.querySelector("#sweeps .chip.reading"),
    marks: (count) => marks("front").length >= count,
    mark: (number) => marks("front").includes(number),
    point: (before) => { // another one than before: where marks lie on each other, the topmost is taken
      const said = document.querySelector("#point h2")?.textContent || "", number = said.replace("Point ", "");
      return said && said !== before && shown("front").data.some((trace) => (trace.text || []).includes?.(number));
    },
    axis: (text) => (shown("front")?.querySelector(".g-xtitle")?.textContent || "").includes(text),
    panel: (words) => (shown("panel-figure")?.textContent || "").includes(words),
    cell: (text) => document.querySelector("#sweeps")?.textContent.includes(text),
  };
  let pressed = 0;
  for (const kind of ["pointerup", "keydown"])
    addEventListener(kind, (event) => { pressed = event.timeStamp; }, true);
  const requests = () => performance.getEntriesByType("resource");
  return {
    marks,
    // Milliseconds since the navigation began at which it was on the screen: looked at once a frame, said after it.
    until: (name, argument) => new Promise((done, fail) => {
      const begun = performance.now();
      const look = () => {
        if (met[name](argument)) setTimeout(() => done(performance.now()));
        else if (performance.now() - begun > 60000) fail(new Error(`${name} ${argument} was not drawn within a minute`));
        else requestAnimationFrame(look);
      };
      requestAnimationFrame(look);
    }),
    pressed: () => pressed,
    // When the page asked whether there is news and was told so, the last time before `drawn`.
    asked: (since, drawn) => {
      const between = requests().filter((one) => one.startTime >= since && one.startTime < drawn);
      const first = between.find((one) => one.name.includes("_dash-update-component"));
      const asked = requests().filter((one) => one.name.includes("/standing") && one.responseEnd <= (first?.startTime ?? drawn));
      return asked.at(-1)?.startTime ?? null;
    },
    sent: (since) => requests().filter((one) => one.startTime >= since)
      .map((one) => [one.name.replace(/.*\/dashboard\//, "").replace(/\?.*/, ""), one.transferSize, one.duration]),
    place: (number) => {
      const figure = shown("front"), {xaxis, yaxis} = figure._fullLayout, box = figure.getBoundingClientRect();
      for (const trace of figure.data) {
        const at = (trace.customdata || []).indexOf(number);
        if (at >= 0) return [box.left + xaxis._offset + xaxis.d2p(trace.x[at]), box.top + yaxis._offset + yaxis.d2p(trace.y[at])];
      }
      return null;
    },
  };
})();
