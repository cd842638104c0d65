// One channel: entries, live tail, groups, presence, rights, publish, trim and delete.
import { get, post } from "./api.js";
import { behindText, followerTexts, retentionText } from "./channels.js";
import {
  attempt, confirmed, dataText, duration, el, every, facts, field, message, mono, number, panel,
  plural, rate, table, timeOf, visible,
} from "./dom.js";

const MAX_ROWS = 500;

export function channel(root, _parameters, signal, name) {
  const summary = el("div", {});
  const groups = table(
    "Consumer groups",
    ["Group", "Worker", "Position", { text: "Unread", number: true }, { text: "Delay", number: true }],
    { id: "groups" },
  );
  const noGroups = el("p", { class: "quiet" }, "No consumer groups: no worker follows this channel.");
  root.append(
    el("h2", { class: "object", id: "object" }, "Channel ", mono(name)),
    el("section", { class: "panel", "aria-labelledby": "object" }, summary),
    entries(name, signal),
    el(
      "div",
      { class: "columns" },
      publish(name),
      el("div", { class: "stack" }, rights(name), presence(name)),
    ),
    panel("Groups", noGroups, groups.element),
    removal(name),
  );

  let added = null;
  let at = 0;
  return every(3000, signal, async () => {
    const { channels: found } = await get("channels", { channel: name }, signal);
    const stream = found[0];
    if (!stream) {
      summary.replaceChildren(el("p", { class: "quiet" }, "This channel has no stream."));
      groups.body.replaceChildren();
      added = null;
      return;
    }
    const now = performance.now();
    const perSecond = added === null ? null : Math.max(0, stream.added - added) / ((now - at) / 1000);
    [added, at] = [stream.added, now];
    summary.replaceChildren(
      facts([
        ["Entries", number(stream.entries)],
        ["Appended in total", number(stream.added)],
        ["Rate", perSecond === null ? "–" : `${rate(perSecond)} per second`],
        ["Last entry", stream.age_ms === null ? "never" : `${duration(stream.age_ms)} ago`],
        ["Followers", followerFact(name, stream)],
        ["First ID", mono(stream.first ?? "–")],
        ["Last ID", mono(stream.last ?? "–")],
        ["Retention", retentionText(stream)],
        ["Progress", behindText(stream)],
        ["Key", mono(stream.key)],
      ]),
    );
    groups.element.hidden = !stream.groups.length;
    noGroups.hidden = stream.groups.length > 0;
    groups.body.replaceChildren(
      ...stream.groups.map((group) =>
        groups.row([
          mono(group.name),
          group.worker === null ? "another program" : group.alive ? "alive" : "no heartbeat",
          mono(group.last),
          `${number(group.behind)}${group.behind_at_least ? "+" : ""}`,
          duration(group.lag_ms),
        ]),
      ),
    );
  });
}

function followerFact(name, stream) {
  const [total, shares] = followerTexts(stream);
  const link = el("a", { href: `#/clients?${new URLSearchParams({ channel: name })}` }, total);
  const watch = el("a", { href: `#/tap?${new URLSearchParams({ channel: name })}` }, "watch");
  return [link, shares ? ` (${shares}), ` : ", ", watch];
}

function entryCells(name, entry) {
  const kind = entry.revoke !== undefined
    ? ["revocation", `The right of ${visible(entry.revoke)} ends here.`]
    : entry.grant !== undefined
      ? ["grant", `The revocation of ${visible(entry.grant)} ends here.`]
      : entry.broken !== undefined
        ? ["broken", visible(entry.broken)]
        : null;
  const pre = el("pre", {}, kind ? kind[1] : dataText(entry.data));
  const notes = [];
  if (entry.data_bytes) notes.push(`the beginning of ${number(entry.data_bytes)} bytes`);
  if (entry.to) notes.push(`to ${entry.to.map(visible).join(", ")}`);
  if (entry.uid) notes.push(`uid ${visible(entry.uid)}`);
  if (entry.client) notes.push(`client ${visible(entry.client)}`);
  const why = `#/explain?${new URLSearchParams({ channel: name, id: entry.id })}`;
  return [
    [mono(entry.id), el("span", { class: "sub" }, timeOf(entry.id)), el("a", { class: "sub", href: why, "aria-label": `Who received it? (${entry.id})` }, "Who received it?")],
    kind ? kind[0] : entry.type ? visible(entry.type) : "–",
    [pre, notes.length ? el("span", { class: "sub" }, notes.join("; ")) : null],
  ];
}

