// Load test: writes to all three nodes at once, and looks whether what was written is there.
//
//   objects   10 clients PATCH / 50,000 times, round-robin, with small JSON objects, each of which is given a
//             resource version, and read every hundredth back from another node
//   contacts  the same clients PUT 50,000 keys, and read back likewise
//
// A scenario ends when its writes are done or its time is up. Either is a success if every answer was right and
// more than next to nothing was done; how much it was is in the summary, with what was left in dropped_iterations.
//
// Settings, all from the environment:
//   RAFTRV_URLS          the nodes, separated by commas; default: the cluster of the Procfile
//   RAFTRV_SCENARIOS     which scenarios to run; default: objects,contacts
//   RAFTRV_ITERATIONS    writes of each scenario; default 50000
//   RAFTRV_MAX_DURATION  seconds after which a scenario begins no more writes; default 30
//   RAFTRV_EMPTY         if set, the server is one that answers everything with 204 and keeps nothing:
//                        the same requests, without a look at the answers. It is what there is to gain

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';

const nodes = (__ENV.RAFTRV_URLS || 'http://127.0.0.1:12380,http://127.0.0.1:22380,http://127.0.0.1:32380').split(',');
const names = (__ENV.RAFTRV_SCENARIOS || 'objects,contacts').split(',');
const iterations = Number(__ENV.RAFTRV_ITERATIONS || 50000);
const maxDuration = Number(__ENV.RAFTRV_MAX_DURATION || 30);
const empty = Boolean(__ENV.RAFTRV_EMPTY);

const readEvery = 100;
// A node answers within its own 5 s, so who waits longer than this waits for an answer that will not come: a failure.
const requestSeconds = 10;

const scenarios = {};
// Nothing may fail, so the first failure is the end: what follows it would only hide it.
const thresholds = {
  checks: [{ threshold: 'rate==1', abortOnFail: true }],
  http_req_failed: [{ threshold: 'rate==0', abortOnFail: true }],
};

names.forEach((name, i) => {
  if (!['objects', 'contacts'].includes(name)) {
    throw new Error(`no scenario named ${name}`);
  }
  // Less than a hundredth is not slow, it is broken.
  thresholds[`iterations{scenario:${name}}`] = [`count>=${Math.ceil(iterations / 100)}`];
  scenarios[name] = {
    executor: 'shared-iterations',
    exec: name,
    iterations: iterations,
    vus: 10,
    maxDuration: `${maxDuration}s`,
    // k6 knows no "after that one", only a time: the end of the one before.
    startTime: `${i * maxDuration}s`,
    // Time for a write and a read that have begun: k6 drops what it interrupts in silence, wrong answers too.
    gracefulStop: `${2 * requestSeconds + 5}s`,
  };
});

export const options = {
  scenarios: scenarios,
  thresholds: thresholds,
  summaryTrendStats: ['avg', 'min', 'med', 'p(95)', 'p(99)', 'max'],
};

// setup makes the keys of every run new ones.
export function setup() {
  return { run: Date.now().toString(36) };
}

const node = (i) => nodes[i % nodes.length];

// Without a name of their own k6 would keep metrics for every URL.
const params = (name, headers) => ({ tags: { name: name }, timeout: `${requestSeconds}s`, headers: headers || {} });

// checkWrite looks at the answer to the i-th write, of value to path, and for some whether another node has it.
function checkWrite(i, res, statuses, path, value) {
  const right = empty || check(res, {
    'write is acknowledged': (r) => statuses.includes(r.status),
    'write has a resource version': (r) => /^[1-9][0-9]*$/.test(r.headers['Resource-Version']),
    'write has a place': () => path !== undefined,
  });
  if (!right || i % readEvery !== 0) {
    return;
  }
  const read = http.get(node(i + 1) + path, params('get'));
  if (!empty) {
    check(read, {
      'another node has the write': (r) => r.status === 200 && r.body === value,
      'at its resource version': (r) => r.headers['Etag'] === `"${res.headers['Resource-Version']}"`,
    });
  }
}

export function objects() {
  const i = exec.scenario.iterationInTest;
  const object = JSON.stringify({ node: i % nodes.length + 1, iteration: i });
  const res = http.patch(node(i) + '/', object, params('patch', { 'Content-Type': 'application/json' }));
  checkWrite(i, res, [204], res.headers['Location'], object);
}

export function contacts({ run }) {
  const i = exec.scenario.iterationInTest;
  const path = `/contacts/${run}/${i}`;
  const contact = JSON.stringify({ name: `contact ${i}`, mail: `contact-${i}@example.com` });
  checkWrite(i, http.put(node(i) + path, contact, params('put')), [201, 204], path, contact);
}
