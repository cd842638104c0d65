// Socket.IO on the redis-streams adapter, with connection state recovery: what the relay is compared
// with. node socketio_server.cjs PORT REDIS_PORT
"use strict";

const { createServer } = require("node:http");
const { Server } = require("socket.io");
const { createAdapter } = require("@socket.io/redis-streams-adapter");
const { createClient } = require("redis");

const [, , port, redisPort] = process.argv;

async function main() {
  const redis = createClient({ url: `redis://127.0.0.1:${redisPort}` });
  await redis.connect();
  const server = createServer();
  const io = new Server(server, {
    path: "/notifications/",
    adapter: createAdapter(redis),
    connectionStateRecovery: {},
    // The measuring clients answer no heartbeats.
    pingInterval: 3600000,
  });
  io.of("/axr").on("connection", (socket) => socket.join(["allusers", socket.id + "-user"]));
  server.listen(Number(port), "127.0.0.1");
}

main();
