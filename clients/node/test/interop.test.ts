// The cases of tests/interop/cases.json against real daemons with a real model.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { equals } from "@bufbuild/protobuf";
import {
  chat,
  Client,
  type ClientOptions,
  Code,
  durationFromMs,
  durationMs,
  type GenerateInit,
  type Generation,
  HotgraphError,
  ServingStatus,
  StreamLostError,
  system,
  text,
  timestampDate,
  tlsFromFiles,
  user,
} from "hotgraph-client";
import {
  type CompleteResponse,
  DaemonState,
  ErrorReason,
  FinishReason,
  type Graph,
  GraphEventType,
  GraphKeySchema,
  GraphMode,
  GraphState,
  SamplerVariant,
} from "hotgraph-client/v1";

import { addresses, report } from "./report.js";

const found = addresses();
const skip = found ? false : "needs daemons: run test.sh under python -m tests.interop, or make test-client-node";
const told = found!; // of what is not skipped

const PATIENCE_MS = 60_000; // for what takes a second on a quiet machine
const STRANGE = "Zwölf Boxkämpfer 漢字 😀 e\u0301 tab\t newline\n return\r bell\x07 escape\x1b delete\x7f nul\0 end";
const ONCE: ClientOptions = { maxAttempts: 1 }; // so that each refusal is seen at once

const greedy = (prompt: string, maxTokens: number) =>
  ({
    prompt: text(prompt),
    maxTokens,
    sampling: { temperature: 0 },
    stop: { ignoreEos: true },
  }) satisfies GenerateInit;

const SEEDED = { ...greedy("Once upon a time", 64), sampling: { seed: 7n, temperature: 0.9 } } satisfies GenerateInit;

/** The case of this name; reported when it has passed. */
function check(name: string, act: (t: TestContext) => Promise<void>): void {
  test(name, { skip }, async (t) => {
    await act(t);
    report(`passed ${name}`);
  });
}

function dial(t: TestContext, target: string, options: ClientOptions = {}): Client {
  const client = new Client(target, options);
  t.after(() => client.close());
  return client;
}

/** What it must fail with. */
async function refusal(
  call: Promise<unknown>,
  code: Code,
  reason: ErrorReason = ErrorReason.UNSPECIFIED,
): Promise<HotgraphError> {
  try {
    await call;
  } catch (error) {
    assert.ok(error instanceof HotgraphError, `no error of ours: ${String(error)}`);
    assert.deepEqual([Code[error.code], ErrorReason[error.reason]], [Code[code], ErrorReason[reason]], error.message);
    return error;
  }
  assert.fail("nothing was refused");
}

async function waitFree(): Promise<void> {
  const end = performance.now() + PATIENCE_MS;
  for (;;) {
    const { scheduler, kvCache } = await client.admin.getStatus({});
    if (!scheduler?.numRunning && !scheduler?.numWaiting && !kvCache?.numUsedBlocks) return;
    assert.ok(performance.now() < end, "slots are still held");
    await sleep(5);
  }
}

let client: Client;

before(() => {
  if (!found) return;
  report(`language Node.js ${process.versions.node}`);
  const manifest = createRequire(import.meta.url).resolve("@grpc/grpc-js/package.json");
  report(`library grpc-js ${(JSON.parse(readFileSync(manifest, "utf8")) as { version: string }).version}`);
  client = new Client(told.unix, ONCE);
});

after(() => client?.close());

check("unary_empty", async () => {
  const answer = await client.admin.getStatus({});
  assert.equal(answer.model, told.model);
  assert.equal(answer.state, DaemonState.SERVING);
});

check("unary_large", async () => {
  const whole = "All that is gold does not glitter; é漢😀 ".repeat(Math.floor((1 << 20) / 45));
  const { pieces } = await client.inference.tokenize({ input: text(whole), addSpecialTokens: false });
  assert.ok(Buffer.concat(pieces).equals(Buffer.from(whole)));
});

check("request_too_large", async () => {
  const call = client.inference.tokenize({ input: text("x".repeat(5 << 20)) });
  const error = await refusal(call, Code.RESOURCE_EXHAUSTED, ErrorReason.MESSAGE_TOO_LARGE);
  assert.equal(error.metadata["limit_bytes"], String(4 << 20));
  assert.equal(error.kind, "request");
});

