// Elements of the page. Text from events and clients is inserted as text only, never as markup.

export const at = (id) => document.getElementById(id);

// `attributes` with a function are listeners, as in {click: f}; null and false are omitted.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.flat(Infinity).filter((each) => each !== null && each !== undefined));
  return element;
}

// Control characters and those that change the direction of text could disguise a name.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
export const visible = (text) =>
  String(text).replace(HIDDEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

export const mono = (text) => el("span", { class: "mono" }, visible(text));

export function number(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "–";
  return perSecond >= 10 ? number(Math.round(perSecond)) : String(Math.round(perSecond * 10) / 10);
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  for (const [unit, size, limit] of [["s", 1e3, 6e4], ["min", 6e4, 3.6e6], ["h", 3.6e6, 8.64e7]]) {
    if (ms < limit) return `${short(ms / size)} ${unit}`;
  }
  return `${short(ms / 8.64e7)} d`;
}

const short = (value) => (value < 10 ? String(Math.round(value * 10) / 10) : String(Math.round(value)));

export function timeOf(entryId) {
  const ms = Number(String(entryId).split("-")[0]);
  return ms > 0 && ms < 8.64e15 ? new Date(ms).toISOString().replace("T", " ").replace("Z", "") : "";
}

// The roles keep it a table for screen readers where the style sheet turns rows into cards.
export function table(label, heads, { id = null } = {}) {
  const body = el("tbody", { role: "rowgroup" });
  const row = el("tr", { role: "row" });
  for (const head of heads) {
    const { text, number: isNumber, hidden } = typeof head === "string" ? { text: head } : head;
    row.append(
      el(
        "th",
        { role: "columnheader", scope: "col", class: isNumber ? "number" : null },
        hidden ? el("span", { class: "unseen" }, text) : text,
      ),
    );
  }
  const element = el(
    "table",
    { role: "table", "aria-label": label, class: "cards", id },
    el("thead", { role: "rowgroup" }, row),
    body,
  );
  const texts = heads.map((head) => (typeof head === "string" ? { text: head } : head));
  const rowOf = (cells, attributes = {}) =>
    el(
      "tr",
      { role: "row", ...attributes },
      cells.map((cell, index) =>
        el(
          "td",
          {
            role: "cell",
            "data-label": texts[index].hidden ? "" : texts[index].text,
            class: texts[index].number ? "number" : null,
            "data-none": cell === "–",
          },
          cell,
        ),
      ),
    );
  return { element, body, row: rowOf };
}

export function panel(title, ...children) {
  const id = `title-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
  return el("section", { class: "panel", "aria-labelledby": id }, el("h2", { id }, title), children);
}

// A label with its control, which must have an ID.
export function field(label, control, hint = null, grow = true) {
  if (hint) control.setAttribute("aria-describedby", `${control.id}-hint`);
  return el(
    "div",
    { class: grow ? "field" : "field narrow" },
    el("label", { for: control.id }, label),
    control,
    hint ? el("p", { class: "hint", id: `${control.id}-hint` }, hint) : null,
  );
}

export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined);
  return el(
    "dl",
    { class: "facts" },
    shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

export function message(text, kind = "done") {
  const line = el(
    "p",
    { class: "notice", "data-kind": kind },
    el("span", {}, visible(text)),
    el("button", { type: "button", class: "close", "aria-label": "Dismiss", click: () => line.remove() }, "×"),
  );
  at("messages").append(line);
  while (at("messages").childElementCount > 4) at("messages").firstElementChild.remove();
  if (kind === "done") setTimeout(() => line.remove(), 8000);
}

// Run an action of the user, with the button disabled meanwhile, and show its error.
export async function attempt(button, action) {
  if (button) button.disabled = true;
  try {
    return await action();
  } catch (error) {
    if (error.name !== "AbortError") message(error.message, "error");
    return null;
  } finally {
    if (button) button.disabled = false;
  }
}

// Ask for a confirmation. With `typed`, that text must be entered.
export function confirmed({ title, text, action, typed = null }) {
  return new Promise((resolve) => {
    const input = typed === null ? null : el("input", { id: "confirm-text", autocomplete: "off", spellcheck: "false" });
    const go = el("button", { type: "submit", class: "danger", disabled: typed !== null }, action);
    input?.addEventListener("input", () => {
      go.disabled = input.value !== typed;
    });
    const form = el(
      "form",
      {},
      el("h2", { id: "confirm-title" }, title),
      el("p", { class: "wide" }, text),
      input ? field(`Enter ${visible(typed)} to confirm`, input) : null,
      el(
        "div",
        { class: "buttons" },
        go,
        el("button", { type: "button", click: () => close(false) }, "Cancel"),
      ),
    );
    const dialog = el("dialog", { "aria-labelledby": "confirm-title" }, form);
    const close = (answer) => {
      dialog.close();
      dialog.remove();
      resolve(answer);
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      close(true);
    });
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      close(false);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

// Show something in a dialog with a button that closes it.
export function showDialog(title, ...children) {
  const dialog = el(
    "dialog",
    { "aria-labelledby": "dialog-title", class: "large", close: () => dialog.remove() },
    el("h2", { id: "dialog-title" }, title),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, children),
    el(
      "div",
      { class: "buttons" },
      el("button", { type: "button", click: () => dialog.close() }, "Close"),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
}

// Run `task` now and then every `ms`, until the signal. A hidden page does not run it.
export function every(ms, signal, task) {
  let timer = 0;
  const run = async () => {
    if (!document.hidden) {
      try {
        await task();
      } catch (error) {
        if (error.name === "AbortError") return;
      }
    }
    if (!signal.aborted) timer = setTimeout(run, ms);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  return run();
}

export function dataText(data) {
  return typeof data === "string" ? data : JSON.stringify(data);
}
