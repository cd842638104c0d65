// The live page: follows channels over server-sent events and shows their events and positions.
//
// If a connection is lost, the browser resumes it with Last-Event-ID. The page stores the same
// cursor to resume after its own Disconnect, after a reload, and after a rejected request.
import { at, between, buttons, clearNotices, clock, eventRow, notice } from "./view.js";
import { show, showPositions, why } from "./view.js";

const MAX_ROWS = 500;
const MAX_RETRY_MS = 30000;

const form = at("form");
const eventRows = at("events").tBodies[0];

let channels = [];
let token = "";
let cursor = ""; // resumes all channels; "" means new events only
let positions = new Map(); // channel -> {id, count, off}
let source = null;
let retryMs = 2000;
let failures = 0; // failed attempts of the page since the last open stream
let resuming = false; // true if the next relay:open resumes a stream
let arrived = 0;
let pending = [];
let flushTimer = 0;
let retryTimer = 0;
let probe = null; // the fetch that determines why a stream was rejected

// Rows are added in batches, so that a burst of events does not block the page.
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

// --- state that is kept over a reload --------------------------------------------------------

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
  probe?.abort();
  probe = null;
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
      findReason();
      return;
    }
    resuming = true;
    show("waiting", "Connection lost. Reconnecting", retryMs);
  };
  const on = (name, handle) =>
    mine.addEventListener(`relay:${name}`, (message) => {
      if (message.lastEventId) cursor = message.lastEventId;
      handle(JSON.parse(message.data));
      flushSoon();
    });
  on("open", opened);
  on("gap", (gap) =>
    notice("gap", `Gap on ${gap.channel}:`, `events ${between(gap)} are missing; ${why(gap)}.`),
  );
  on("reset", (reset) =>
    notice(
      "reset",
      `Reset on ${reset.channel}:`,
      `events ${between(reset)} may be missing; ${why(reset)}.`,
    ),
  );
  on("revoked", revoked);
  on("error", (error) => notice("error", "Error:", `${error.message} (${error.code})`));
  on("closing", ({ reason }) =>
    notice("closing", "Relay closes this connection", reason ? `(${reason}).` : ""),
  );
}

function opened(stream) {
  retryMs = stream.retry_ms ?? retryMs;
  if (resuming) notice("resumed", "Resumed", `after ${whereText()}.`);
  resuming = false;
  for (const { channel, id } of stream.channels) {
    const place = positions.get(channel);
    if (place) [place.id, place.off] = [id, ""];
  }
  save();
}

// Show numbers as they were sent if the browser supports it: 12345678901234567890 is not a double.
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

function revoked(revocation) {
  notice("revoked", `Revoked on ${revocation.channel}:`, `${why(revocation)}.`);
  const place = positions.get(revocation.channel);
  if (place) place.off = revocation.reason === "expired" ? "expired" : "revoked";
  // The stream ends with its last channel. The browser's reconnects would all be rejected.
  if ([...positions.values()].every(({ off }) => off)) {
    stop();
    refused(`Closed: ${why(revocation)}`);
  }
}

function refused(text) {
  remember("refused");
  show("refused", text);
}

// EventSource does not report why it was rejected, so send the same request with fetch.
async function findReason() {
  stop();
  show("connecting", "Rejected; checking the reason …");
  const mine = new AbortController();
  probe = mine;
  try {
    const response = await fetch(address(), { cache: "no-store", signal: mine.signal });
    if (response.ok) {
      mine.abort(); // the request is accepted now
      probe = null;
      retry(retryMs, "The stream ended");
    } else if (response.status >= 500 || response.status === 429) {
      const error = await errorOf(response);
      if (probe === mine) {
        const wait = Number(response.headers.get("Retry-After")) * 1000;
        retry(Math.min(wait || backoff(), MAX_RETRY_MS), error.message);
      }
    } else {
      const error = await errorOf(response);
      if (probe !== mine) return;
      const on = error.channel ? ` on ${error.channel}` : "";
      notice("refused", `Rejected${on}:`, `${error.message} (${error.code}).`);
      refused(`Rejected: ${error.message}`);
    }
  } catch {
    if (probe === mine) retry(backoff(), "Relay is unreachable");
  }
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return { code: error.code, message: error.message, channel: error.channel };
  } catch {
    return { code: String(response.status), message: `unexpected status ${response.status}` };
  }
}

// Half of the delay is random, so that pages do not reconnect at the same time.
function backoff() {
  failures += 1;
  const whole = Math.min(retryMs * 2 ** Math.min(failures - 1, 10), MAX_RETRY_MS);
  return whole * (0.5 + Math.random() / 2);
}

function retry(delayMs, text) {
  show("waiting", `${text}. Reconnecting`, delayMs);
  retryTimer = setTimeout(open, delayMs);
}

// --- actions of the user ---------------------------------------------------------------------

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
    return text; // not a valid escape
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
  show("dropped", `Disconnected at ${whereText()}`);
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
  // Without a connection, discard the position as well.
  if (!source && !probe && at("state").dataset.state !== "waiting") {
    sessionStorage.removeItem(cursorKey());
    sessionStorage.removeItem("relay:form");
    channels = [];
    positions = new Map();
    cursor = "";
    show("idle", "Not connected");
  }
  flush();
}

// Channels and token are passed in the fragment, which browsers do not send and servers do not log.
// The token is removed from the address bar, where it would be copied with the URL.
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
    if (stored.wish === "dropped") show("dropped", `Disconnected at ${whereText()}`);
    else show("refused", "Rejected before the reload");
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
