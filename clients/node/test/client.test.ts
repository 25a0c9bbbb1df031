// The client against a server in this process that fails as it is told: retries, details, metadata, pauses.

import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { create, fromBinary, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { Metadata, Server, ServerCredentials, type ServerWritableStream, type sendUnaryData } from "@grpc/grpc-js";
import { Client, type ClientOptions, Code, HotgraphError, StreamLostError, text } from "hotgraph-client";
import { GenerateRequestSchema, GenerateResponseSchema } from "hotgraph-client/v1";

const same = (bytes: Buffer): Buffer => bytes;

type Unary = (call: { request: Buffer; metadata: Metadata }, answer: sendUnaryData<Buffer>) => void;
type Streaming = (call: ServerWritableStream<Buffer, Buffer>) => void;

/** A client of a server that answers these methods of a service. */
async function serve(
  t: TestContext,
  service: string,
  methods: Record<string, { unary: Unary } | { stream: Streaming }>,
  options: ClientOptions = {},
): Promise<Client> {
  const server = new Server();
  for (const [name, method] of Object.entries(methods)) {
    const definition = {
      path: `/hotgraph.v1.${service}/${name}`,
      requestStream: false as const,
      requestSerialize: same,
      requestDeserialize: same,
      responseSerialize: same,
      responseDeserialize: same,
    };
    if ("unary" in method) server.addService({ [name]: { ...definition, responseStream: false } }, { [name]: method.unary });
    else server.addService({ [name]: { ...definition, responseStream: true } }, { [name]: method.stream });
  }
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) => (error ? reject(error) : resolve(bound)));
  });
  t.after(() => server.forceShutdown());
  const client = new Client(`127.0.0.1:${port}`, options);
  t.after(() => client.close());
  return client;
}

const gone = (code: Code, metadata = new Metadata()) => ({ code, details: "gone", metadata });
const isCode = (code: Code) => (error: unknown) => error instanceof HotgraphError && error.code === code;

function event(init: MessageInitShape<typeof GenerateResponseSchema>): Buffer {
  return Buffer.from(toBinary(GenerateResponseSchema, create(GenerateResponseSchema, init)));
}

test("calls that were not answered are tried again, but for EvictGraph and what is no passing failure", async (t) => {
  const numCalls: Record<string, number> = {};
  const failing = (name: string, code: Code, numFailures: number): { unary: Unary } => ({
    unary: (_, answer) => {
      numCalls[name] = (numCalls[name] ?? 0) + 1;
      answer(numCalls[name] <= numFailures ? gone(code) : null, Buffer.alloc(0));
    },
  });
  const client = await serve(t, "GraphService", {
    GetGraph: failing("GetGraph", Code.UNAVAILABLE, 2),
    PinGraph: failing("PinGraph", Code.RESOURCE_EXHAUSTED, 100),
    UnpinGraph: failing("UnpinGraph", Code.INTERNAL, 1),
    EvictGraph: failing("EvictGraph", Code.UNAVAILABLE, 1),
  });
  await client.graphCache.getGraph({ name: "g" });
  await assert.rejects(client.graphCache.pinGraph({ name: "g" }), isCode(Code.RESOURCE_EXHAUSTED));
  await assert.rejects(client.graphCache.unpinGraph({ name: "g" }), isCode(Code.INTERNAL));
  await assert.rejects(client.graphCache.evictGraph({ name: "g" }), isCode(Code.UNAVAILABLE));
  assert.deepEqual(numCalls, { GetGraph: 3, PinGraph: 4, UnpinGraph: 1, EvictGraph: 1 });
});

test("metadata carries token, client id and session key, and details that cannot be read count as absent", async (t) => {
  const seen: Metadata[] = [];
  const methods = {
    Complete: {
      unary: ((call, answer) => {
        seen.push(call.metadata);
        const wrong = new Metadata();
        wrong.set("grpc-status-details-bin", Buffer.from([0x1a, 0x7f]));
        answer(gone(Code.NOT_FOUND, wrong));
      }) satisfies Unary,
    },
  };
  let numTokens = 0;
  const token = async () => await Promise.resolve(`t${++numTokens}`);
  const client = await serve(t, "InferenceService", methods, { token, clientId: "me" });
  for (const sessionKey of ["plain", "ключ"]) {
    await assert.rejects(
      client.complete({ prompt: text("x"), sessionKey }, { metadata: { "x-more": "more" } }),
      (error) => isCode(Code.NOT_FOUND)(error) && (error as HotgraphError).description === "gone",
    );
  }
  assert.deepEqual(
    seen.map((each) => ["authorization", "x-client-id", "x-more"].map((key) => each.get(key)[0])),
    [
      ["bearer t1", "me", "more"],
      ["bearer t2", "me", "more"],
    ],
  );
  assert.equal(seen[0]!.get("session_id")[0], "plain");
  assert.match(String(seen[1]!.get("session_id")[0]), /^[0-9a-f]{64}$/);
});

