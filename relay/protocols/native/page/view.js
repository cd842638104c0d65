// The view of the live page: state, notices, positions and rows. It does not use the stream.

const MAX_NOTICES = 50;
const MAX_SHOWN_CHARS = 4000;

const REASONS = {
  trimmed: "the stream was trimmed",
  deleted: "entries were deleted",
  other_incarnation: "the stream was deleted and created again",
  failover: "Redis failed over, and its newest entries may be lost",
  position_ahead: "the position is after the end of the stream",
  unknown_position: "the position is not in the stream",
  revoked: "the right to read it was revoked",
  expired: "the token has expired",
  rights_changed: "the rights have changed",
};

export const at = (id) => document.getElementById(id);
export const buttons = { drop: at("drop"), reconnect: at("reconnect") };
const positionRows = at("positions").tBodies[0];
let countdownTimer = 0;

// `untilMs` is the time until the event that `text` announces. The countdown is hidden from screen
// readers, which would read it every second.
export function show(state, text, untilMs = 0) {
  at("state").dataset.state = state;
  if (at("state-text").textContent !== text) at("state-text").textContent = text;
  clearInterval(countdownTimer);
  const end = performance.now() + untilMs;
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    at("countdown").textContent = left > 0 ? ` in ${left} s` : untilMs ? " now" : "";
    if (left <= 0) clearInterval(countdownTimer);
  };
  tick();
  if (untilMs) countdownTimer = setInterval(tick, 250);
  const open = state === "connected" || state === "waiting" || state === "connecting";
  enable(buttons.drop, open, buttons.reconnect);
  enable(buttons.reconnect, state === "dropped" || state === "refused", buttons.drop);
}

// If a button that has the keyboard focus is disabled, move the focus to its successor.
function enable(button, on, successor) {
  const focused = document.activeElement === button;
  button.disabled = !on;
  if (focused && !on) {
    successor.disabled = false;
    successor.focus();
  }
}

export function clock(when = new Date()) {
  const two = (n) => String(n).padStart(2, "0");
  const ms = String(when.getMilliseconds()).padStart(3, "0");
  return `${two(when.getHours())}:${two(when.getMinutes())}:${two(when.getSeconds())}.${ms}`;
}

export function notice(kind, title, text) {
  const line = document.createElement("p");
  line.className = "notice";
  line.dataset.kind = kind;
  const strong = document.createElement("b");
  strong.textContent = title;
  const when = document.createElement("span");
  when.className = "when";
  when.textContent = clock();
  line.append(strong, text ? ` ${text}` : "", " ", when);
  at("notices").prepend(line);
  while (at("notices").childElementCount > MAX_NOTICES) at("notices").lastElementChild.remove();
}

function cell(row, label, text) {
  const td = row.insertCell();
  td.setAttribute("role", "cell");
  td.dataset.label = label;
  if (text === undefined) td.dataset.none = "";
  td.textContent = text === undefined ? "–" : text;
  return td;
}

function newRow() {
  const row = document.createElement("tr");
  row.setAttribute("role", "row");
  return row;
}

export function eventRow({ time, event }) {
  const row = newRow();
  row.className = "fresh";
  cell(row, "Time", time);
  cell(row, "Channel", event.channel);
  cell(row, "ID", event.id);
  cell(row, "Type", event.type);
  cell(row, "Client", event.client);
  const text = typeof event.data === "string" ? event.data : JSON.stringify(event.data);
  const pre = document.createElement("pre");
  pre.textContent =
    text.length > MAX_SHOWN_CHARS
      ? `${text.slice(0, MAX_SHOWN_CHARS)} … ${text.length - MAX_SHOWN_CHARS} more characters`
      : text;
  cell(row, "Data", "").replaceChildren(pre);
  return row;
}

export function showPositions(positions) {
  const rows = [...positions].map(([channel, { id, count, off }]) => {
    const row = newRow();
    cell(row, "Channel", channel);
    const where = cell(row, "Position", off ? `${id ?? "–"} (${off})` : id || "now");
    if (off) where.dataset.off = "";
    cell(row, "Events", String(count)).className = "number";
    return row;
  });
  positionRows.replaceChildren(...rows);
  at("positions").hidden = rows.length === 0;
  at("no-positions").hidden = rows.length > 0;
}

export function clearNotices() {
  at("notices").replaceChildren();
}

export const why = ({ reason }) => REASONS[reason] ?? reason;

export function between({ from, to }) {
  if (from && to && from !== to) return `after ${from} and before ${to}`;
  return from || to ? `after ${from ?? to}` : "here";
}
