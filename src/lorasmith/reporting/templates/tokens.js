"use strict";
// The tokens of a response, coloured by loss or by a difference of losses, and the same as a table.
function tokenView({ element, fixed, sign, first }) {
  let colouring = first;
  // Loss: from nothing to 6 nats. Differences: worse in one colour, better in the other, strongest at the ends.
  const MOST = { delta: 0.05, gain: 3 };
  const colourOf = (kind, value) => {
    const most = MOST[kind] ?? 6;
    const share = Math.min(1, Math.abs(value) / most) * 70;
    return `color-mix(in srgb, var(--${value > 0 ? "worse" : "better"}) ${share.toFixed(1)}%, transparent)`;
  };
  const coloured = (detail, again) => {
    const kinds = [["base", "loss: base"], ["adapter", "loss: adapter"]].filter(([role]) => detail[role]);
    if (detail.base && detail.adapter) kinds.push(["gain", "adapter − base"]);
    if (detail.delta) kinds.push(["delta", "merged − adapter"]);
    if (detail.merged) kinds.push(["merged", "loss: merged"]);
    if (!kinds.some(([kind]) => kind === colouring)) colouring = kinds[0][0];
    const valueOf = (kind, t) => (kind === "gain" ? detail.adapter[t] - detail.base[t] : detail[kind][t]);
    const box = element("div");
    const pick = element("div", "pick");
    for (const [kind, label] of kinds) {
      const button = element("button", "", label);
      button.type = "button";
      button.setAttribute("aria-pressed", String(kind === colouring));
      button.addEventListener("click", () => {
        colouring = kind;
        again();
      });
      pick.append(button);
    }
    const text = element("div", "text");
    detail.pieces.forEach((piece, t) => {
      const token = element("span", "tok", piece === "\n" ? "↵\n" : piece);
      token.style.background = colourOf(colouring, valueOf(colouring, t));
      token.dataset.tip = [JSON.stringify(piece), ...kinds.map(([kind, label]) =>
        `${label}: ${kind === "gain" || kind === "delta" ? sign(valueOf(kind, t)) : fixed(valueOf(kind, t), 3)}`),
      ].join("\n");
      text.append(token);
    });
    const key = element("p", "soft");
    const ramp = element("span", "ramp");
    const ends = colouring === "gain" || colouring === "delta";
    const most = MOST[colouring] ?? 6;
    ramp.style.background = ends
      ? `linear-gradient(90deg, ${colourOf(colouring, -most)}, transparent, ${colourOf(colouring, most)})`
      : `linear-gradient(90deg, transparent, ${colourOf(colouring, most)})`;
    key.append(ends ? `better −${most} ` : "0 ", ramp, ends ? ` +${most} worse` : ` ${most} nats`);
    box.append(pick, key, text, tokenTable(detail, kinds, valueOf));
    return box;
  };
  const tokenTable = (detail, kinds, valueOf) => {
    const folded = element("details");
    folded.append(element("summary", "", "The same as a table"));
    folded.addEventListener("toggle", () => {
      if (!folded.open || folded.children.length > 1) return;
      const table = element("table");
      const head = table.createTHead().insertRow();
      for (const label of ["token", ...kinds.map(([, label]) => label)]) {
        const cell = element("th", label === "token" ? "" : "n", label);
        cell.scope = "col";
        head.append(cell);
      }
      const body = table.createTBody();
      detail.pieces.forEach((piece, t) => {
        const row = body.insertRow();
        row.append(element("td", "mono", JSON.stringify(piece)));
        for (const [kind] of kinds)
          row.append(element("td", "n", kind === "gain" || kind === "delta"
            ? sign(valueOf(kind, t)) : fixed(valueOf(kind, t), 3)));
      });
      const scroll = element("div", "scroll");
      scroll.append(table);
      folded.append(scroll);
    });
    return folded;
  };
  return coloured;
}