check("text", async () => {
  const { tokenIds } = await client.inference.tokenize({ input: text(STRANGE), addSpecialTokens: false });
  assert.equal((await client.inference.detokenize({ tokenIds })).text, STRANGE);
});

check("stream", async () => {
  const kinds: string[] = [];
  let joined = "";
  const generation = client.generate(greedy("The sky is", 12));
  for await (const event of generation) {
    if (kinds.at(-1) !== event.case) kinds.push(event.case);
    if (event.case === "tokens") joined += event.value.text;
  }
  assert.deepEqual(kinds, ["started", "tokens", "finished"]);
  assert.ok(joined);
  assert.equal(joined, generation.text);
  const finished = generation.finished!;
  assert.equal(finished.usage?.completionTokens, 12);
  assert.equal(finished.choices[0]?.reason, FinishReason.LENGTH);
  assert.ok(finished.receipt!.numSteps > 0);
  assert.ok(durationMs(finished.timings!.total!) > 0);
  let texts = "";
  for await (const piece of client.generate(greedy("The sky is", 12)).texts()) texts += piece;
  assert.equal(texts, joined);
  await waitFree();
});

check("stream_is_unary", async () => {
  const request: GenerateInit = {
    prompt: text("Once upon a time"),
    maxTokens: 16,
    numChoices: 2,
    sampling: { seed: 2n ** 64n - 1n, temperature: 0.8 },
    output: { logprobs: 2 },
  };
  const parts = ({ choices }: CompleteResponse): unknown =>
    choices.map((choice) => [choice.tokenIds, choice.text, choice.logprobs.length]);
  const streamed = await client.generate(request).result();
  const unary = await client.complete(request);
  assert.deepEqual(parts(streamed), parts(unary));
  assert.equal(unary.choices.length, 2);
  assert.equal(unary.seed, 2n ** 64n - 1n);
  for (const { logprobs, tokenIds } of unary.choices) assert.equal(logprobs.length, tokenIds.length);
});

check("chat", async () => {
  const prompt = chat(system("Be brief."), user("What is the capital of France?"));
  const answer = await client.generate({ prompt, sampling: { temperature: 0 }, maxTokens: 24 }).result();
  assert.match(answer.choices[0]!.text, /Paris/);
});

check("slow_reader", async () => {
  const fast = await client.generate(greedy("The sky is", 40)).result();
  const generation = client.generate(greedy("The sky is", 40));
  let numEvents = 0;
  for await (const { case: kind } of generation) {
    if (kind === "tokens" && ++numEvents === 2) {
      await client.complete(greedy("others", 4));
      await sleep(1000);
    }
  }
  assert.deepEqual(generation.choices[0]!.tokenIds, fast.choices[0]!.tokenIds);
});

check("cancel_at_once", async () => {
  const generation = client.generate(greedy("The sky is", 1000));
  assert.ok(generation.cancel());
  await refusal(generation.next(), Code.CANCELLED);
  assert.ok(!generation.cancel());
  const aborted = client.generate(greedy("The sky is", 1000), { signal: AbortSignal.abort(new Error("not wanted")) });
  const error = await refusal(aborted.result(), Code.CANCELLED);
  assert.equal((error.cause as Error).message, "not wanted");
  await waitFree();
});

check("cancel_midway", async () => {
  const left = client.generate(greedy("The sky is", 1000));
  for await (const { case: kind } of left) {
    if (kind === "tokens" && left.choices[0]!.tokenIds.length >= 3) {
      assert.equal((await client.admin.getStatus({})).scheduler?.numRunning, 1);
      break;
    }
  }
  await waitFree();

  const controller = new AbortController();
  const aborted = client.generate(greedy("The sky is", 1000), { signal: controller.signal });
  await aborted.next();
  setTimeout(() => controller.abort(), 200);
  const error = await refusal(aborted.result(), Code.CANCELLED);
  assert.equal(error.kind, "cancelled");
  assert.equal((error.cause as Error).name, "AbortError");
  await waitFree();

  const unary = new AbortController();
  const call = client.complete(greedy("The sky is", 1000), { signal: unary.signal });
  setTimeout(() => unary.abort(), 200);
  await refusal(call, Code.CANCELLED);
  await waitFree();

  // closing the client ends a reader that waits, and is no lost server
  const closing = new Client(told.unix);
  const open = closing.generate(greedy("The sky is", 1000));
  await open.next();
  setTimeout(() => closing.close(), 200);
  await refusal(open.result(), Code.CANCELLED);
  await waitFree();
});

