#!/usr/bin/env node
// Publish one event to relay's Redis. One file for Node 16 or newer, without dependencies.
//
//     import { publish } from "./relay-publish.mjs";
//     const id = await publish("news", { hello: 1 }, { type: "note", uid: "order-7" });
//
//     relay-publish.mjs CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C] [--spool FILE]
//
// publish() resolves to the entry's ID or rejects with a PublishError within `limitMs`.
//
// With `spool`, a local file, an event that cannot be sent now is appended to that file, and
// publish() resolves to null. Later events are appended as well, until `python -m producers spool
// FILE` has delivered the earlier ones. This needs the program `flock` (util-linux, busybox),
// because Node has no file locks.

import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { constants, readFileSync, realpathSync } from "node:fs";
import { open, stat } from "node:fs/promises";
import net from "node:net";
import { fileURLToPath } from "node:url";

export class PublishError extends Error {
  // `unknown`: sent without a reply, so the event may have been appended. Retry it with a uid.
  // `away`: Redis is unreachable at the moment. The event can be sent later.
  constructor(text, unknown = false, away = false) {
    super(text);
    this.unknown = unknown;
    this.away = away;
  }
}

const SPOOL_BYTES = 64 * 1024 * 1024;
const BEHIND = "the spool contains earlier events";
// First words of temporary errors, as in relay/stream.
const TEMPORARY =
  /^(BUSY|MISCONF|OOM|TRYAGAIN|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|UNBLOCKED|NOREPLICAS)\b/;

// Appends once per uid, and returns the ID of the first entry.
const APPEND_ONCE = `\
local known = redis.call('GET', KEYS[2])
if known then
  if KEYS[3] then redis.call('SET', KEYS[3], '', 'PX', 1000) end
  return known
end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id
`;

// `data`: a string or a Uint8Array is sent unchanged, other values as JSON. `options`: type, uid, to (a string, or
// an array of names), client; redis (URL), password, prefix, limitMs, windowS (how long a uid is
// remembered), maxlen; spool (a file). Resolves to null if the event was spooled.
export async function publish(channel, data, options = {}) {
  const { id, reason } = await publishOrSpool(channel, data, options);
  if (id === null && reason !== BEHIND)
    process.emitWarning(`relay: writing events to the spool ${options.spool}: ${reason}`);
  return id;
}

async function publishOrSpool(channel, data, callerOptions) {
  // Set a uid before the first attempt: a spooled event must arrive once even if the attempt
  // succeeded and only its reply was lost.
  const uid = callerOptions.uid ?? (callerOptions.spool ? randomUUID() : undefined);
  const options = { ...callerOptions, uid };
  const {
    redis = process.env.RELAY_REDIS_URL || "redis://127.0.0.1:6379/0",
    password = process.env.RELAY_REDIS_PASSWORD || "",
    prefix = process.env.RELAY_REDIS_PREFIX || "relay:",
    limitMs = 200,
    windowS = 86400,
    maxlen = 0,
    spool = "",
  } = options;
  const { command, fields, address } = prepared(() => {
    const fields = ["data", encode(data)];
    for (const name of ["type", "uid", "to", "client"]) {
      const value = options[name];
      if (value === undefined || value === null) continue;
      fields.push(name, Array.isArray(value) ? JSON.stringify(value) : String(value));
    }
    check(channel, fields);
    if (!(limitMs > 0 && limitMs <= 2147483647)) throw new PublishError("limitMs must be positive");
    const tag = escape(channel);
    const stream = `${prefix}stream:{${tag}}`;
    const words = [...(Number(maxlen) ? ["MAXLEN", "~", maxlen] : []), "*", ...fields];
    const mark = `${prefix}uid:{${tag}}:${uid}`;
    const command =
      uid === undefined
        ? ["XADD", stream, ...words]
        : ["EVAL", APPEND_ONCE, 2, stream, mark, windowS * 1000, ...words];
    return { command, fields, address: parse(redis, password) };
  });
  if (!spool) return { id: await send(address, command, limitMs) };

  let failure = { message: BEHIND, unknown: false };
  if (!(await stat(spool).catch(() => undefined))?.size) {
    try {
      return { id: await send(address, command, limitMs) };
    } catch (error) {
      if (!error.away) throw error;
      failure = error;
    }
  }
  const event = { channel };
  for (let i = 0; i < fields.length; i += 2) event[fields[i]] = fields[i + 1];
  try {
    await appendToSpool(spool, `${JSON.stringify(event)}\n`, limitMs);
  } catch (error) {
    throw new PublishError(`${failure.message}; spool ${spool}: ${error.message}`, failure.unknown);
  }
  return { id: null, reason: failure.message };
}

