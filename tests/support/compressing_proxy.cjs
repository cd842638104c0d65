// A proxy that compresses answers, as many Node applications do: http-proxy behind compression.
//
//   node compressing_proxy.cjs TARGET    prints its port
"use strict";

const compression = require("compression")({ threshold: 0 });
const proxy = require("http-proxy").createProxyServer({ target: process.argv[2] });
const server = require("node:http").createServer((request, response) =>
  compression(request, response, () => proxy.web(request, response, () => response.destroy())),
);
server.listen(0, "127.0.0.1", () => process.stdout.write(`${server.address().port}\n`));