check("deadline", async () => {
  const begin = performance.now();
  const call = client.generate(greedy("The sky is", 1000), { timeoutMs: 700 }).result();
  await assert.rejects(call, (error) => error instanceof HotgraphError && error.kind === "deadline");
  const signal = AbortSignal.timeout(700);
  const middle = performance.now();
  await refusal(client.generate(greedy("The sky is", 1000), { signal }).result(), Code.DEADLINE_EXCEEDED);
  const end = performance.now();
  assert.ok(middle - begin < 1700 && end - middle < 1700, `${middle - begin} and ${end - middle} ms`);
  await waitFree();
});

check("timeout_field", async () => {
  const call = client.generate({ ...greedy("The sky is", 1000), timeout: durationFromMs(500) }).result();
  await refusal(call, Code.DEADLINE_EXCEEDED, ErrorReason.DEADLINE_EXCEEDED);
  await waitFree();
});

check("violations", async () => {
  const call = client.complete({
    requestId: "no spaces",
    prompt: text(""),
    maxTokens: 0,
    numChoices: 17,
    sampling: {
      temperature: 3,
      topP: 0,
      minP: 2,
      repetitionPenalty: 0,
      presencePenalty: -3,
      frequencyPenalty: 3,
      logitBias: [{ tokenId: 1, bias: 101 }],
    },
    stop: { strings: [""] },
    output: { logprobs: 21 },
    timeout: durationFromMs(-1000),
  });
  const { violations } = await refusal(call, Code.INVALID_ARGUMENT, ErrorReason.INVALID_REQUEST);
  assert.deepEqual(violations.map(({ field }) => field).sort(), [
    "max_tokens", "num_choices", "output.logprobs", "request_id", "sampling.frequency_penalty",
    "sampling.logit_bias[0].bias", "sampling.min_p", "sampling.presence_penalty", "sampling.repetition_penalty",
    "sampling.temperature", "sampling.top_p", "stop.strings[0]", "text", "timeout",
  ]); // prettier-ignore
  assert.ok(violations.every(({ description }) => description));
});

check("status_message", async () => {
  const name = "naïve 😀\t\n\x7f%";
  const error = await refusal(client.inference.getModel({ name }), Code.NOT_FOUND, ErrorReason.MODEL_NOT_FOUND);
  assert.equal(error.resource?.name, name);
  assert.match(error.description, /naïve 😀/);
});

check("not_found", async () => {
  const call = client.graphCache.getGraph({ name: "graphs/none" });
  const { resource } = await refusal(call, Code.NOT_FOUND, ErrorReason.GRAPH_NOT_FOUND);
  assert.deepEqual(resource, { type: "hotgraph.v1.Graph", name: "graphs/none" });
});

check("retry_info", async () => {
  // What another test captured goes, so that there is something to wait for.
  const ready: Graph[] = [];
  for await (const graph of client.allGraphs({ states: [GraphState.READY] })) ready.push(graph);
  for (const { name } of ready) await client.graphCache.evictGraph({ name });
  const call = client
    .generate({
      ...greedy("The sky is", 4),
      numChoices: 7,
      sampling: { topK: 5, temperature: 1 },
      graphPolicy: { mode: GraphMode.REQUIRE },
    })
    .result();
  const error = await refusal(call, Code.UNAVAILABLE, ErrorReason.GRAPH_NOT_READY);
  assert.ok(error.isRetryable && error.retryAfterMs! > 0);
});

check("unimplemented", async () => {
  for (const service of ["InferenceService", "DreamService"]) {
    await refusal(client.callBytes(`/hotgraph.v1.${service}/Dream`, new Uint8Array()), Code.UNIMPLEMENTED);
  }
});

