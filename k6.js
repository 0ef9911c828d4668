// Load test: writes to all three nodes at once, and looks whether what was written is there.
//
//   contacts  10 clients PUT 50,000 keys round-robin, and read every hundredth back from another node
//   objects   the same clients PATCH / with small JSON objects, each of which is given a resource version
//
// Settings, all from the environment:
//   RAFTRV_URLS          the nodes, separated by commas; default: the cluster of the Procfile
//   RAFTRV_SCENARIOS     which scenarios to run; default: contacts,objects
//   RAFTRV_ITERATIONS    writes of contacts; default 50000. objects makes a tenth of that
//   RAFTRV_MAX_DURATION  seconds that each scenario may take; default 30. It has failed after that
//   RAFTRV_EMPTY         if set, the server is one that answers everything with 204 and keeps nothing:
//                        the same requests, without a look at the answers. It is what there is to gain

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';

const nodes = (__ENV.RAFTRV_URLS || 'http://127.0.0.1:12380,http://127.0.0.1:22380,http://127.0.0.1:32380').split(',');
const names = (__ENV.RAFTRV_SCENARIOS || 'contacts,objects').split(',');
const iterations = Number(__ENV.RAFTRV_ITERATIONS || 50000);
const maxDuration = Number(__ENV.RAFTRV_MAX_DURATION || 30);
const empty = Boolean(__ENV.RAFTRV_EMPTY);

const readEvery = 100;

const scenarios = {
  contacts: { iterations: iterations },
  objects: { iterations: Math.ceil(iterations / 10) },
};
// Nothing may fail, so the first failure is the end: what follows it would only hide it.
const thresholds = {
  checks: [{ threshold: 'rate==1', abortOnFail: true }],
  http_req_failed: [{ threshold: 'rate==0', abortOnFail: true }],
};

names.forEach((name, i) => {
  if (!scenarios[name]) {
    throw new Error(`no scenario named ${name}`);
  }
  // A scenario that runs out of time drops iterations in silence; only their count tells.
  thresholds[`iterations{scenario:${name}}`] = [`count==${scenarios[name].iterations}`];
  Object.assign(scenarios[name], {
    executor: 'shared-iterations',
    exec: name,
    vus: 10,
    maxDuration: `${maxDuration}s`,
    // k6 knows no "after that one", only a time: the end of the one before.
    startTime: `${i * maxDuration}s`,
    gracefulStop: '0s',
  });
});

export const options = {
  scenarios: Object.fromEntries(names.map((name) => [name, scenarios[name]])),
  thresholds: thresholds,
  summaryTrendStats: ['avg', 'min', 'med', 'p(95)', 'p(99)', 'max'],
};

// setup makes the keys of every run new ones.
export function setup() {
  return { run: Date.now().toString(36) };
}

const node = (i) => nodes[i % nodes.length];

// Without a name of their own k6 would keep metrics for every URL.
const tagged = (name) => ({ tags: { name: name } });

// checkWrite looks at the answer to a write.
function checkWrite(res, statuses) {
  if (empty) {
    return;
  }
  check(res, {
    'write is acknowledged': (r) => statuses.includes(r.status),
    'write has a resource version': (r) => /^[1-9][0-9]*$/.test(r.headers['Resource-Version']),
  });
}

export function contacts({ run }) {
  const i = exec.scenario.iterationInTest;
  const path = `/contacts/${run}/${i}`;
  const contact = JSON.stringify({ name: `contact ${i}`, mail: `contact-${i}@example.com` });

  checkWrite(http.put(node(i) + path, contact, tagged('put')), [201, 204]);

  if (i % readEvery === 0) {
    const res = http.get(node(i + 1) + path, tagged('get'));
    if (!empty) {
      check(res, { 'another node has the write': (r) => r.status === 200 && r.body === contact });
    }
  }
}

export function objects() {
  const i = exec.scenario.iterationInTest;
  const object = JSON.stringify({ node: i % nodes.length + 1, iteration: i });
  const params = Object.assign({ headers: { 'Content-Type': 'application/json' } }, tagged('patch'));
  checkWrite(http.patch(node(i) + '/', object, params), [204]);
}
