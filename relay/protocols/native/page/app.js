// The live page: follows channels over server-sent events and shows where each of them is.
//
// While a stream lives the browser recovers it by itself (Last-Event-ID). The page keeps the same
// cursor for what a browser forgets: its own Drop and Reconnect, a reload, and a refusal.
import { at, between, buttons, clearNotices, clock, eventRow, notice } from "./view.js";
import { show, showPositions, why } from "./view.js";

const MAX_ROWS = 500;
const MAX_RETRY_MS = 30000;

const form = at("form");
const eventRows = at("events").tBodies[0];

let channels = [];
let token = "";
let cursor = ""; // what resumes all channels; "" is from now
let positions = new Map(); // channel -> {id, count, off}
let source = null;
let retryMs = 2000;
let failures = 0; // of our own attempts, since the last stream that opened
let resuming = false; // whether the next relay:open continues something
let arrived = 0;
let pending = [];
let flushTimer = 0;
let retryTimer = 0;
let question = null; // the fetch that asks why a stream was refused

// Rows are added some times a second, not once per event: a burst must not freeze the page.
function flush() {
  flushTimer = 0;
  const fresh = pending.splice(0).reverse().map(eventRow);
  eventRows.prepend(...fresh);
  while (eventRows.childElementCount > MAX_ROWS) eventRows.lastElementChild.remove();
  const shown = eventRows.childElementCount;
  at("events").hidden = shown === 0;
  at("no-events").hidden = shown > 0;
  at("count").textContent =
    arrived > shown ? `${arrived}, the newest ${shown} shown` : arrived ? String(arrived) : "";
  showPositions(positions);
  save();
}

function flushSoon() {
  if (!flushTimer) flushTimer = setTimeout(flush, 50);
}

// --- what a reload must not lose -------------------------------------------------------------

const cursorKey = () => `relay:cursor:${JSON.stringify(channels)}`;

function save() {
  if (!channels.length) return;
  const places = [...positions].map(([channel, place]) => [channel, place.id]);
  sessionStorage.setItem(cursorKey(), JSON.stringify({ cursor, places }));
}

function recall() {
  cursor = "";
  positions = new Map(channels.map((channel) => [channel, { id: "", count: 0, off: "" }]));
  try {
    const stored = JSON.parse(sessionStorage.getItem(cursorKey()) ?? "null");
    if (!stored) return;
    cursor = stored.cursor;
    for (const [channel, id] of stored.places) positions.get(channel).id = id;
  } catch {
    sessionStorage.removeItem(cursorKey());
  }
}

// --- the stream ------------------------------------------------------------------------------

function address() {
  const query = new URLSearchParams();
  for (const channel of channels) query.append("channel", channel);
  if (token) query.set("token", token);
  query.set("envelope", "1");
  if (cursor) query.set("last_event_id", cursor);
  return `/sse?${query}`;
}

function stop() {
  source?.close();
  source = null;
  question?.abort();
  question = null;
  clearTimeout(retryTimer);
  if (pending.length) flush();
}

function open() {
  stop();
  resuming = cursor !== "";
  show("connecting", "Connecting …");
  const mine = new EventSource(address());
  source = mine;
  mine.onopen = () => {
    failures = 0;
    show("connected", "Connected");
  };
  mine.onmessage = (message) => receive(message);
  mine.onerror = () => {
    if (mine !== source) return;
    if (mine.readyState === EventSource.CLOSED) {
      ask();
      return;
    }
    resuming = true;
    show("waiting", "Connection lost. The browser reconnects", retryMs);
  };
  const on = (name, handle) =>
    mine.addEventListener(`relay:${name}`, (message) => {
      if (message.lastEventId) cursor = message.lastEventId;
      handle(JSON.parse(message.data));
      flushSoon();
    });
  on("open", opened);
  on("gap", (said) =>
    notice("gap", `Gap on ${said.channel}:`, `events ${between(said)} are missing; ${why(said)}.`),
  );
  on("reset", (said) =>
    notice(
      "reset",
      `Reset on ${said.channel}:`,
      `something ${between(said)} may have been missed; ${why(said)}.`,
    ),
  );
  on("revoked", revoked);
  on("error", (said) => notice("error", "Error:", `${said.message} (${said.code})`));
  on("closing", (said) =>
    notice("closing", "The relay closes this connection", said.reason ? `(${said.reason}).` : ""),
  );
}

function opened(said) {
  retryMs = said.retry_ms ?? retryMs;
  if (resuming) notice("resumed", "Resumed", `after ${whereText()}.`);
  resuming = false;
  for (const { channel, id } of said.channels) {
    const place = positions.get(channel);
    if (place) [place.id, place.off] = [id, ""];
  }
  save();
}

// Numbers are shown as they were sent, where the browser can: 12345678901234567890 is no double.
function asSent(_key, value, context) {
  return typeof value === "number" && context?.source && JSON.rawJSON
    ? JSON.rawJSON(context.source)
    : value;
}

function receive(message) {
  if (message.lastEventId) cursor = message.lastEventId;
  const event = JSON.parse(message.data, asSent);
  arrived += 1;
  const place = positions.get(event.channel);
  if (place) {
    place.count += 1;
    if (event.id !== undefined) place.id = event.id;
  }
  pending.push({ time: clock(), event });
  if (pending.length > MAX_ROWS) pending.shift();
  flushSoon();
}

function revoked(said) {
  notice("revoked", `Revoked on ${said.channel}:`, `${why(said)}.`);
  const place = positions.get(said.channel);
  if (place) place.off = said.reason === "expired" ? "expired" : "revoked";
  // The stream ends with its last channel; the browser would only be refused again and again.
  if ([...positions.values()].every(({ off }) => off)) {
    stop();
    refused(`Closed: ${why(said)}`);
  }
}

