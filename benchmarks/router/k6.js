// Driven by benchmarks/router/k6.py. CALL is `unary` or `stream`; each of CALLERS has a connection and makes CALLS, one after
// the other. Tokens are counted in what k6's own gRPC makes of the messages.
import { Client, StatusOK, Stream } from 'k6/net/grpc';
import { Counter, Trend } from 'k6/metrics';

const SERVICE = 'neo.v1.InferenceService';
const client = new Client();
client.load([__ENV.PROTOS], 'neo/v1/inference.proto');

const tokens = new Counter('tokens');
const messages = new Counter('messages');
const failed = new Counter('failed');
const firstMs = new Trend('first_ms', true);

export const options = {
  scenarios: {
    calls: {
      executor: 'per-vu-iterations',
      vus: Number(__ENV.CALLERS),
      iterations: Number(__ENV.CALLS),
      maxDuration: '10m',
      exec: __ENV.CALL,
    },
  },
};

const request = {
  tokenIds: { ids: [1, 2, 3, 4] },
  sampling: { maxTokens: Number(__ENV.TOKENS) },
};
let connected = false;

function connect() {
  if (!connected) {
    client.connect(__ENV.ADDRESS, { plaintext: true });
    connected = true;
  }
}

export function unary() {
  connect();
  const answer = client.invoke(`${SERVICE}/Generate`, request);
  if (!answer || answer.status !== StatusOK) failed.add(1);
}

export function stream() {
  connect();
  return new Promise((resolve) => {
    const began = Date.now();
    let first = true;
    const call = new Stream(client, `${SERVICE}/GenerateStream`);
    call.on('data', (message) => {
      if (first) firstMs.add(Date.now() - began);
      first = false;
      messages.add(1);
      for (const delta of message.deltas) tokens.add((delta.tokenIds || []).length);
    });
    call.on('error', () => failed.add(1));
    call.on('end', () => resolve());
    call.write(request);
    call.end();
  });
}

export function handleSummary(data) {
  return { [__ENV.SUMMARY]: JSON.stringify(data.metrics) };
}
