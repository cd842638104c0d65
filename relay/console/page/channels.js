// Channels: search by pattern, page by page.
import { get } from "./api.js";
import { attempt, duration, el, every, field, mono, number, panel, plural, rate, table, visible } from "./dom.js";

// Rows whose numbers are refreshed, and the length of the request for them.
const REFRESHED = 40;
const REFRESHED_CHARS = 4000;
// New rows for which a search goes on, and how long.
const ROWS = 20;
const SEARCH_MS = 2000;

export const channelLink = (channel) =>
  el("a", { href: `#/channel/${encodeURIComponent(channel)}` }, mono(channel));

export function followerTexts(stream) {
  // The server with the list of workers does not answer.
  if (!stream.followers) return ["–", ""];
  const counts = Object.entries(stream.followers);
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  return [number(total), counts.map(([protocol, count]) => `${protocol} ${number(count)}`).join(", ")];
}

function followerCell(stream) {
  const [total, shares] = followerTexts(stream);
  return [total, shares ? el("span", { class: "sub" }, shares) : null];
}

export function retentionText(stream) {
  const limits = [];
  if (stream.retention_count) limits.push(`${number(stream.retention_count)} entries`);
  if (stream.retention_age_s) limits.push(duration(stream.retention_age_s * 1000));
  return limits.join(", ") || "none";
}

export function behindText(stream) {
  const worst = stream.groups.reduce((a, b) => (b.lag_ms > (a?.lag_ms ?? -1) ? b : a), null);
  if (!worst) return "–";
  if (!worst.behind) return "up to date";
  return `${number(worst.behind)}${worst.behind_at_least ? "+" : ""} behind, ${duration(worst.lag_ms)}`;
}

export function channels(root, parameters, signal) {
  const input = el("input", {
    id: "pattern", type: "search", spellcheck: "false", autocapitalize: "off", autocomplete: "off",
    value: parameters.get("pattern") ?? "",
  });
  const form = el(
    "form",
    { class: "panel row", role: "search" },
    field("Search channels", input, "Part of a name, or a pattern with * and ?."),
    el("button", { class: "primary" }, "Search"),
  );
  const list = table(
    "Channels",
    ["Channel", { text: "Entries", number: true }, { text: "Last entry", number: true },
      { text: "Rate", number: true }, { text: "Followers", number: true }, "Retention", { text: "Groups", number: true }, "Progress"],
    { id: "channels" },
  );
  const more = el("button", { type: "button", hidden: true }, "Load more");
  const note = el("p", { class: "quiet", role: "status" }, "Searching …");
  root.append(form, panel("Channels", note, list.element, el("div", { class: "buttons" }, more)));

  const rows = new Map(); // channel -> {row, added, at}
  let cursor = "";
  const text = input.value.trim();
  const pattern = !text ? "*" : /[*?[]/.test(text) ? text : `*${text}*`;

  function show(stream) {
    const now = performance.now();
    const known = rows.get(stream.channel);
    const passed = known ? (now - known.at) / 1000 : 0;
    const perSecond = passed > 0.5 ? Math.max(0, stream.added - known.added) / passed : null;
    const row = list.row([
      channelLink(stream.channel),
      number(stream.entries),
      stream.age_ms === null ? "never" : `${duration(stream.age_ms)} ago`,
      perSecond === null ? "–" : `${rate(perSecond)}/s`,
      followerCell(stream),
      retentionText(stream),
      number(stream.groups.length),
      behindText(stream),
    ]);
    if (!known) list.body.append(row);
    // Do not take the keyboard focus away from a link in the row.
    else if (!known.row.contains(document.activeElement)) known.row.replaceWith(row);
    else return;
    rows.set(stream.channel, { row, added: stream.added, at: now });
  }

  // A page comes from a part of the keys, so a rare name may need several.
  async function load() {
    const end = performance.now() + SEARCH_MS;
    const missing = new Set();
    const wanted = rows.size + ROWS;
    do {
      const page = await get("channels", { pattern, cursor }, signal);
      for (const stream of page.channels) show(stream);
      for (const problem of page.missing) missing.add(problem);
      cursor = page.cursor;
    } while (cursor && rows.size < wanted && performance.now() < end);
    more.hidden = !cursor;
    note.textContent = rows.size
      ? `${plural(rows.size, "channel")}${cursor ? ", more may exist" : ""}`
      : cursor
        ? "No channel found yet. Load more to continue the search."
        : "No channel matches.";
    if (missing.size) note.textContent += ` Not complete: ${visible([...missing].join("; "))}`;
  }

  function shown() {
    const names = [];
    let length = 0;
    for (const name of rows.keys()) {
      length += encodeURIComponent(name).length + 9;
      if (names.length === REFRESHED || length > REFRESHED_CHARS) break;
      names.push(name);
    }
    return names;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = input.value.trim();
    location.hash = wanted ? `#/channels?${new URLSearchParams({ pattern: wanted })}` : "#/channels";
  });
  more.addEventListener("click", () => attempt(more, load));
  return attempt(null, load).then(() =>
    every(5000, signal, async () => {
      const names = shown();
      if (!names.length) return;
      const fresh = await get("channels", { channel: names }, signal);
      for (const stream of fresh.channels) show(stream);
    }),
  );
}
