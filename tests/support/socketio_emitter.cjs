// Emits by the packages of npm, as a service would write them: node socketio_emitter.cjs 3|5 HOST PORT
// Reads one line of JavaScript at a time, run with `io` (the emitter of /axr), and says when it is out.
"use strict";

const [, , generation, host, port] = process.argv;
// From the start: lines that come while nobody iterates are lost.
const lines = require("node:readline")
  .createInterface({ input: process.stdin })
  [Symbol.asyncIterator]();

async function main() {
  let io, barrier;
  if (generation === "3") {
    const redis = require("socket.io-emitter/node_modules/redis");
    const client = redis.createClient({ host, port: Number(port), return_buffers: true });
    io = require("socket.io-emitter")(client).of("/axr");
    barrier = () => new Promise((resolve) => client.ping(resolve));
  } else {
    const { createClient } = require("redis");
    const { Emitter } = require("@socket.io/redis-emitter");
    const client = createClient({ url: `redis://${host}:${port}` });
    await client.connect();
    io = new Emitter(client).of("/axr");
    barrier = () => client.ping();
  }
  for await (const line of lines) {
    new Function("io", line)(io);
    await barrier();
    process.stdout.write("done\n");
  }
  process.exit(0);
}

main();
