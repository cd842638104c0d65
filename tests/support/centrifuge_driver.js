// Runs centrifuge-js clients as a test tells it: one JSON order a line on stdin, one JSON event a
// line on stdout. The driver is the application too: it signs with the secret that it is given.
'use strict';
const crypto = require('crypto');
const readline = require('readline');

global.WebSocket = require('ws');

const clients = {};
let secret = '';

function sign(...parts) {
  return crypto.createHmac('sha256', secret).update(parts.join('')).digest('hex');
}

function say(id, on, what) {
  process.stdout.write(JSON.stringify({ id, on, ...what }) + '\n');
}

function credentials(order) {
  const timestamp = String(Math.floor(Date.now() / 1000) + (order.older || 0));
  const info = order.info || '';
  return { user: order.user, timestamp, info, token: sign(order.user, timestamp, info) };
}

const orders = {
  new(order) {
    const Centrifuge = require(order.package || 'centrifuge');
    const options = Object.assign(
      {
        url: order.url,
        retry: 50,
        maxRetry: 500,
        onPrivateChannelAuth({ data }, done) {
          const answer = {};
          for (const channel of data.channels) {
            const info = order.channelInfo || '';
            answer[channel] = order.refuseAuth
              ? { status: 403 }
              : { sign: sign(data.client, channel, info), info };
          }
          say(order.id, 'auth', { channels: data.channels });
          setTimeout(() => done(false, answer), 1);
        },
        onRefresh(_, done) {
          say(order.id, 'refresh', {});
          done(false, credentials(Object.assign({}, order, { older: 0 })));
        },
      },
      order.insecure ? { insecure: true } : credentials(order),
      order.options
    );
    if (order.transports) {
      options.sockJS = require('sockjs-client');
      options.transports = order.transports;
    }
    const client = new Centrifuge(options);
    client.subscriptions = {};
    client.on('connect', (context) => say(order.id, 'connect', context));
    client.on('disconnect', (context) => say(order.id, 'disconnect', context));
    client.on('error', (error) => say(order.id, 'failure', { error }));
    clients[order.id] = client;
  },
  connect: (order) => clients[order.id].connect(),
  disconnect: (order) => clients[order.id].disconnect(),
  subscribe(order) {
    const client = clients[order.id];
    const events = {};
    for (const name of ['message', 'join', 'leave', 'subscribe', 'error', 'unsubscribe']) {
      events[name] = (context) => say(order.id, name, { channel: order.channel, ...context });
    }
    if (order.only) {
      // Thousands of messages: only what the test looks at.
      events.message = (m) => say(order.id, 'message', { channel: order.channel, data: m.data });
    }
    client.subscriptions[order.channel] = client.subscribe(order.channel, events);
  },
  unsubscribe: (order) => clients[order.id].subscriptions[order.channel].unsubscribe(),
  resubscribe: (order) => clients[order.id].subscriptions[order.channel].subscribe(),
  publish: (order) => call(order, (each) => each.publish(order.data)),
  presence: (order) => call(order, (each) => each.presence()),
  history: (order) => call(order, (each) => each.history()),
  startBatching: (order) => clients[order.id].startBatching(),
  stopBatching: (order) => clients[order.id].stopBatching(true),
  startAuthBatching: (order) => clients[order.id].startAuthBatching(),
  stopAuthBatching: (order) => clients[order.id].stopAuthBatching(),
  ping: (order) => clients[order.id].ping(),
};

function call(order, ask) {
  const name = order.do;
  ask(clients[order.id].subscriptions[order.channel]).then(
    (answer) => say(order.id, name, { answer, data: order.data }),
    (error) => say(order.id, name, { failed: error })
  );
}

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const order = JSON.parse(line);
  if (order.do === 'secret') {
    secret = order.secret;
    return;
  }
  orders[order.do](order);
});
process.stdin.on('end', () => process.exit(0));
