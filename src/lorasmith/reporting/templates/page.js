"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Theme: the system's, until someone chooses.
  const dark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
  });

  // The section that is being read, in the bar.
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.hash.slice(1), a]));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((a) => a.removeAttribute("aria-current"));
        const link = links.get(entry.target.id);
        if (link) link.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70%" },
  );
  document.querySelectorAll("section[id]").forEach((section) => watch.observe(section));

  // Tips: on hover and on keyboard focus.
  const tip = $("tip");
  const showTip = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 12, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + box.height + 24 > innerHeight ? y - box.height - 12 : y + 16) + "px";
  };
  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest && event.target.closest("[data-tip]");
    if (target) showTip(target, event.clientX, event.clientY);
    else tip.hidden = true;
  });
  document.addEventListener("focusin", (event) => {
    const target = event.target.closest("[data-tip]");
    if (!target) return;
    const box = target.getBoundingClientRect();
    showTip(target, box.left, box.bottom);
  });
  document.addEventListener("focusout", () => (tip.hidden = true));

  // One kind of group at a time; print and a page without script show all.
  for (const tabs of document.querySelectorAll("[data-tabs]")) {
    const cards = [];
    for (let next = tabs.nextElementSibling; next && next.classList.contains("tab"); next = next.nextElementSibling)
      cards.push(next);
    const buttons = [...tabs.children];
    const choose = (index) => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
      cards.forEach((card, i) => card.classList.toggle("tab-off", i !== index));
    };
    buttons.forEach((button, index) => button.addEventListener("click", () => choose(index)));
    choose(0);
  }
  for (const pick of document.querySelectorAll("[data-heat]"))
    for (const button of pick.children)
      button.addEventListener("click", () => {
        for (const other of pick.children) other.setAttribute("aria-pressed", String(other === button));
        pick.parentElement.querySelector(".heat").dataset.shows = button.dataset.shows;
      });

  // Tables sort by any column of numbers or names; the row of all examples stays on top.
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.classList.contains("wide")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("total"));
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          const order = x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : String(x).localeCompare(y);
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
