// Clients: search on all workers, and one client with its subscriptions.
import { get, post } from "./api.js";
import { channelLink } from "./channels.js";
import { what } from "./tap.js";
import {
  attempt, bytes, confirmed, duration, el, every, facts, field, message, mono, number, panel, plural,
  table, visible,
} from "./dom.js";

const FILTERS = [
  ["user", "User"],
  ["channel", "Channel or pattern"],
  ["protocol", "Protocol"],
  ["address", "Address"],
];

export function clients(root, parameters, signal) {
  const inputs = FILTERS.map(([name, label]) => [
    name,
    label,
    el("input", { id: `by-${name}`, value: parameters.get(name) ?? "", spellcheck: "false", autocapitalize: "off", autocomplete: "off" }),
  ]);
  const form = el(
    "form",
    { class: "panel row", role: "search" },
    inputs.map(([, label, input]) => field(label, input, null, false)),
    el("button", { class: "primary" }, "Search"),
  );
  const list = table(
    "Clients",
    ["Client", "User", "Protocol", "Software", "Address", { text: "Connected", number: true },
      { text: "Channels", number: true }, { text: "Waiting", number: true }],
    { id: "clients" },
  );
  const note = el("p", { class: "quiet", role: "status" }, "Asking all workers …");
  const missing = el("p", { class: "bad" });
  const more = el("button", { type: "button", hidden: true }, "Load more");
  root.append(form, panel("Clients", note, missing, list.element, el("div", { class: "buttons" }, more)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const query = new URLSearchParams();
    for (const [name, , input] of inputs) if (input.value.trim()) query.set(name, input.value.trim());
    location.hash = `#/clients?${query}`;
  });

  let after = "";
  async function load() {
    const filters = Object.fromEntries(FILTERS.map(([name]) => [name, parameters.get(name)]));
    const page = await get("connections", { ...filters, after }, signal);
    list.body.append(...page.connections.map((each) => list.row(clientCells(each))));
    after = page.after;
    more.hidden = !after;
    const shown = list.body.childElementCount;
    note.textContent = page.total > shown ? `${plural(page.total, "client")}, ${number(shown)} shown.` : `${plural(page.total, "client")}.`;
    list.element.hidden = !shown;
    missing.textContent = Object.entries(page.missing)
      .map(([worker, reason]) => `Clients of ${worker} are missing: ${reason}.`)
      .join(" ");
  }
  more.addEventListener("click", () => attempt(more, load));
  return attempt(null, load);
}

const userText = (connection) => (connection.user ? mono(connection.user) : el("span", { class: "quiet" }, "anonymous"));

function clientCells(connection) {
  const address = connection.forwarded_for || connection.address;
  return [
    el("a", { href: `#/client/${encodeURIComponent(connection.id)}` }, mono(connection.id)),
    userText(connection),
    [connection.protocol, el("span", { class: "sub" }, connection.transport)],
    visible(connection.software || "–"),
    mono(address || "–"),
    duration(connection.connected_s * 1000),
    [number(connection.subscription_count), connection.behind ? el("span", { class: "sub" }, `${number(connection.behind)} behind`) : null],
    connection.waiting_bytes ? bytes(connection.waiting_bytes) : "–",
  ];
}

