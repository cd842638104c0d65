// Live tap: what happens on all workers, or to one channel, user or client.
import { get } from "./api.js";
import { channelLink } from "./channels.js";
import { attempt, el, every, field, mono, number, panel, plural, table, visible } from "./dom.js";

const FILTERS = [
  ["channel", "Channel or pattern"],
  ["user", "User"],
  ["connection", "Client ID"],
];
const MAX_ROWS = 300;

export function tap(root, parameters, signal) {
  const inputs = FILTERS.map(([name, label]) => [
    name,
    label,
    el("input", { id: `tap-${name}`, value: parameters.get(name) ?? "", spellcheck: "false", autocapitalize: "off", autocomplete: "off" }),
  ]);
  const form = el(
    "form",
    { class: "panel row", role: "search" },
    inputs.map(([, label, input]) => field(label, input, null, false)),
    el("button", { class: "primary" }, "Watch"),
  );
  const list = table(
    "Live tap",
    ["Time", "Event", "Channel", "Client", "Details"],
    { id: "tap" },
  );
  const pause = el("input", { type: "checkbox", id: "pause" });
  const note = el("p", { class: "quiet", role: "status" }, "Watching. New events appear on top.");
  const missing = el("p", { class: "bad" });
  root.append(
    form,
    panel(
      "Live tap",
      el("div", { class: "check" }, pause, el("label", { for: "pause" }, "Pause")),
      note,
      missing,
      list.element,
    ),
  );
  list.element.hidden = true;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const query = new URLSearchParams();
    for (const [name, , input] of inputs) if (input.value.trim()) query.set(name, input.value.trim());
    location.hash = `#/tap?${query}`;
  });

  const filters = Object.fromEntries(FILTERS.map(([name]) => [name, parameters.get(name)]));
  let watch = "";
  let skipped = 0;
  const add = (records, attributes) => {
    list.body.prepend(...records.map((each) => list.row(cells(each), attributes)).reverse());
    while (list.body.childElementCount > MAX_ROWS) list.body.lastElementChild.remove();
    list.element.hidden = !list.body.childElementCount;
  };
  // What happened to clients before is in the journal.
  const before = get("events", { ...filters, count: 50 }, signal).then(({ events }) => add(events));
  return attempt(null, () => before).then(() => every(1000, signal, async () => {
    if (pause.checked) return;
    let answer;
    try {
      answer = await get("tap", { ...filters, watch }, signal);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      missing.textContent = error.message;
      return;
    }
    watch = answer.watch;
    skipped += answer.skipped;
    add(answer.records, { class: "fresh" });
    if (skipped) note.textContent = `Too fast to show everything: ${plural(skipped, "event")} skipped.`;
    missing.textContent = Object.entries(answer.missing)
      .map(([worker, reason]) => `Events of ${worker} are missing: ${reason}.`)
      .join(" ");
  }));
}

const time = (ms) => new Date(ms).toISOString().slice(11, 23);

export function clientCell(event) {
  if (event.user === undefined && event.connection === undefined) return "–";
  const user = event.user ? mono(event.user) : el("span", { class: "quiet" }, "anonymous");
  const link = event.connection
    ? el("a", { class: "sub", href: `#/client/${encodeURIComponent(event.connection)}` }, mono(event.connection))
    : null;
  return [user, link];
}

function cells(event) {
  return [
    time(event.ms),
    event.event,
    event.channel ? channelLink(event.channel) : "–",
    clientCell(event),
    what(event),
  ];
}

// A text with what is not shown in the other columns.
export function what(event) {
  if (event.event === "received") return received(event);
  const parts = [];
  for (const [name, label] of [
    ["reason", ""], ["rule", ""], ["detail", ""], ["protocol", "over "], ["id", "entry "], ["after", "after "],
    ["from", "from "], ["to", "to "], ["position", "at "], ["agent", ""], ["code", "code "], ["route", "at "],
  ]) {
    if (event[name] !== undefined && event[name] !== "" && event[name] !== null) parts.push(`${label}${visible(event[name])}`);
  }
  if (event.duration_s !== undefined) parts.push(`after ${event.duration_s} s`);
  if (event.similar) parts.push(`and ${number(event.similar)} similar ones`);
  return parts.join(", ") || "–";
}

function received(event) {
  const delivered = event.delivered === null ? "an unknown number of" : number(event.delivered);
  const parts = [`delivered to ${delivered} of ${plural(event.followers, "follower")}`];
  if (event.behind) parts.push(`${number(event.behind)} behind, and will read it from the stream`);
  if (event.not_addressed) parts.push(`${number(event.not_addressed)} not addressed`);
  const lines = (event.clients ?? []).map((each) =>
    el("span", { class: "sub" }, mono(each.user || "anonymous"), ` (${each.protocol}, ${visible(each.connection)}): ${each.outcome}`),
  );
  const facts = [event.id ? `entry ${event.id}` : "ephemeral", `${number(event.bytes)} bytes`];
  if (event.type) facts.push(`type ${visible(event.type)}`);
  if (event.to) facts.push(`to ${event.to.map(visible).join(", ")}`);
  return [`${parts.join("; ")}.`, el("span", { class: "sub" }, facts.join(", ")), lines];
}
