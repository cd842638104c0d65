// A Socket.IO server with the Redis Streams adapter and connection state recovery, for comparison with
// relay. Usage: node socketio_server.cjs PORT REDIS_PORT
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
    // Disable heartbeats: the benchmark clients don't reply to them.
    pingInterval: 3600000,
  });
  io.of("/axr").on("connection", (socket) => socket.join(["allusers", socket.id + "-user"]));
  server.listen(Number(port), "127.0.0.1");
}

main();
