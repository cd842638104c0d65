// The operator console: login and navigation. Each view is a module of its own.
import { get, post, setToken } from "./api.js";
import { channel } from "./channel.js";
import { channels } from "./channels.js";
import { client, clients } from "./clients.js";
import { deadLetters } from "./dead_letters.js";
import { at, attempt, el, field, visible } from "./dom.js";
import { explain } from "./explain.js";
import { overview } from "./overview.js";
import { tap } from "./tap.js";

// By the first part of the fragment. Views without a title are not in the navigation.
const VIEWS = {
  overview: { title: "Overview", show: overview },
  channels: { title: "Channels", show: channels },
  channel: { show: channel, of: "channels" },
  clients: { title: "Clients", show: clients },
  client: { show: client, of: "clients" },
  tap: { title: "Live tap", show: tap },
  explain: { title: "Explain", show: explain },
  "dead-letters": { title: "Dead letters", show: deadLetters },
};

let current = null; // ends the requests and timers of the present view
let loggedIn = false;

function leave() {
  current?.abort();
  current = new AbortController();
  at("view").replaceChildren();
  for (const dialog of document.querySelectorAll("dialog")) dialog.remove();
}

function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  let object = "";
  try {
    object = decodeURIComponent(rest.join("/"));
  } catch {
    // A mistyped address: show the view without an object.
  }
  return VIEWS[name] && (VIEWS[name].title || object)
    ? { name, object, query: new URLSearchParams(query) }
    : { name: "overview", object: "", query: new URLSearchParams() };
}

function show() {
  if (!loggedIn) return;
  if (location.hash === "#view") return;
  leave();
  const { name, object, query } = route();
  const view = VIEWS[name];
  const title = view.title ?? object;
  document.title = `${visible(title)} – relay console`;
  at("nav").replaceChildren(
    ...Object.entries(VIEWS)
      .filter(([, each]) => each.title)
      .map(([key, each]) =>
        el("a", { href: `#/${key}`, "aria-current": key === (view.of ?? name) ? "page" : null }, each.title),
      ),
  );
  view.show(at("view"), query, current.signal, object);
}

function showLogin() {
  loggedIn = false;
  setToken("");
  leave();
  document.title = "Log in – relay console";
  at("nav").hidden = at("logout").hidden = true;
  const password = el("input", { id: "password", type: "password", autocomplete: "current-password", required: true });
  const go = el("button", { class: "primary" }, "Log in");
  const problem = el("p", { class: "bad", role: "alert" });
  const form = el(
    "form",
    { class: "panel login" },
    el("h2", {}, "Log in"),
    // Password managers need a user name.
    el("input", { class: "unseen", type: "text", autocomplete: "username", value: "operator", tabindex: "-1", "aria-hidden": "true" }),
    field("Password", password, "The password of [console] in relay's configuration."),
    problem,
    el("div", { class: "buttons" }, go),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    problem.textContent = "";
    try {
      enter(await post("login", { password: password.value }));
    } catch (error) {
      problem.textContent = error.message.replace(/^./, (first) => first.toUpperCase());
      password.select();
    } finally {
      go.disabled = false;
    }
  });
  at("view").append(form);
  password.focus();
}

function enter({ csrf }) {
  loggedIn = true;
  setToken(csrf);
  at("nav").hidden = at("logout").hidden = false;
  show();
}

at("logout").addEventListener("click", () =>
  attempt(at("logout"), async () => {
    await post("logout");
    showLogin();
  }),
);
at("skip").addEventListener("click", (event) => {
  event.preventDefault();
  at("view").focus();
});
addEventListener("console:login", () => {
  if (loggedIn) showLogin();
});
addEventListener("hashchange", () => {
  show();
  at("view").focus({ preventScroll: true });
  scrollTo(0, 0);
});
try {
  enter(await get("session"));
} catch (error) {
  showLogin();
  if (error.status !== 401) at("view").prepend(el("p", { class: "notice", "data-kind": "error" }, error.message));
}
