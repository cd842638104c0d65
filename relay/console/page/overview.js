// Overview: hosts, workers, Redis, and events and deliveries per second.
import { get } from "./api.js";
import { chart } from "./chart.js";
import { attempt, bytes, duration, el, every, facts, mono, number, panel, plural, rate, table, visible } from "./dom.js";

// Two heartbeats of a worker, for rates: instance -> {at, events, deliveries, cpu, rates}.
const before = new Map();

// Heartbeats are written every 5 s, so a rate is that of the last two heartbeats.
function ratesOf(worker) {
  const known = before.get(worker.instance);
  if (known && known.at === worker.written_ms) return known.rates;
  const rates = { events: null, deliveries: null, cpu: null };
  if (known && worker.written_ms > known.at) {
    const seconds = (worker.written_ms - known.at) / 1000;
    rates.events = (worker.events - known.events) / seconds;
    rates.deliveries = (worker.deliveries - known.deliveries) / seconds;
    rates.cpu = (100 * (worker.cpu_s - known.cpu)) / seconds;
  }
  const { written_ms: at, events, deliveries, cpu_s: cpu } = worker;
  before.set(worker.instance, { at, events, deliveries, cpu, rates });
  return rates;
}

function sum(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((total, value) => total + value, 0) : null;
}

function tile(label, ...children) {
  const value = el("p", { class: "value" }, "–");
  return { element: el("div", { class: "tile" }, el("h2", {}, label), value, children), value };
}

export function overview(root, _parameters, signal) {
  const perSecond = (value) => `${rate(value)} per second`;
  const charts = {
    events: chart("Events per second", perSecond),
    deliveries: chart("Deliveries per second", perSecond),
  };
  const tiles = {
    connections: tile("Connections"),
    events: tile("Events per second", charts.events.element),
    deliveries: tile("Deliveries per second", charts.deliveries.element),
    lag: tile("Largest delay"),
    letters: tile("Dead letters"),
  };
  const problems = el("div", { class: "problems" });
  const workers = table(
    "Workers",
    ["Worker", "Version", "Up", "State",
      ...["Connections", "Channels", "Delay", "CPU", "Memory"].map((text) => ({ text, number: true }))],
    { id: "workers" },
  );
  const summary = el("p", { class: "quiet" });
  const servers = el("div", { id: "servers" });
  const findings = el("div", { id: "findings" });
  const examine = el("button", { type: "button" }, "Examine again");
  root.append(
    problems,
    el("div", { class: "tiles" }, Object.values(tiles).map((each) => each.element)),
    panel("Workers", summary, workers.element),
    panel("Redis", servers),
    panel("Findings of the doctor", findings, el("div", { class: "buttons" }, examine)),
  );

  async function diagnose(fresh) {
    findings.replaceChildren(el("p", { class: "quiet", role: "status" }, "Examining …"));
    const { findings: found } = await get("doctor", { fresh }, signal);
    findings.replaceChildren(...(found.length ? found.map(finding) : [el("p", { role: "status" }, "No faults found.")]));
  }
  examine.addEventListener("click", () => attempt(examine, () => diagnose(1)));
  attempt(examine, () => diagnose(null));

  function show(state) {
    const alive = state.workers.filter((worker) => worker.alive);
    const rates = alive.map(ratesOf);
    const totals = {
      events: sum(rates.map((each) => each.events)),
      deliveries: sum(rates.map((each) => each.deliveries)),
    };
    tiles.connections.value.textContent = number(sum(alive.map((each) => each.connections)) ?? 0);
    for (const name of ["events", "deliveries"]) {
      tiles[name].value.textContent = rate(totals[name]);
      if (totals[name] !== null) charts[name].add(totals[name]);
    }
    tiles.lag.value.textContent = duration(Math.max(0, ...alive.map((each) => each.lag_ms ?? 0)));
    tiles.letters.value.replaceChildren(
      state.dead_letters === undefined
        ? "–"
        : el("a", { href: "#/dead-letters" }, number(state.dead_letters)),
    );
    const hosts = new Set(alive.map((each) => each.host)).size;
    summary.textContent = `${plural(alive.length, "worker")} on ${plural(hosts, "host")}`;
    workers.body.replaceChildren(
      ...state.workers.map((worker) => workers.row(workerCells(worker))),
    );
    servers.replaceChildren(...state.servers.map(serverFacts));
    showProblems(state, alive);
  }

  function showProblems(state, alive) {
    const lines = [];
    if (state.redis_error) lines.push(`Redis: ${state.redis_error}`);
    for (const server of state.servers) {
      if (server.error) lines.push(`Redis at ${server.address} does not answer. Its channels are neither delivered nor accepted.`);
    }
    for (const worker of alive) {
      if (worker.ready === false) lines.push(`${worker.instance} does not read streams.`);
      if (worker.refused) lines.push(`${worker.instance}: ${worker.refused}`);
    }
    problems.replaceChildren(
      ...lines.map((text) => el("p", { class: "notice", "data-kind": "error" }, visible(text))),
    );
  }

  return every(2500, signal, async () => {
    try {
      show(await get("overview", {}, signal));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      problems.replaceChildren(el("p", { class: "notice", "data-kind": "error" }, error.message));
    }
  });
}

function finding({ level, name, what, why, fix }) {
  return el(
    "div",
    { class: "finding" },
    el("p", {}, el("span", { class: "level", "data-level": level }, level), el("strong", {}, visible(what))),
    el("p", { class: "quiet" }, `${visible(why)} (${visible(name)})`),
    fix ? el("pre", {}, fix) : null,
  );
}

function workerCells(worker) {
  if (!worker.alive) {
    return [mono(worker.instance), "–", "–", "no heartbeat", "–", "–", "–", "–", "–"];
  }
  const { cpu } = ratesOf(worker);
  const by = Object.entries(worker.connections_by_protocol ?? {});
  const shares = by.map(([protocol, count]) => `${protocol} ${number(count)}`).join(", ");
  return [
    [mono(worker.instance), el("span", { class: "sub" }, visible(`${worker.host}, pid ${worker.pid}`))],
    worker.version,
    duration(worker.up_s === null ? null : worker.up_s * 1000),
    worker.ready === false ? el("span", { class: "bad" }, "not ready") : "ready",
    [number(worker.connections), shares ? el("span", { class: "sub" }, shares) : null],
    number(worker.streams),
    duration(worker.lag_ms),
    cpu === null ? "–" : `${Math.round(cpu)} %`,
    bytes(worker.memory_bytes),
  ];
}

function serverFacts(server) {
  if (server.error) {
    return facts([["Address", mono(server.address)], ["State", el("span", { class: "bad" }, visible(server.error))]]);
  }
  const limit = server.memory_limit_bytes;
  return facts([
    ["Address", mono(server.address)],
    ["Product", `${server.product} ${server.version}`],
    ["Role", server.role === "master" ? `primary, ${number(server.replicas)} replicas` : server.role],
    ["Up", duration(server.up_s * 1000)],
    ["Memory", limit ? `${bytes(server.memory_bytes)} of ${bytes(limit)}` : bytes(server.memory_bytes)],
    ["Eviction", server.eviction],
    ["Evicted keys", number(server.evicted_keys)],
    ["AOF", server.aof ? `on, last write ${server.aof_last_write}` : "off"],
    ["Clients", number(server.clients)],
    ["Commands", `${number(server.commands_per_s)} per second`],
  ]);
}