export function client(root, _parameters, signal, id) {
  const summary = el("div", {});
  const note = el("p", { class: "bad", role: "status" });
  const subscriptions = table(
    "Subscriptions",
    ["Channel", "Mode", "Position", { text: "Unread", number: true }, { text: "Actions", hidden: true }],
    { id: "subscriptions" },
  );
  const history = table("Journal", ["Time", "Event", "Channel", "Details"], { id: "journal" });
  const rejections = el("div", {});
  const actions = el("div", { class: "buttons" });
  root.append(
    el("h2", { class: "object", id: "object" }, "Client ", mono(id)),
    el("section", { class: "panel", "aria-labelledby": "object" }, note, summary, actions),
    panel("Subscriptions", subscriptions.element),
    panel("Recent rejections", rejections),
    panel("Journal", history.element),
  );
  let known = "";

  async function run(button, path, body, done, question) {
    if (!(await confirmed(question))) return;
    await attempt(button, async () => {
      const answer = await post(path, body);
      message(done(answer));
      await load().catch(() => null);
    });
  }

  function button(text, path, body, done, question, kind = "small") {
    const element = el("button", { type: "button", class: kind, click: () => run(element, path, body, done, question) }, text);
    return element;
  }

  function subscriptionRow(connection, each) {
    const { user } = connection;
    const { channel } = each;
    const end = button(
      "Unsubscribe", "unsubscribe", { user, channel }, () => `Ended the subscriptions of ${user} to ${channel}.`,
      { title: "Unsubscribe?", text: `All subscriptions of ${visible(user)} to ${visible(channel)} will end. The user may subscribe again.`, action: "Unsubscribe" },
    );
    const revoke = button(
      "Revoke", "revoke", { user, channel }, ({ id: at }) => `Revoked the right of ${user} to ${channel} at ${at}.`,
      { title: "Revoke the right?", text: `${visible(user)} will receive no later event of ${visible(channel)}, until you grant the right again on the channel's page.`, action: "Revoke" },
    );
    return subscriptions.row([
      channelLink(channel),
      each.mode,
      mono(each.position),
      each.behind === null ? "unknown" : number(each.behind),
      user ? el("div", { class: "buttons" }, end, revoke) : "–",
    ]);
  }

  function show(connection) {
    note.textContent = "";
    const { user } = connection;
    summary.replaceChildren(
      facts([
        ["User", userText(connection)],
        ["Groups", connection.groups.length ? connection.groups.map(visible).join(", ") : null],
        ["Protocol", `${connection.protocol}, ${connection.transport}`],
        ["Software", visible(connection.software || "unknown")],
        ["User-Agent", mono(connection.agent || "–")],
        ["Address", mono(connection.address || "–")],
        ["Forwarded for", connection.forwarded_for ? mono(connection.forwarded_for) : null],
        ["Connected since", new Date(connection.since_ms).toISOString().slice(0, 19).replace("T", " ")],
        ["Connected for", duration(connection.connected_s * 1000)],
        ["Waiting", `${bytes(connection.waiting_bytes)}${connection.paused ? ", paused: the client does not read" : ""}`],
        ["Worker", mono(`${connection.worker} on ${connection.host}`)],
        ["Client name", connection.client ? mono(connection.client) : null],
      ]),
    );
    if (!actions.querySelector(".close-one")) {
      actions.append(
        button(
          "Close this connection", "close", { connection: id }, () => "Closed the connection.",
          { title: "Close the connection?", text: "The client's other connections stay open.", action: "Close" },
          "danger close-one",
        ),
      );
    }
    if (user && !actions.querySelector(".all-of-user")) {
      actions.append(
        button(
          "Disconnect this user", "disconnect", { user }, ({ closed }) => `Closed ${plural(closed, "connection")} of ${user}.`,
          { title: "Disconnect the user?", text: `All connections of ${visible(user)} will be closed, on all workers.`, action: "Disconnect" },
          "danger all-of-user",
        ),
        el("a", { class: "button", href: `#/clients?${new URLSearchParams({ user })}` }, "All clients of this user"),
      );
    }
    if (!actions.querySelector("[href^='#/tap']")) {
      actions.append(el("a", { class: "button", href: `#/tap?${new URLSearchParams({ connection: id })}` }, "Watch this client"));
    }
    const shown = JSON.stringify(connection.subscriptions);
    if (shown !== known && !subscriptions.body.contains(document.activeElement)) {
      known = shown;
      subscriptions.body.replaceChildren(...connection.subscriptions.map((each) => subscriptionRow(connection, each)));
    }
    rejections.replaceChildren(
      ...(connection.rejections.length
        ? connection.rejections.map((each) => el("p", {}, each.channel ? channelLink(each.channel) : "–", ` ${what(each)}`))
        : [el("p", { class: "quiet" }, "None.")]),
    );
  }

  async function loadHistory() {
    const { events } = await get("events", { connection: id }, signal);
    history.body.replaceChildren(
      ...events.reverse().map((each) =>
        history.row([
          new Date(each.ms).toISOString().slice(0, 23).replace("T", " "),
          each.event,
          each.channel ? channelLink(each.channel) : "–",
          what(each),
        ]),
      ),
    );
  }

  async function load() {
    try {
      attempt(null, loadHistory);
      show(await get("connection", { id }, signal));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      note.textContent = error.message.replace(/^./, (first) => first.toUpperCase());
    }
  }
  return every(3000, signal, load);
}