test("a token that cannot be had and a value that no field can hold fail the call, and nothing is sent", async (t) => {
  const isNoToken = (error: unknown) => isCode(Code.UNAUTHENTICATED)(error) && /no vault/.test(String(error));
  const client = await serve(t, "InferenceService", {}, { token: () => Promise.reject(new Error("no vault")) });
  await assert.rejects(client.inference.listModels({}), isNoToken);
  await assert.rejects(client.generate({ prompt: text("x") }).result(), isNoToken);
  await assert.rejects(client.inference.detokenize({ tokenIds: [-1] }), isCode(Code.INVALID_ARGUMENT));
  assert.throws(() => client.generate({ maxTokens: 1.5 }), isCode(Code.INVALID_ARGUMENT));
  assert.throws(() => client.generate({}, { timeoutMs: 0 }), RangeError);
});

test("a stream whose tokens pause for too long is lost, and goes on over another connection", async (t) => {
  const asked: number[][] = [];
  const stream: Streaming = (call) => {
    const request = fromBinary(GenerateRequestSchema, call.request);
    asked.push(request.resume.flatMap(({ tokenIds }) => tokenIds));
    const first = asked.length === 1;
    call.write(event({ event: { case: "started", value: { requestId: "r", model: "m", seed: 7n } } }));
    call.write(event({ event: { case: "tokens", value: { tokenIds: [first ? 1 : 2], text: first ? "a" : "b" } } }));
    if (first) return; // and nothing more
    call.write(event({ event: { case: "finished", value: { usage: { completionTokens: 2 } } } }));
    call.end();
  };
  const client = await serve(t, "InferenceService", { Generate: { stream } });
  const request = { prompt: text("x"), sampling: { seed: 7n } };
  const generation = client.generate(request, { resumePolicy: { idleMs: 200, firstBackoffMs: 1 } });
  const answer = await generation.result();
  assert.deepEqual([answer.choices[0]?.text, answer.choices[0]?.tokenIds, generation.numResumes], ["ab", [1, 2], 1]);
  assert.deepEqual(asked, [[], [1]]);
});

test("what arrived before the connection failed is not lost with it", async (t) => {
  let fail = (): void => undefined;
  const stream: Streaming = (call) => {
    fail = () => call.emit("error", gone(Code.INTERNAL));
    call.write(event({ event: { case: "started", value: { requestId: "r", seed: 7n } } }));
    for (let id = 0; id < 50; id++) call.write(event({ event: { case: "tokens", value: { tokenIds: [id], text: "x" } } }));
  };
  const client = await serve(t, "InferenceService", { Generate: { stream } });
  const generation = client.generate({ prompt: text("x"), sampling: { seed: 7n } }, { resume: "never" });
  await generation.next();
  await sleep(300); // all is here
  fail();
  await sleep(100); // the error too
  await assert.rejects(
    generation.result(),
    (error) => error instanceof StreamLostError && error.code === Code.INTERNAL && error.choices[0]?.tokenIds.length === 50,
  );
});

test("a reader that stops makes the server stop", async (t) => {
  let numWritten = 0;
  const stream: Streaming = (call) => {
    const write = (): void => {
      while (!call.cancelled && numWritten < 10_000) {
        const tokens = { tokenIds: [numWritten++], text: "x".repeat(10_000) };
        if (!call.write(event({ event: { case: "tokens", value: tokens } }))) {
          call.once("drain", write);
          return;
        }
      }
    };
    write();
  };
  const client = await serve(t, "InferenceService", { Generate: { stream } });
  await using generation = client.generate({ prompt: text("x") });
  await generation.next();
  await sleep(500);
  assert.ok(numWritten < 5000, `${numWritten} of 10000 were sent to nobody`);
});
