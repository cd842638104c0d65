// The reference servers with the handlers that cases.py expects. By hand:
//
//   NODE_PATH=tests/npm/node_modules node tests/wire/socketio/reference.cjs PORT PACKAGE
//
// PACKAGE: socket.io (with Engine.IO 4), or an engine.io of another generation.
"use strict";

const [port, name] = process.argv.slice(2);
const timing = { pingInterval: 500, pingTimeout: 1500, maxHttpBufferSize: 1e6 };
const http = require("node:http").createServer();

function echo(engine) {
  engine.on("connection", (socket) => socket.on("message", (data) => socket.send(data)));
}

if (name === "socket.io") {
  const { Server } = require("socket.io");
  const io = new Server(http, { ...timing, connectTimeout: 2000 });
  const connected = (socket) => {
    socket.emit("auth", socket.handshake.auth);
    socket.on("message", (...args) => socket.emit("message-back", ...args));
    socket.on("message-with-ack", (...args) => args.pop()(...args));
  };
  io.on("connection", connected);
  io.of("/custom").on("connection", connected);
  echo(require("engine.io").attach(http, timing));
} else {
  echo(require(name).attach(http, timing));
}
http.listen(Number(port), "127.0.0.1");