function refused(text) {
  remember("refused");
  show("refused", text);
}

// EventSource does not say why it was refused: the same request, asked once more, does.
async function ask() {
  stop();
  show("connecting", "Refused; asking why …");
  const asked = new AbortController();
  question = asked;
  try {
    const answer = await fetch(address(), { cache: "no-store", signal: asked.signal });
    if (answer.ok) {
      asked.abort(); // by now it would be served
      question = null;
      retry(retryMs, "The stream ended");
    } else if (answer.status >= 500 || answer.status === 429) {
      const error = await reason(answer);
      if (question === asked) {
        const wait = Number(answer.headers.get("Retry-After")) * 1000;
        retry(Math.min(wait || backoff(), MAX_RETRY_MS), error.message);
      }
    } else {
      const error = await reason(answer);
      if (question !== asked) return;
      const on = error.channel ? ` on ${error.channel}` : "";
      notice("refused", `Refused${on}:`, `${error.message} (${error.code}).`);
      refused(`Refused: ${error.message}`);
    }
  } catch {
    if (question === asked) retry(backoff(), "The relay cannot be reached");
  }
}

async function reason(answer) {
  try {
    const { error } = await answer.json();
    return { code: error.code, message: error.message, channel: error.channel };
  } catch {
    return { code: String(answer.status), message: `the server answered ${answer.status}` };
  }
}

// Half of it random, so that not all pages come back at once.
function backoff() {
  failures += 1;
  const whole = Math.min(retryMs * 2 ** Math.min(failures - 1, 10), MAX_RETRY_MS);
  return whole * (0.5 + Math.random() / 2);
}

function retry(delayMs, text) {
  show("waiting", `${text}. Reconnecting`, delayMs);
  retryTimer = setTimeout(open, delayMs);
}

// --- what the person does --------------------------------------------------------------------

function whereText() {
  if (channels.length !== 1) return "the last position of each channel";
  return positions.get(channels[0]).id || "the position it had";
}

// White space separates names in the field; within a name it is written as %20, as in Redis keys
// (relay/stream/format/keys.py, but any white space).
function escaped(name) {
  return name.replace(/\s|%(?=[0-9A-F]{2})/g, (found) => encodeURIComponent(found));
}

function unescaped(text) {
  try {
    return text.replace(/(%[0-9A-F]{2})+/g, decodeURIComponent);
  } catch {
    return text; // no escape of ours
  }
}

function remember(wish) {
  sessionStorage.setItem("relay:form", JSON.stringify({ channels, token, wish }));
}

function follow() {
  stop();
  if (pending.length) flush();
  const wanted = at("channels").value.split(/\s+/).filter(Boolean).map(unescaped);
  channels = [...new Set(wanted)].sort();
  token = at("token").value.trim();
  if (!channels.length) return;
  const query = new URLSearchParams(channels.map((channel) => ["channel", channel]));
  history.replaceState(null, "", `#${query}`);
  recall();
  remember("follow");
  showPositions(positions);
  open();
}

function drop() {
  stop();
  save();
  remember("dropped");
  show("dropped", `Dropped at ${whereText()}`);
}

function reconnect() {
  token = at("token").value.trim();
  for (const place of positions.values()) place.off = "";
  remember("follow");
  open();
}

function clear() {
  pending = [];
  arrived = 0;
  eventRows.replaceChildren();
  clearNotices();
  for (const place of positions.values()) place.count = 0;
  // Without a connection there is nothing that could go on from here: forget the place as well.
  if (!source && !question && at("state").dataset.state !== "waiting") {
    sessionStorage.removeItem(cursorKey());
    sessionStorage.removeItem("relay:form");
    channels = [];
    positions = new Map();
    cursor = "";
    show("idle", "Not connected");
  }
  flush();
}

// Channels and token come in the fragment, which no browser sends and no server logs. The token
// does not stay in the address bar, where it would be copied with the link.
function readFragment() {
  const given = new URLSearchParams(location.hash.slice(1));
  const named = given.getAll("channel").filter(Boolean);
  const tokenGiven = given.get("token");
  if (named.length) at("channels").value = named.map(escaped).join(" ");
  if (tokenGiven !== null) at("token").value = tokenGiven;
  return named.length > 0 && tokenGiven !== null;
}

function start() {
  let stored = null;
  try {
    stored = JSON.parse(sessionStorage.getItem("relay:form") ?? "null");
  } catch {
    sessionStorage.removeItem("relay:form");
  }
  if (stored) {
    at("channels").value = stored.channels.map(escaped).join(" ");
    at("token").value = stored.token;
  }
  const fresh = readFragment();
  if (fresh || (stored ? stored.wish === "follow" : location.hash.includes("channel="))) {
    follow();
  } else if (stored?.channels.length) {
    channels = stored.channels;
    token = stored.token;
    recall();
    showPositions(positions);
    if (stored.wish === "dropped") show("dropped", `Dropped at ${whereText()}`);
    else show("refused", "Refused before the reload");
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  follow();
});
buttons.drop.addEventListener("click", drop);
buttons.reconnect.addEventListener("click", reconnect);
at("clear").addEventListener("click", clear);
addEventListener("hashchange", () => {
  readFragment();
  follow();
});
addEventListener("pagehide", () => {
  if (pending.length) flush();
  save();
});
addEventListener("pageshow", (event) => {
  if (event.persisted && source) open();
});
start();