function entries(name, signal) {
  const list = table("Entries", ["ID", "Type", "Data"], { id: "entries" });
  const older = el("button", { type: "button", hidden: true }, "Older entries");
  const live = el("input", { type: "checkbox", id: "live" });
  const note = el("p", { class: "quiet", role: "status", id: "entries-note" }, "Loading …");
  let newest = "0-0";
  let oldest = "";

  async function load() {
    const page = await get("entries", { channel: name, before: oldest }, signal);
    list.body.append(...page.entries.map((entry) => list.row(entryCells(name, entry))));
    if (page.entries.length) {
      if (!oldest) newest = page.entries[0].id;
      oldest = page.entries.at(-1).id;
    }
    older.hidden = !page.entries.length;
    note.textContent = list.body.childElementCount ? "Newest first." : "No entries.";
    note.hidden = list.body.childElementCount > 0;
  }

  async function follow() {
    if (!live.checked) return;
    const page = await get("entries", { channel: name, after: newest, count: 100 }, signal);
    if (!page.entries.length) return;
    newest = page.entries.at(-1).id;
    oldest ||= page.entries[0].id;
    const rows = page.entries.map((entry) => list.row(entryCells(name, entry), { class: "fresh" }));
    list.body.prepend(...rows.reverse());
    note.hidden = true;
    while (list.body.childElementCount > MAX_ROWS) list.body.lastElementChild.remove();
    if (list.body.childElementCount === MAX_ROWS) older.hidden = true;
  }

  older.addEventListener("click", () => attempt(older, load));
  attempt(null, load).then(() => every(1000, signal, follow));
  return panel(
    "Entries",
    el("div", { class: "check" }, live, el("label", { for: "live" }, "Live tail: show new entries as they arrive")),
    note,
    list.element,
    el("div", { class: "buttons" }, older),
  );
}

function publish(name) {
  const data = el("textarea", { id: "publish-data", rows: "4", spellcheck: "false", required: true });
  const type = el("input", { id: "publish-type", autocomplete: "off", spellcheck: "false" });
  const to = el("input", { id: "publish-to", autocomplete: "off", spellcheck: "false" });
  const go = el("button", { class: "primary" }, "Publish");
  const form = el(
    "form",
    { autocomplete: "off" },
    field("Data", data, "JSON or text, sent as it is."),
    field("Type", type, "Optional."),
    field("Recipients", to, "Optional: user:NAME, group:NAME or client:NAME, separated by spaces."),
    el("div", { class: "buttons" }, go),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(go, async () => {
      const recipients = to.value.split(/\s+/).filter(Boolean);
      const done = await post("publish", {
        channel: name, data: data.value, type: type.value || null,
        to: recipients.length ? recipients : null,
      });
      message(`Published as ${done.id}.`);
    });
  });
  return panel("Publish", form);
}

function rights(name) {
  const user = el("input", { id: "rights-user", autocomplete: "off", spellcheck: "false", required: true });
  const answer = el("div", { role: "status" });
  const go = el("button", {}, "Check");
  const revoke = el("button", { type: "button" }, "Revoke");
  const grant = el("button", { type: "button" }, "End revocation");
  const form = el("form", { autocomplete: "off" }, field("User", user), el("div", { class: "buttons" }, go, revoke, grant), answer);

  async function check() {
    const found = await get("rights", { channel: name, user: user.value });
    answer.replaceChildren(
      el("p", {}, el("strong", {}, visible(found.user)), ": ", found.answer),
      facts([
        ["Rights hash", found.hash === null ? "no value" : mono(found.hash)],
        ["Before the revocation", found.before_revocation === null ? null : mono(found.before_revocation)],
        ["Sources", found.sources.join(", ") || "none"],
      ]),
    );
  }
  const change = (button, path, done) =>
    button.addEventListener("click", () => {
      if (!form.reportValidity()) return;
      attempt(button, async () => {
        const { id } = await post(path, { channel: name, user: user.value });
        message(`${done} ${user.value} at ${id}.`);
        await check();
      });
    });
  change(revoke, "revoke", "Revoked the right of");
  change(grant, "grant", "Ended the revocation of");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(go, check);
  });
  return panel("Rights of a user", form);
}

function presence(name) {
  const go = el("button", { type: "button" }, "Show present clients");
  const list = el("div", { role: "status" });
  go.addEventListener("click", () =>
    attempt(go, async () => {
      const found = await get("presence", { channel: name });
      const rows = table("Present clients", ["Client", "Description"]);
      rows.body.append(
        ...found.clients.map((each) => rows.row([mono(each.client), el("pre", {}, each.info)])),
      );
      list.replaceChildren(
        el("p", { class: "quiet" }, `${plural(found.count, "client")} present.`),
        found.count ? rows.element : "",
      );
    }),
  );
  return panel(
    "Presence",
    el("p", { class: "hint" }, "Protocols with presence report their clients here."),
    el("div", { class: "buttons" }, go),
    list,
  );
}

function removal(name) {
  const keep = el("input", { id: "keep", type: "number", min: "0", step: "1", required: true, inputmode: "numeric" });
  const trim = el("button", { class: "danger" }, "Trim");
  const form = el("form", { class: "row" }, field("Newest entries to keep", keep, null, false), trim);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const kept = Number(keep.value);
    const agreed = await confirmed({
      title: "Trim the stream?",
      text: `All entries except the newest ${number(kept)} will be removed. Clients that have not received them are notified of a gap.`,
      action: "Trim",
    });
    if (!agreed) return;
    await attempt(trim, async () => {
      const { removed } = await post("trim", { channel: name, max_entries: kept });
      message(`Entries removed: ${number(removed)}.`);
    });
  });
  const remove = el("button", { type: "button", class: "danger" }, "Delete the stream");
  remove.addEventListener("click", async () => {
    const agreed = await confirmed({
      title: "Delete the stream?",
      text: "All entries of this channel will be removed. Rights are kept.",
      action: "Delete",
      typed: name,
    });
    if (!agreed) return;
    await attempt(remove, async () => {
      await post("delete", { channel: name, confirm: name });
      message(`Deleted the stream of ${name}.`);
    });
  });
  return panel("Remove entries", form, el("div", { class: "buttons" }, remove));
}