// Append a line to the spool as producers/spool.py does, under the lock of PATH.state. Its two
// numbers: how often the spool was emptied, and how many bytes at its start were delivered.
async function appendToSpool(path, line, limitMs) {
  // Readable by the owner only, since events may contain private data.
  const lock = await open(`${path}.state`, constants.O_RDWR | constants.O_CREAT, 0o600);
  let file;
  try {
    await acquireLock(lock.fd, limitMs);
    file = await open(path, "a+", 0o600);
    const { size } = await file.stat();
    let bytes = Buffer.from(line);
    if (size + bytes.length > SPOOL_BYTES) throw new Error(`full, ${size} bytes`);
    if (size) {
      // End an incomplete line whose writer died. It is rejected when the spool is delivered.
      const { buffer } = await file.read(Buffer.alloc(1), 0, 1, size - 1);
      if (buffer[0] !== 10) bytes = Buffer.concat([Buffer.from("\n"), bytes]);
    } else {
      // After `rm` the number of delivered bytes refers to the deleted file.
      const { buffer, bytesRead } = await lock.read(Buffer.alloc(42), 0, 42, 0);
      const [emptied, done] = buffer.toString("latin1", 0, bytesRead).split(" ").map(Number);
      const fresh = `${String(emptied + 1).padStart(20, "0")} ${"0".repeat(20)}\n`;
      if (done) await lock.write(fresh, 0);
    }
    try {
      const { bytesWritten } = await file.write(bytes);
      if (bytesWritten < bytes.length) throw new Error("no space left on the disk");
    } catch (error) {
      await file.truncate(size).catch(() => undefined);
      throw error;
    }
    await lock.close(); // sync without the lock, so that several processes can wait for the disk
    await file.sync();
  } finally {
    await lock.close();
    await file?.close();
  }
}

// Lock the open file `fd`. The lock belongs to the open file, not to the process that requested it,
// so this process keeps it after `flock` has exited.
function acquireLock(fd, limitMs) {
  return new Promise((resolve, reject) => {
    const stdio = ["ignore", "ignore", "ignore", fd];
    const child = spawn("flock", ["3"], { stdio, timeout: Math.max(limitMs, 1) });
    child.on("error", (error) => reject(new Error(`flock: ${error.message}`)));
    child.on("exit", (code) => {
      if (code === 0) resolve();
      else reject(new Error(code === null ? "locked by another process" : `flock exited with ${code}`));
    });
  });
}

// Escape a channel's name for keys; see `escape` in relay/stream/format/keys.py.
function escape(channel) {
  return channel.replace(
    /[\x00-\x20{}\x7f]|%(?=[01][0-9A-F]|2[05]|7[BDF])/g,
    (found) => `%${found.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0")}`,
  );
}

// Call `make`. Turn every error, such as that of JSON.stringify for a BigInt, into a PublishError.
function prepared(make) {
  try {
    return make();
  } catch (error) {
    throw error instanceof PublishError ? error : new PublishError(error?.message ?? String(error));
  }
}

function encode(data) {
  if (typeof data === "string") return data;
  if (data instanceof Uint8Array) return decode(data, "data");
  const text = JSON.stringify(data);
  if (text === undefined) throw new PublishError("data cannot be encoded as JSON");
  return text;
}

function decode(bytes, name) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new PublishError(`${name} is not UTF-8`);
  }
}

// Reject events that relay could only move to the dead letters.
function check(channel, fields) {
  if (typeof channel !== "string" || !/^[^\ud800-\udfff]{1,255}$/su.test(channel))
    throw new PublishError("channel must have 1 to 255 characters of valid UTF-8");
  for (let i = 0; i < fields.length; i += 2) {
    const [name, value] = fields.slice(i, i + 2);
    // An unpaired surrogate would be replaced without an error.
    if (/[\ud800-\udfff]/u.test(value)) throw new PublishError(`${name} is not UTF-8`);
    if (name === "type" && /^relay:|[\x00-\x1f\x7f]/.test(value))
      throw new PublishError("type is reserved or contains a control character");
    if (name === "to") checkRecipients(value);
    if (name === "uid" && !(value !== "" && Buffer.byteLength(value) <= 255))
      throw new PublishError("uid must have 1 to 255 bytes");
  }
}

function checkRecipients(to) {
  let names = to.split(/[,\s]+/).filter(Boolean);
  if (to.trimStart().startsWith("[")) {
    try {
      names = JSON.parse(to);
    } catch {
      throw new PublishError("to is not a list of names");
    }
    if (!names.every((name) => typeof name === "string"))
      throw new PublishError("to is not a list of names");
  }
  if (!names.length || names.some((name) => /^((user|group|client):)?$/.test(name)))
    throw new PublishError("to has no recipients");
}

