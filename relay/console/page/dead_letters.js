// Dead letters: list, show, requeue, drop.
import { get, post } from "./api.js";
import { channelLink } from "./channels.js";
import { attempt, confirmed, el, facts, message, mono, panel, plural, showDialog, table, timeOf, visible } from "./dom.js";

export function deadLetters(root, _parameters, signal) {
  const list = table(
    "Dead letters",
    [{ text: "Select", hidden: true }, "Dead letter", "Channel", "Entry", "Reason", { text: "Show", hidden: true }],
    { id: "letters" },
  );
  const note = el("p", { class: "quiet", role: "status" }, "Loading …");
  const all = el("input", { type: "checkbox", id: "all" });
  const requeue = el("button", { type: "button", class: "primary", disabled: true }, "Requeue");
  const drop = el("button", { type: "button", class: "danger", disabled: true }, "Drop");
  const more = el("button", { type: "button", hidden: true }, "Load more");
  const bar = el(
    "div",
    { class: "buttons" },
    el("span", { class: "check" }, all, el("label", { for: "all" }, "Select all shown")),
    requeue,
    drop,
  );
  root.append(
    panel(
      "Dead letters",
      el("p", { class: "hint" }, "Entries that relay could not deliver. Requeue appends an entry again; drop removes it."),
      note,
      bar,
      list.element,
      el("div", { class: "buttons" }, more),
    ),
  );

  let last = "";
  const boxes = () => [...list.body.querySelectorAll("input[type=checkbox]")];
  const chosen = () => boxes().filter((box) => box.checked).map((box) => box.value);
  function update() {
    const count = chosen().length;
    requeue.disabled = drop.disabled = count === 0;
    requeue.textContent = count ? `Requeue ${count}` : "Requeue";
    drop.textContent = count ? `Drop ${count}` : "Drop";
    all.checked = count > 0 && count === boxes().length;
  }

  async function load() {
    const page = await get("dead-letters", { after: last }, signal);
    for (const letter of page.letters) {
      const box = el("input", { type: "checkbox", value: letter.id, "aria-label": `Select ${letter.id}`, change: update });
      const button = el("button", { type: "button", class: "small", click: () => attempt(button, () => show(letter.id)) }, "Show");
      button.setAttribute("aria-label", `Show dead letter ${letter.id}`);
      list.body.append(
        list.row([
          box,
          [mono(letter.id), el("span", { class: "sub" }, timeOf(letter.id))],
          letter.channel === null ? "–" : channelLink(letter.channel),
          mono(letter.entry ?? "–"),
          visible(letter.reason),
          button,
        ]),
      );
      last = letter.id;
    }
    more.hidden = !page.more;
    note.textContent = page.total ? `${plural(page.total, "dead letter")}, oldest first.` : "No dead letters.";
    bar.hidden = list.element.hidden = !list.body.childElementCount;
    update();
  }

  async function reload() {
    list.body.replaceChildren();
    last = "";
    await load();
  }

  async function show(id) {
    const letter = await get("dead-letter", { id });
    const { fields = [], ...values } = letter;
    showDialog(
      `Dead letter ${id}`,
      facts(
        Object.entries(values)
          .filter(([name, value]) => value !== null && value !== false && name !== "id")
          .map(([name, value]) => [visible(name), mono(value)]),
      ),
      fields.length ? el("h3", {}, "Fields of the entry") : null,
      fields.map(([name, value]) => [el("p", { class: "sub" }, visible(name)), el("pre", {}, value)]),
    );
  }

  all.addEventListener("change", () => {
    for (const box of boxes()) box.checked = all.checked;
    update();
  });
  more.addEventListener("click", () => attempt(more, load));
  requeue.addEventListener("click", () =>
    attempt(requeue, async () => {
      const ids = chosen();
      let count = 0;
      for (let start = 0; start < ids.length; start += 100) {
        const { requeued, failed } = await post("dead-letters/requeue", { ids: ids.slice(start, start + 100) });
        count += requeued.length;
        for (const { letter, error } of failed.slice(0, 3)) message(`${letter}: ${error}`, "error");
      }
      message(`Requeued ${count}.`);
      await reload();
    }).finally(update),
  );
  drop.addEventListener("click", async () => {
    const ids = chosen();
    const agreed = await confirmed({
      title: `Drop ${ids.length} dead letter${ids.length === 1 ? "" : "s"}?`,
      text: "They will be removed and cannot be requeued afterwards.",
      action: "Drop",
    });
    if (!agreed) return;
    await attempt(drop, async () => {
      let count = 0;
      for (let start = 0; start < ids.length; start += 100) {
        count += (await post("dead-letters/drop", { ids: ids.slice(start, start + 100) })).dropped;
      }
      message(`Dropped ${count}.`);
      await reload();
    });
    update();
  });
  return attempt(null, load);
}
