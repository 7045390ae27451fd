"use strict";
// Every example as a point: loss of the base to the right, of the adapter upward.
function exampleMap({ data, gain, SAME, list, HEIGHT, shown, selected, select }) {
  const $ = (id) => document.getElementById(id);
  // Those filtered out stay as a shadow.
  const map = $("map");
  if (!gain) {
    map.hidden = true;
    $("map-note").hidden = true;
  } else {
    $("map-note").textContent = "Each point is an example: loss of the base to the right, of the adapter upward. " +
      "Below the line the adapter is better. Click a point to read it.";
  }
  const PAD = 26;
  let points = [];
  const drawMap = () => {
    if (!gain || !map.clientWidth) return;
    const [width, height, dots] = [map.clientWidth, map.clientHeight, devicePixelRatio || 1];
    map.width = width * dots;
    map.height = height * dots;
    const pen = map.getContext("2d");
    pen.scale(dots, dots);
    const ink = (name) => {
      const probe = document.createElement("i");
      probe.style.color = `var(${name})`;
      map.parentElement.append(probe);
      const colour = getComputedStyle(probe).color;
      probe.remove();
      return colour;
    };
    const colours = { better: ink("--good"), worse: ink("--bad"), same: ink("--none"), line: ink("--line"),
      soft: ink("--soft"), ink: ink("--ink") };
    const both = data.id.map((_, i) => i).filter((i) => data.base[i] !== null && data.adapter[i] !== null);
    const most = both.reduce((top, i) => Math.max(top, data.base[i]), 1e-6) * 1.04;
    const tall = both.reduce((top, i) => Math.max(top, data.adapter[i]), 1e-6) * 1.08;
    const x = (loss) => PAD + (loss / most) * (width - PAD - 8);
    const y = (loss) => height - PAD - (loss / tall) * (height - PAD - 8);
    pen.strokeStyle = colours.line;
    pen.beginPath();
    pen.moveTo(x(0), y(0));
    pen.lineTo(x(Math.min(most, tall)), y(Math.min(most, tall)));
    pen.moveTo(x(0), y(tall));
    pen.lineTo(x(0), y(0));
    pen.lineTo(x(most), y(0));
    pen.stroke();
    pen.fillStyle = colours.soft;
    pen.font = "11px system-ui, sans-serif";
    pen.fillText("0", x(0) - 10, y(0) + 13);
    pen.fillText("base " + most.toFixed(1), x(most) - 52, y(0) + 15);
    pen.save();
    pen.translate(x(0) - 8, y(tall) + 62);
    pen.rotate(-Math.PI / 2);
    pen.fillText("adapter " + tall.toFixed(1), 0, 0);
    pen.restore();
    const inside = new Set(shown());
    points = [];
    for (const pass of [false, true])
      for (const i of both) {
        if (inside.has(i) !== pass) continue;
        pen.globalAlpha = pass ? 0.65 : 0.08;
        pen.fillStyle = Math.abs(gain[i]) < SAME ? colours.same : gain[i] < 0 ? colours.better : colours.worse;
        pen.beginPath();
        pen.arc(x(data.base[i]), y(data.adapter[i]), 3, 0, 7);
        pen.fill();
        if (pass) points.push([x(data.base[i]), y(data.adapter[i]), i]);
      }
    if (selected() >= 0 && data.base[selected()] !== null && data.adapter[selected()] !== null) {
      pen.globalAlpha = 1;
      pen.strokeStyle = colours.ink;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x(data.base[selected()]), y(data.adapter[selected()]), 6, 0, 7);
      pen.stroke();
    }
  };
  map.addEventListener("click", (event) => {
    const nearest = points.reduce((best, [px, py, i]) => {
      const far = Math.hypot(px - event.offsetX, py - event.offsetY);
      return far < best[0] ? [far, i] : best;
    }, [24, -1])[1];
    if (nearest < 0) return;
    list.scrollTop = shown().indexOf(nearest) * HEIGHT - list.clientHeight / 2;
    select(nearest);
  });
  new ResizeObserver(drawMap).observe(map);
  $("theme").addEventListener("click", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  return drawMap;
}