check("client_id", async (t) => {
  await dial(t, told.unix, { clientId: "interop-node" }).complete(greedy("hello", 1));
  for await (const other of client.allClients()) {
    if (other.name === "clients/interop-node") {
      assert.match(other.userAgent, /hotgraph-node\//);
      assert.ok(other.numRequests > 0n);
      return;
    }
  }
  assert.fail("ListClients does not know the caller");
});

async function prewarmed(): Promise<Graph[]> {
  const keys = [1, 2, 3].map((rows) => ({ tokens: 4, rows, sampler: SamplerVariant.GREEDY }));
  const { graphs } = await client.graphCache.prewarmGraphs({ keys, wait: durationFromMs(30_000) });
  assert.ok(graphs.length >= 2, "too few buckets for a list of pages");
  return graphs;
}

check("pages", async () => {
  await prewarmed();
  const names = new Set<string>();
  let numListed = 0;
  for await (const { name } of client.allGraphs({ pageSize: 1 })) {
    names.add(name);
    numListed++;
  }
  assert.equal(names.size, numListed);
  assert.equal(numListed, (await client.graphCache.listGraphs({})).totalSize);
  const models = [];
  for await (const { id } of client.allModels()) models.push(id);
  assert.deepEqual(models, [told.model]);
});

check("graphs", async () => {
  const [ready] = await prewarmed();
  assert.ok(ready?.key);
  assert.equal(ready.state, GraphState.READY);
  const { name } = ready;
  const { graph } = await client.graphCache.getGraph({ name });
  assert.ok(equals(GraphKeySchema, graph!.key!, ready.key));
  const pinned = await client.graphCache.pinGraph({ name });
  assert.ok(timestampDate(pinned.graph!.pin!.expireTime!).getTime() > Date.now());
  await client.graphCache.unpinGraph({ name });
  const wanted = [GraphEventType.PLANNED, GraphEventType.PUBLISHED, GraphEventType.PINNED, GraphEventType.UNPINNED];
  let last = 0n;
  for await (const event of client.watchGraphs(0n, { timeoutMs: PATIENCE_MS })) {
    assert.ok(event.sequence > last);
    last = event.sequence;
    if (event.graph?.name === name && event.type === wanted[0]) wanted.shift();
    if (wanted.length === 0) break;
  }
  assert.deepEqual(wanted, []);
});

check("health", async () => {
  assert.equal((await client.health.check({})).status, ServingStatus.SERVING);
  for await (const state of client.watchHealth("hotgraph.v1.InferenceService")) {
    assert.equal(state, ServingStatus.SERVING);
    break;
  }
  await refusal(client.health.check({ service: "none" }), Code.NOT_FOUND, ErrorReason.SERVICE_NOT_FOUND);
});

/** A unary call and a stream. */
async function works(other: Client): Promise<void> {
  const unary = await other.complete(greedy("hello", 2));
  const streamed = await other.generate(greedy("hello", 2)).result();
  assert.deepEqual(streamed.choices[0]!.tokenIds, unary.choices[0]!.tokenIds);
}

const fails = (other: Client, code: Code, reason?: ErrorReason): Promise<HotgraphError> =>
  refusal(other.complete(greedy("hello", 1), { timeoutMs: PATIENCE_MS }), code, reason);

check("tcp", async (t) => {
  await works(dial(t, told.tcp));
  await works(dial(t, `ipv4:127.0.0.1:1,${told.tcp}`)); // nobody listens at the first address
});

const tlsOf = (part: { root_certificates: string }) => tlsFromFiles({ rootCertificates: part.root_certificates });

check("tls", async (t) => {
  const { target, token } = told.tls;
  await works(dial(t, target, { tls: tlsOf(told.tls), token }));
  await works(dial(t, target.replace("localhost", "127.0.0.1"), { tls: { ...tlsOf(told.tls), serverName: "localhost" }, token }));
  await fails(dial(t, target, { ...ONCE, tls: true, token }), Code.UNAVAILABLE);
  await fails(dial(t, target, { ...ONCE, token }), Code.UNAVAILABLE);
});

check("mutual_tls", async (t) => {
  const { target, root_certificates, certificate_chain, private_key } = told.mutual_tls;
  const tls = tlsFromFiles({
    rootCertificates: root_certificates,
    certificateChain: certificate_chain,
    privateKey: private_key,
  });
  await works(dial(t, target, { tls }));
  await fails(dial(t, target, { ...ONCE, tls: tlsOf(told.mutual_tls) }), Code.UNAVAILABLE);
});

check("token", async (t) => {
  const { target, token } = told.tls;
  const tls = tlsOf(told.tls);
  await works(dial(t, target, { tls, token: async () => await Promise.resolve(token) }));
  for (const wrong of ["wrong", undefined]) {
    await fails(dial(t, target, { tls, token: wrong }), Code.UNAUTHENTICATED, ErrorReason.UNAUTHENTICATED);
  }
});

test("token_in_the_clear", (t) => {
  const token = "secret";
  for (const target of ["gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1"]) {
    assert.throws(() => new Client(target, { token }), /plain text/, target);
    dial(t, target, { token, allowInsecureToken: true });
    dial(t, target, { token, tls: true });
  }
  for (const target of ["unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1"]) dial(t, target, { token });
  report("passed token_in_the_clear");
});

function isWhole(generation: Generation, got: CompleteResponse, whole: CompleteResponse): void {
  assert.ok(generation.numResumes > 0, "the stream was not broken");
  assert.deepEqual(got.choices[0]!.tokenIds, whole.choices[0]!.tokenIds);
  assert.equal(got.choices[0]!.text, whole.choices[0]!.text);
  assert.equal(got.usage!.completionTokens, whole.usage!.completionTokens);
}

check("drain_and_resume", async (t) => {
  const whole = await client.generate(SEEDED).result();
  const drained = dial(t, told.handover.drained);
  const generation = dial(t, told.handover.target).generate(SEEDED);
  while (!generation.text) await generation.next();
  const answer = await drained.admin.drain({ grace: durationFromMs(300) });
  assert.equal(answer.state, DaemonState.DRAINING);
  assert.equal(answer.numRequests, 1);
  isWhole(generation, await generation.result(), whole);
});

check("cut_and_resume", async (t) => {
  const whole = await client.generate(SEEDED).result();
  const generation = dial(t, told.cut, { resumePolicy: { maxLosses: 64 } }).generate(SEEDED);
  isWhole(generation, await generation.result(), whole);
  const lost = dial(t, told.cut).generate(SEEDED, { resume: "never" });
  await assert.rejects(
    lost.result(),
    (error) => error instanceof StreamLostError && error.choices[0]!.tokenIds.length > 0 && error.started !== undefined,
  );
  await waitFree();
});

check("headers_cut", async (t) => {
  const whole = await client.generate(SEEDED).result();
  const generation = dial(t, told.headers_cut).generate({ ...SEEDED, requestId: "cut" });
  const got = await generation.result();
  assert.deepEqual([got.requestId, generation.numResumes], ["cut/resume-2", 0]);
  assert.deepEqual(got.choices[0]!.tokenIds, whole.choices[0]!.tokenIds);
  await assert.rejects(
    dial(t, told.headers_cut).generate(SEEDED, { resume: "never" }).result(),
    (error) => error instanceof HotgraphError && !(error instanceof StreamLostError) && error.code === Code.UNAVAILABLE,
  );
  const drawn = dial(t, told.headers_cut, { resumePolicy: { maxLosses: 1 } });
  const other = await drawn.generate({ prompt: SEEDED.prompt!, maxTokens: 4, requestId: "drawn" }).result();
  assert.equal(other.requestId, "drawn/resume-1");
  await waitFree();
});

check("soak", async () => {
  const call = async (other: Client): Promise<void> => {
    assert.ok((await other.inference.detokenize({ tokenIds: [504, 6376] })).text);
  };
  const oneAfterTheOther = async (): Promise<void> => {
    for (let i = 0; i < 25; i++) await call(client);
  };
  await Promise.all(Array.from({ length: 8 }, oneAfterTheOther));
  for (let i = 0; i < 20; i++) {
    const other = new Client(told.unix, ONCE);
    await call(other);
    other.close();
  }
});
