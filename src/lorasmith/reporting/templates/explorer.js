"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  if ($("explorer")) explore();

  function explore() {
    const data = JSON.parse($("index").textContent);
    const packed = [...document.querySelectorAll("script.chunk")];
    const size = data.id.length;
    const has = (role) => data.roles.includes(role);
    const gain = has("base") && has("adapter") ? data.base.map((x, i) => data.adapter[i] - x) : null;
    const drift = has("merged") && has("adapter") ? data.merged.map((x, i) => x - data.adapter[i]) : null;
    const SAME = 0.01; // nats per token: below this an example counts as unchanged
    $("explorer").hidden = false;

    const fill = (select, entries) =>
      entries.forEach(([value, label]) => select.append(new Option(label, value)));
    for (const kind of ["source", "domain", "difficulty"])
      fill($("f-" + kind), [["", "all"], ...data[kind].names.map((name, i) => [String(i), name])]);
    const verdicts = { all: ["all", () => true] };
    if (gain) {
      verdicts.better = ["adapter better", (i) => gain[i] <= -SAME];
      verdicts.same = ["no change", (i) => Math.abs(gain[i]) < SAME];
      verdicts.worse = ["adapter worse", (i) => gain[i] >= SAME];
    }
    if (data.flips.some(Boolean)) verdicts.flips = ["merged chooses otherwise", (i) => data.flips[i] > 0];
    fill($("f-verdict"), Object.entries(verdicts).map(([key, [label]]) => [key, label]));
    const orders = { file: ["as in the file", null] };
    if (gain) {
      orders.helped = ["helped most", (i) => gain[i]];
      orders.hurt = ["hurt most", (i) => -gain[i]];
    }
    if (drift) orders.drift = ["moved most by the merge", (i) => -Math.abs(drift[i])];
    if (data.kl.some((x) => x !== null)) orders.kl = ["highest KL", (i) => -(data.kl[i] ?? -1)];
    for (const role of data.roles) orders[role] = ["highest loss: " + role, (i) => -data[role][i]];
    fill($("f-order"), Object.entries(orders).map(([key, [label]]) => [key, label]));

    // Texts are unpacked when they are first needed.
    const open = new Map();
    const unpack = async (number) => {
      const bytes = Uint8Array.from(atob(packed[number].textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
      return JSON.parse(await new Response(stream).text());
    };
    const chunk = (number) => {
      if (!open.has(number)) open.set(number, unpack(number));
      return open.get(number);
    };
    const detailOf = async (i) => (await chunk(Math.floor(i / data.chunk)))[i % data.chunk];
    let texts = null;
    const allTexts = async () => {
      if (!texts) {
        const parts = await Promise.all(packed.map((_, number) => chunk(number)));
        texts = parts.flat().map((d) => (d.redacted ? "" : (d.prompt + "\n" + d.response).toLowerCase()));
      }
      return texts;
    };

    const list = $("list");
    const space = $("list-space");
    const HEIGHT = 52;
    let shown = [];
    let selected = -1;
    const fixed = (x, digits = 3) => (x === null || isNaN(x) ? "–" : x.toFixed(digits));
    const sign = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + (Math.abs(x) < 1e-3 && x !== 0
      ? Math.abs(x).toExponential(1) : Math.abs(x).toFixed(3));
    const element = (tag, classes, text) => {
      const made = document.createElement(tag);
      if (classes) made.className = classes;
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const group = (i) =>
      ["source", "domain", "difficulty"].map((kind) => data[kind].names[data[kind].of[i]]).join(" · ");

    const draw = () => {
      const from = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
      const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 4);
      const rows = [];
      for (let place = from; place < to; place++) {
        const i = shown[place];
        const row = element("div", "row");
        row.id = "ex-" + i;
        row.style.top = place * HEIGHT + "px";
        row.setAttribute("role", "option");
        row.setAttribute("aria-selected", String(i === selected));
        row.setAttribute("aria-posinset", place + 1);
        row.setAttribute("aria-setsize", shown.length);
        row.append(element("span", "id", data.id[i]));
        row.append(element("span", "num", data.roles.map((role) => fixed(data[role][i], 2)).join(" → ")));
        row.append(element("span", "group", group(i)));
        if (gain) row.append(element("span", "num " + (gain[i] < 0 ? "gain" : "loss"), sign(gain[i])));
        row.addEventListener("click", () => select(i));
        rows.push(row);
      }
      space.replaceChildren(...rows);
    };
    list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    new ResizeObserver(draw).observe(list);

    const drawMap = exampleMap({
      data, gain, SAME, list, HEIGHT, shown: () => shown, selected: () => selected, select: (i) => select(i),
    });

    let turn = 0;
    const refresh = async () => {
      const mine = ++turn;
      const query = $("f-search").value.trim().toLowerCase();
      const source = query ? await allTexts() : null;
      if (mine !== turn) return;
      const wanted = ["source", "domain", "difficulty"].map((kind) => [kind, $("f-" + kind).value]);
      const fits = verdicts[$("f-verdict").value][1];
      shown = [];
      for (let i = 0; i < size; i++) {
        if (wanted.some(([kind, value]) => value !== "" && data[kind].of[i] !== Number(value))) continue;
        if (!fits(i)) continue;
        if (query && !data.id[i].toLowerCase().includes(query) && !source[i].includes(query)) continue;
        shown.push(i);
      }
      const key = orders[$("f-order").value][1];
      if (key) shown.sort((a, b) => key(a) - key(b) || a - b);
      space.style.height = shown.length * HEIGHT + "px";
      list.scrollTop = 0;
      $("f-count").textContent = `${shown.length.toLocaleString("en")} of ${size.toLocaleString("en")} examples`;
      draw();
      if (shown.length) select(shown[0]);
      else {
        selected = -1;
        drawMap();
        $("detail").replaceChildren(element("p", "soft", "No example fits."));
      }
    };
    for (const id of ["f-source", "f-domain", "f-difficulty", "f-verdict", "f-order"])
      $(id).addEventListener("change", refresh);
    let wait = 0;
    $("f-search").addEventListener("input", () => {
      clearTimeout(wait);
      wait = setTimeout(refresh, 120);
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (!step) return;
      event.preventDefault();
      const place = Math.min(shown.length - 1, Math.max(0, shown.indexOf(selected) + step));
      const top = place * HEIGHT;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
      if (shown.length) select(shown[place]);
    });

    const select = async (i) => {
      selected = i;
      drawMap();
      list.setAttribute("aria-activedescendant", "ex-" + i);
      draw();
      let detail;
      try {
        detail = await detailOf(i);
      } catch {
        $("detail").replaceChildren(element("p", "soft", "This browser cannot unpack the texts; a newer one can."));
        return;
      }
      if (selected === i) show(i, detail);
    };

    const coloured = tokenView({ element, fixed, sign, first: has("adapter") ? "adapter" : data.roles[0] });
    const show = (i, detail) => {
      const pane = $("detail");
      const head = element("div");
      head.append(element("strong", "mono", data.id[i]));
      head.append(element("div", "soft", `${group(i)} · ${data.tokens[i]} tokens`));
      const figures = data.roles.map((role) => `${role} ${fixed(data[role][i], 4)}`);
      head.append(element("div", "num", "loss: " + figures.join(" · ")));
      if (drift) head.append(element("div", "num", `merged − adapter: ${sign(drift[i])}` +
        (data.kl[i] === null ? "" : ` · mean KL ${data.kl[i].toExponential(1)}`) +
        (data.flips[i] ? ` · ${data.flips[i]} other first choice${data.flips[i] > 1 ? "s" : ""}` : "")));
      pane.replaceChildren(head);
      if (detail.redacted) {
        pane.append(element("p", "soft", "The text of this row must not be published: its id, its scores and a " +
          "salted hash are all that leave the machine."));
        return;
      }
      pane.append(element("h3", "", "Prompt"), element("div", "text", detail.prompt));
      pane.append(element("h3", "", "Response"));
      if (detail.pieces) pane.append(coloured(detail, () => show(i, detail)));
      else pane.append(element("div", "text", detail.response));
    };

    // A group's name in a table leads to its examples.
    for (const button of document.querySelectorAll(".group-link"))
      button.addEventListener("click", () => {
        for (const kind of ["source", "domain", "difficulty"]) {
          const place = data[kind].names.indexOf(button.dataset.name);
          $("f-" + kind).value = kind === button.dataset.kind && place >= 0 ? String(place) : "";
        }
        refresh();
        $("examples").scrollIntoView();
      });
    refresh();
  }
})();
