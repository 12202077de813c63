// A device on Node: node node_client.js PORT IDENTITY KEY_HEX OPTIONS_JSON
//
// OPTIONS are those of tls.connect, and `connections` (how many at once, one by default), `saveSession` and
// `loadSession` (files). Lines of stdin are sent, its end is passed on; one line is printed for whatever happens.
'use strict';
const fs = require('fs');
const tls = require('tls');

const [port, identity, key, json] = process.argv.slice(2);
const { connections = 1, saveSession, loadSession, ...options } = JSON.parse(json);
const psk = Buffer.from(key, 'hex');
const sockets = [];

function connect() {
  const socket = tls.connect({
    host: '127.0.0.1',
    port,
    checkServerIdentity: () => undefined,
    pskCallback: (hint) => {
      console.log(`hint ${hint}`);
      return { psk, identity };
    },
    session: loadSession === undefined ? undefined : fs.readFileSync(loadSession),
    ...options,
  });
  socket.on('secureConnect', () => {
    const alpn = socket.alpnProtocol || 'none';
    console.log(`secure ${socket.getProtocol()} ${socket.getCipher().name} alpn ${alpn} reused ${socket.isSessionReused()}`);
    const session = socket.getSession();
    if (saveSession !== undefined && session !== undefined) fs.writeFileSync(saveSession, session);
  });
  socket.on('session', (session) => {
    if (saveSession !== undefined) fs.writeFileSync(saveSession, session);
    console.log('session');
  });
  socket.on('data', (data) => data.toString().trimEnd().split('\n').forEach((line) => console.log(`data ${line}`)));
  socket.on('end', () => console.log('end'));
  socket.on('error', (error) => console.log(`error ${error.code}`));
  socket.on('close', (failed) => {
    console.log(`close ${failed ? 'failed' : 'clean'}`);
    process.stdin.destroy();
  });
  sockets.push(socket);
}

for (let number = 0; number < connections; number++) connect();
process.stdin.on('data', (data) => sockets.forEach((socket) => socket.write(data)));
process.stdin.on('end', () => sockets.forEach((socket) => socket.end()));