// The address of Redis in the form that docs/producers.md describes, the same for all producers.
function parse(redis, password) {
  const found =
    /^redis:\/\/(?:([^/?#[\]]*)@)?(\[[0-9a-f:.]+\]|[^:/?#@[\]\s]+)(?::(\d{0,5}))?(?:\/(\d{0,9}))?$/i.exec(redis);
  const [, login = "", host, port, db] = found ?? [];
  const number = Number(port || 6379);
  if (!found || number < 1 || number > 65535 || /[\x00-\x1f\x7f]/.test(redis))
    throw new PublishError("address of Redis must be redis://[user:password@]host:port/db");
  const [user, ...secret] = login.split(":");
  return {
    where: `${host}:${number}`,
    host: host.replace(/^\[|\]$/g, ""),
    port: number,
    user: unquote(user),
    secret: unquote(secret.join(":")) || password,
    db: Number(db || 0),
  };
}

// A "%" without two hexadecimal digits stands for itself.
function unquote(text) {
  const bytes = text
    .split(/(%[0-9a-f]{2})/i)
    .map((part, at) => (at % 2 ? Buffer.from(part.slice(1), "hex") : Buffer.from(part)));
  return decode(Buffer.concat(bytes), "user or password of the address of Redis");
}

// Connect, authenticate and send `command`. Resolves to the reply.
function send({ where, host, port, user, secret, db }, command, limitMs) {
  const login = [];
  if (user || secret) login.push(["AUTH", user || "default", secret]);
  if (db) login.push(["SELECT", db]);

  return new Promise((resolve, reject) => {
    const socket = net.connect({ host, port });
    let sent = false;
    let buffer = Buffer.alloc(0);
    let waiting = [];
    const end = (settle, value) => {
      clearTimeout(timer);
      socket.destroy();
      settle(value);
    };
    const fail = (text) => end(reject, new PublishError(`Redis at ${where} ${text}`, sent, true));
    const timer = setTimeout(() => fail("did not answer within the time limit"), limitMs);
    const write = (commands) => {
      waiting = commands;
      sent = commands[0] === command;
      socket.write(Buffer.concat(commands.map(pack)));
    };
    socket.on("error", (error) => fail(`cannot be reached: ${error.message || error.code}`));
    socket.on("close", () => fail("closed the connection"));
    // If the login or the database is rejected, the command must not be sent as another user or to
    // database 0, so it waits for the replies.
    socket.on("connect", () => write(login.length ? login : [command]));
    socket.on("data", (more) => {
      buffer = Buffer.concat([buffer, more]);
      for (let found; waiting.length && (found = reply(buffer)); ) {
        buffer = buffer.subarray(found.length);
        const [word] = waiting[0];
        if (found.kind === "-") {
          const away = word === "AUTH" || word === "SELECT" || TEMPORARY.test(found.text);
          return end(reject, new PublishError(`${word}: ${found.text}`, false, away));
        }
        waiting = waiting.slice(1);
        if (!waiting.length) {
          if (sent) return end(resolve, found.text);
          write([command]);
        }
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

// The first reply in `buffer`, or undefined if it is incomplete.
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
         [--limit-ms 200] [--maxlen N] [--spool FILE]
DATA - is standard input. Redis: RELAY_REDIS_URL, RELAY_REDIS_PASSWORD, RELAY_REDIS_PREFIX.
Prints the entry's ID. Exit codes: 0 published, 1 failed, 2 usage, 3 written to the spool FILE,
which \`python -m producers spool FILE\` delivers. For 1 and 3, one line on stderr has the reason.
`;

async function main(words) {
  const plain = [];
  const options = {};
  while (words.length) {
    const word = words.shift();
    const name = /^--(type|uid|to|client|limit-ms|maxlen|spool)$/.exec(word)?.[1];
    if (!name || !words.length) {
      plain.push(word);
    } else if (name === "limit-ms" || name === "maxlen") {
      const value = words.shift();
      if (!/^\d{1,9}$/.test(value) || (name === "limit-ms" && !Number(value))) return usage();
      options[name === "maxlen" ? name : "limitMs"] = Number(value);
    } else {
      options[name] = words.shift();
    }
  }
  if (plain.length !== 2) return usage();
  const [channel, data] = plain;
  try {
    checkArguments();
    const text = data === "-" ? decode(readFileSync(0), "data") : data;
    const { id, reason } = await publishOrSpool(channel, text, options);
    if (id === null) {
      process.stderr.write(`relay-publish: spooled: ${reason}\n`);
      return 3;
    }
    process.stdout.write(`${id}\n`);
    return 0;
  } catch (error) {
    const unknown = error.unknown ? "; the event may have been appended" : "";
    process.stderr.write(`relay-publish: ${error.message}${unknown}\n`);
    return 1;
  }
}

// Node replaces bytes of arguments that are not UTF-8 by U+FFFD. Only Linux shows the bytes.
function checkArguments() {
  if (!process.argv.some((word) => word.includes("\ufffd"))) return;
  let bytes = Buffer.of(0xff);
  try {
    bytes = readFileSync("/proc/self/cmdline");
  } catch {
    // Reject the arguments below.
  }
  decode(bytes, "an argument");
}

function usage() {
  process.stderr.write(USAGE);
  return 2;
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  process.exitCode = await main(process.argv.slice(2));
}
