// Explain: did a user's clients receive an event, and if not, why?
import { get } from "./api.js";
import { attempt, el, field, message, mono, number, panel, table, visible } from "./dom.js";

const FIELDS = [
  ["user", "User"],
  ["channel", "Channel"],
  ["id", "Event ID"],
];

export function explain(root, parameters, signal) {
  const inputs = fieldsOf(parameters);
  const go = el("button", { class: "primary" }, "Explain");
  const form = el(
    "form",
    { class: "panel row" },
    inputs.map(([, label, input]) => field(label, input, null, false)),
    go,
  );
  const answer = el("div", { role: "status", class: "stack" });
  root.append(
    el("p", { class: "quiet" }, "Did this user receive this event? The ID is in the list of a channel's entries."),
    form,
    answer,
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const query = new URLSearchParams(inputs.map(([name, , input]) => [name, input.value.trim()]));
    const address = `#/explain?${query}`;
    if (location.hash === address) attempt(go, run);
    else location.hash = address;
  });

  async function run() {
    answer.replaceChildren(el("p", { class: "quiet" }, "Asking all workers …"));
    const wanted = Object.fromEntries(inputs.map(([name, , input]) => [name, input.value.trim()]));
    let found;
    try {
      found = await get("explain", wanted, signal);
    } catch (error) {
      answer.replaceChildren();
      if (error.name !== "AbortError") message(error.message, "error");
      return;
    }
    const clients = table("Clients of the user", ["Client", "Outcome", "Why"], { id: "outcomes" });
    clients.body.append(
      ...found.clients.map((each) =>
        clients.row([
          each.connection
            ? el("a", { href: `#/client/${encodeURIComponent(each.connection)}` }, mono(each.connection))
            : "–",
          each.outcome.replaceAll("_", " "),
          visible(each.sentence),
        ]),
      ),
    );
    const others = Object.entries(found.others).map(
      ([outcome, count]) => `${number(count)} ${outcome.replaceAll("_", " ")}`,
    );
    answer.replaceChildren(
      panel(
        "Answer",
        el("p", { class: "answer", id: "answer" }, visible(found.sentence)),
        found.clients.length ? clients.element : null,
        others.length ? el("p", { class: "quiet" }, `Other clients: ${others.join(", ")}.`) : null,
        found.unknown.length
          ? [el("h3", {}, "Not known"), el("ul", {}, found.unknown.map((each) => el("li", {}, visible(each))))]
          : null,
      ),
    );
  }
  if (inputs.every(([, , input]) => input.value)) return attempt(go, run);
  return null;
}

function fieldsOf(parameters) {
  return FIELDS.map(([name, label]) => [
    name,
    label,
    el("input", {
      id: `explain-${name}`, value: parameters.get(name) ?? "", required: true, spellcheck: "false",
      autocapitalize: "off", autocomplete: "off",
    }),
  ]);
}
