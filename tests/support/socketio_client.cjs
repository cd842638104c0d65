// Socket.IO clients of npm, driven line by line: commands come in, what happens goes out, as JSON.
//
//   {"open": NAME, "package": "socket.io-client-2", "url": ..., "options": {...}}
//   {"do": NAME, "what": "emit" | "ask" | "cut" | "close" | "connect", "args": [...]}
"use strict";

const lines = require("node:readline").createInterface({ input: process.stdin });
const sockets = new Map();

function plain(value) {
  if (Buffer.isBuffer(value)) return { hex: value.toString("hex") };
  if (value instanceof ArrayBuffer) return { hex: Buffer.from(value).toString("hex") };
  if (ArrayBuffer.isView(value)) return { hex: Buffer.from(value.buffer).toString("hex") };
  if (value === undefined) return { undefined: true };
  if (Array.isArray(value)) return value.map(plain);
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plain(each)]));
  }
  return value;
}

function say(name, what, more) {
  process.stdout.write(JSON.stringify({ name, what, ...more }) + "\n");
}

function open({ open: name, package: from, url, options }) {
  const { io } = require(from);
  const socket = (io || require(from))(url, { forceNew: true, ...options });
  sockets.set(name, socket);
  const manager = socket.io;
  const told = (what) => (...args) => say(name, what, { args: plain(args) });
  socket.on("connect", () => {
    const transport = manager.engine.transport.name;
    say(name, "connect", { id: socket.id, recovered: socket.recovered, transport });
    manager.engine.once("upgrade", (to) => say(name, "upgrade", { transport: to.name }));
  });
  socket.on("connect_error", (error) =>
    say(name, "connect_error", { message: error.message, data: plain(error.data) }));
  socket.on("error", told("error"));
  socket.on("disconnect", (reason) =>
    say(name, "disconnect", { reason, active: socket.active, again: !manager.skipReconnect }));
  // Every event, whatever its name, in every version: what the packet said.
  const onevent = socket.onevent;
  socket.onevent = function (packet) {
    const what = packet.data[0] === "relay:offset" ? "offset" : "event";
    say(name, what, { args: plain(packet.data) });
    onevent.call(this, packet);
  };
}

lines.on("line", (line) => {
  const command = JSON.parse(line);
  if (command.open) return open(command);
  const socket = sockets.get(command.do);
  const args = command.args || [];
  switch (command.what) {
    case "emit":
      socket.emit(...args);
      break;
    case "ask":
      socket.emit(...args, (...answer) => say(command.do, "answer", { args: plain(answer) }));
      break;
    case "cut": {
      // As a lost network: the engine learns of it by its transport, and says no goodbye.
      const transport = socket.io.engine.transport;
      const raw = transport.ws;
      if (raw && raw.terminate) raw.terminate();
      else transport.onError("cut");
      break;
    }
    case "close":
      socket.close();
      break;
    case "connect":
      socket.connect();
      break;
  }
});
lines.on("close", () => process.exit(0));
