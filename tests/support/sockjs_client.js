// Talks to the echo door with the real sockjs-client: URL, transport, "new" for a connection per
// request. Prints what came back as one line of JSON.
'use strict';
const http = require('http');
const [url, transport, connections] = process.argv.slice(2);
if (connections === 'new') http.globalAgent = new http.Agent({ keepAlive: false });
const SockJS = require('sockjs-client');

const said = [];
for (let round = 0; round < 40; round++) {
  said.push('round ' + round, 'é 😀 \u2028\u200c\ufff0 </script> "quoted"\\ ' + round);
  // Some streams reach their limit of 128 KB on the way.
  said.push('x'.repeat(8000) + round);
}
const heard = [];
const socket = new SockJS(url, null, { transports: [transport] });
let next = 0;
const say = () => {
  // Two at a time, and the next when they have come back.
  for (let each = 0; each < 2 && next < said.length; each++) socket.send(said[next++]);
};
let spoken;
socket.onopen = () => {
  spoken = socket.transport;
  say();
};
socket.onmessage = (event) => {
  heard.push(event.data);
  if (heard.length === said.length) socket.send('close please');
  else if (heard.length === next) say();
};
socket.onclose = (event) => {
  const same = heard.length === said.length && heard.every((text, at) => text === said[at]);
  console.log(JSON.stringify({
    transport: spoken, same, heard: heard.length, code: event.code, reason: event.reason,
  }));
  process.exit(0);
};
