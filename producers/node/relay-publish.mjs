#!/usr/bin/env node
// Publishes one event to a relay's Redis. One file, Node 16 or newer, nothing but what Node has.
//
//     import { publish } from "./relay-publish.mjs";
//     const id = await publish("news", { hello: 1 }, { type: "note", uid: "order-7" });
//
//     relay-publish.mjs CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C]
//
// publish() resolves to the entry's ID or rejects with a PublishError, within `limitMs`.

import { readFileSync, realpathSync } from "node:fs";
import net from "node:net";
import { fileURLToPath } from "node:url";

export class PublishError extends Error {
  // `unknown`: sent, but not answered; it may have been appended. With a uid, publish it again.
  constructor(text, unknown = false) {
    super(text);
    this.unknown = unknown;
  }
}

// Appends once for a uid, and tells the first entry's ID.
const APPEND_ONCE = `\
local known = redis.call('GET', KEYS[2])
if known then return known end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id
`;

// `data`: a string as it is, anything else as JSON. `options`: type, uid, to (a string, or an array
// of names), client; redis (URL), password, prefix, limitMs, windowS (how long a uid is
// remembered), maxlen.
export async function publish(channel, data, options = {}) {
  const {
    redis = process.env.RELAY_REDIS_URL || "redis://127.0.0.1:6379/0",
    password = process.env.RELAY_REDIS_PASSWORD || "",
    prefix = process.env.RELAY_REDIS_PREFIX || "relay:",
    limitMs = 200,
    windowS = 86400,
    maxlen = 0,
  } = options;
  const text = typeof data === "string" ? data : JSON.stringify(data);
  if (text === undefined) throw new PublishError("data cannot be JSON");
  const fields = ["data", text];
  for (const name of ["type", "uid", "to", "client"]) {
    const value = options[name];
    if (value === undefined || value === null) continue;
    fields.push(name, Array.isArray(value) ? JSON.stringify(value) : String(value));
  }
  check(channel, options, fields);
  const stream = `${prefix}stream:{${channel}}`;
  const words = [...(maxlen ? ["MAXLEN", "~", maxlen] : []), "*", ...fields];
  const uid = options.uid ?? null;
  const mark = `${prefix}uid:{${channel}}:${uid}`;
  const command =
    uid === null
      ? ["XADD", stream, ...words]
      : ["EVAL", APPEND_ONCE, 2, stream, mark, windowS * 1000, ...words];
  return ask(new URL(redis), password, command, limitMs);
}

// Refuse what the relay would have to put to the dead letters.
function check(channel, { type, uid, to }, fields) {
  if (!/^[^\x00-\x20\x7f{}]{1,255}$/u.test(channel))
    throw new PublishError("a channel is 1 to 255 characters without white space, '{' or '}'");
  if (type !== undefined && /^relay:|[\x00-\x1f\x7f]/.test(type))
    throw new PublishError("type is reserved or has a control character");
  if (Array.isArray(to) ? !to.length : to !== undefined && !/[^,\s]/.test(to))
    throw new PublishError("to names nobody");
  if (uid !== undefined && !(uid !== "" && Buffer.byteLength(String(uid)) <= 255))
    throw new PublishError("a uid is 1 to 255 bytes long");
}

// Connect, log in and send `command`, all in one write; its reply.
function ask(url, password, command, limitMs) {
  if (url.protocol !== "redis:" || !url.hostname)
    throw new PublishError("the address of Redis is redis://[user:password@]host:port/db");
  const where = `${url.hostname}:${url.port || 6379}`;
  const secret = decodeURIComponent(url.password) || password;
  const db = Number(url.pathname.slice(1) || 0);
  const commands = [command];
  if (db) commands.unshift(["SELECT", db]);
  if (secret) commands.unshift(["AUTH", decodeURIComponent(url.username) || "default", secret]);

  return new Promise((resolve, reject) => {
    const host = url.hostname.replace(/^\[|\]$/g, "");
    const socket = net.connect({ host, port: Number(url.port || 6379) });
    let sent = false;
    let buffer = Buffer.alloc(0);
    let answered = 0;
    const end = (settle, value) => {
      clearTimeout(timer);
      socket.destroy();
      settle(value);
    };
    const fail = (text) => end(reject, new PublishError(`Redis at ${where} ${text}`, sent));
    const timer = setTimeout(() => fail("did not answer within the time limit"), limitMs);
    socket.on("error", (error) => fail(`cannot be reached: ${error.message || error.code}`));
    socket.on("close", () => fail("closed the connection"));
    socket.on("connect", () => {
      sent = true;
      socket.write(Buffer.concat(commands.map(pack)));
    });
    socket.on("data", (more) => {
      buffer = Buffer.concat([buffer, more]);
      for (let found; (found = reply(buffer)); ) {
        buffer = buffer.subarray(found.length);
        if (found.kind === "-") {
          const text = `${commands[answered][0]}: ${found.text}`;
          return end(reject, new PublishError(text));
        }
        answered += 1;
        if (answered === commands.length) return end(resolve, found.text);
      }
    });
  });
}

function pack(words) {
  const parts = words.map((word) => Buffer.from(String(word)));
  return Buffer.concat([
    Buffer.from(`*${parts.length}\r\n`),
    ...parts.flatMap((part) => [Buffer.from(`$${part.length}\r\n`), part, Buffer.from("\r\n")]),
  ]);
}

// The first reply in `buffer`, or undefined while it is not whole.
function reply(buffer) {
  const line = buffer.indexOf("\r\n");
  if (line < 0) return undefined;
  const kind = String.fromCharCode(buffer[0]);
  const text = buffer.toString("utf8", 1, line);
  if (kind !== "$") return { kind, text, length: line + 2 };
  const end = line + 2 + Number(text);
  if (buffer.length < end + 2) return undefined;
  return { kind, text: buffer.toString("utf8", line + 2, end), length: end + 2 };
}

const USAGE = `\
usage: relay-publish.mjs CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C]
         [--limit-ms 200] [--maxlen N]
DATA - is standard input. Redis: RELAY_REDIS_URL, RELAY_REDIS_PASSWORD, RELAY_REDIS_PREFIX.
Prints the entry's ID. Exit codes: 0 published, 1 failed (one line says why), 2 usage.
`;

async function main(words) {
  const plain = [];
  const options = {};
  while (words.length) {
    const word = words.shift();
    const name = /^--(type|uid|to|client|limit-ms|maxlen)$/.exec(word)?.[1];
    if (!name || !words.length) {
      plain.push(word);
    } else if (name === "limit-ms" || name === "maxlen") {
      const value = words.shift();
      if (!/^\d{1,9}$/.test(value)) return usage();
      options[name === "maxlen" ? name : "limitMs"] = Number(value);
    } else {
      options[name] = words.shift();
    }
  }
  if (plain.length !== 2) return usage();
  const [channel, data] = plain;
  try {
    const text = data === "-" ? readFileSync(0, "utf8") : data;
    process.stdout.write(`${await publish(channel, text, options)}\n`);
    return 0;
  } catch (error) {
    const unknown = error.unknown ? "; the event may have been appended" : "";
    process.stderr.write(`relay-publish: ${error.message}${unknown}\n`);
    return 1;
  }
}

function usage() {
  process.stderr.write(USAGE);
  return 2;
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  process.exitCode = await main(process.argv.slice(2));
}
