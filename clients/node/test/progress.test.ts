// The rules of going on after a lost server, without any connection and with a clock that stands still.

import assert from "node:assert/strict";
import { test } from "node:test";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, HotgraphError, StreamLostError } from "hotgraph-client";
import {
  type ChoiceFinish,
  ChoiceFinishSchema,
  ErrorReason,
  FinishReason,
  GenerateRequestSchema,
  type GenerateResponse,
  GenerateResponseSchema,
} from "hotgraph-client/v1";

import { KIND_BY_REASON } from "../dist/errors.js";
import { DEFAULT_RESUME_POLICY, isLoss, MAX_REQUEST_ID_LENGTH, Progress, type Resume } from "../dist/progress.js";

const started = (seed: bigint): GenerateResponse =>
  create(GenerateResponseSchema, {
    event: { case: "started", value: { requestId: "r", model: "m", promptTokens: 5, seed } },
  });

const tokens = (choiceIndex: number, tokenIds: number[], finish?: ChoiceFinish): GenerateResponse =>
  create(GenerateResponseSchema, {
    event: {
      case: "tokens",
      value: { choiceIndex, tokenIds, text: "x".repeat(tokenIds.length), ...(finish ? { finish } : {}) },
    },
  });

const finished = (completionTokens: number, ...choices: ChoiceFinish[]): GenerateResponse =>
  create(GenerateResponseSchema, {
    event: { case: "finished", value: { choices, usage: { promptTokens: 5, completionTokens } } },
  });

const stopped = (choiceIndex: number): ChoiceFinish =>
  create(ChoiceFinishSchema, { choiceIndex, reason: FinishReason.STOP });

const bare = (code: Code): HotgraphError => new HotgraphError(code, "gone");

/** The daemon's own word. */
const told = (code: Code, reasonName: string, retryAfterMs = 0): HotgraphError =>
  new HotgraphError(code, "no", { reasonName, retryAfterMs });

type Init = MessageInitShape<typeof GenerateRequestSchema>;
const SEEDED: Init = { sampling: { seed: 7n } };

/** One whose first connection sent these messages. */
function begun(init: Init, resume: Resume, messages: GenerateResponse[], deadlineMs?: number): Progress {
  const request = create(GenerateRequestSchema, init);
  const progress = new Progress(request, resume, DEFAULT_RESUME_POLICY, deadlineMs, () => 1000, (low) => low);
  assert.equal(progress.open(), request);
  for (const message of messages) assert.ok(progress.receive(message));
  return progress;
}

function waitOf(progress: Progress, cause?: HotgraphError, hadHeaders = true): number {
  const loss = progress.lose(cause, hadHeaders);
  assert.ok("waitMs" in loss);
  return loss.waitMs;
}

test("it goes on with what it has, and shows one stream", () => {
  const progress = begun({ ...SEEDED, numChoices: 3 }, "repeatable", [
    started(7n),
    tokens(0, [1, 2]),
    tokens(1, [3], stopped(1)),
  ]);
  assert.ok(waitOf(progress, bare(Code.UNAVAILABLE)) > 0);
  const again = progress.open();
  assert.deepEqual([again.requestId, again.model, again.sampling?.seed], ["r/resume-1", "m", 7n]);
  assert.deepEqual(
    again.resume.map(({ index, tokenIds }) => [index, tokenIds]),
    [
      [0, [1, 2]],
      [2, []],
    ],
  );
  assert.equal(progress.receive(started(7n)), undefined);
  assert.equal(progress.numResumes, 1);
  const last = progress.receive(finished(5, stopped(0), stopped(2)));
  assert.ok(last?.case === "finished");
  assert.equal(last.value.usage?.completionTokens, 6);
  assert.deepEqual(
    last.value.choices.map(({ choiceIndex }) => choiceIndex),
    [0, 1, 2],
  );
  assert.equal(progress.request.resume.length, 0);
});

test("what is a loss, and what is not", () => {
  const cases: [string, HotgraphError, boolean, boolean, boolean][] = [
    ["refused before an answer", bare(Code.UNAVAILABLE), false, false, false],
    ["lost after the headers", bare(Code.UNAVAILABLE), false, true, true],
    ["a limit after the headers", bare(Code.RESOURCE_EXHAUSTED), false, true, false],
    ["lost after it", bare(Code.UNAVAILABLE), true, false, true],
    ["a proxy's mistake", bare(Code.INTERNAL), false, false, true],
    ["cancelled by another", bare(Code.CANCELLED), false, false, true],
    ["a deadline", bare(Code.DEADLINE_EXCEEDED), true, true, false],
    ["a wrong request", bare(Code.INVALID_ARGUMENT), true, true, false],
    ["draining after an answer", told(Code.UNAVAILABLE, "DRAINING"), true, false, true],
    ["draining before", told(Code.UNAVAILABLE, "DRAINING"), false, true, false],
    ["the daemon's own mistake", told(Code.INTERNAL, "INTERNAL"), true, true, false],
  ];
  for (const [name, error, isReached, hadHeaders, wanted] of cases) {
    assert.equal(isLoss(error, isReached, hadHeaders), wanted, name);
  }
});

test("after headers alone it goes on as it was, as often as servers may be lost", () => {
  const init: Init = { requestId: "mine", maxTokens: 4 };
  const progress = begun(init, "repeatable", []);
  const gone = bare(Code.UNAVAILABLE);
  for (let i = 1; i <= DEFAULT_RESUME_POLICY.maxLosses; i++) {
    assert.equal(waitOf(progress, gone), 50);
    assert.deepEqual(progress.open(), create(GenerateRequestSchema, { ...init, requestId: `mine/resume-${i}` }));
  }
  assert.throws(() => progress.lose(gone, true), gone);
  assert.throws(() => begun(init, "never", []).lose(gone, true), gone);
  const again = begun(init, "repeatable", []);
  waitOf(again, gone);
  again.open();
  waitOf(again, gone, false); // a server that was lost before is waited for
});

test("it goes on when the tokens would be the same, or when told to", () => {
  const cases: [Init, Resume, boolean][] = [
    [{}, "repeatable", false],
    [{}, "always", true],
    [SEEDED, "repeatable", true],
    [{ sampling: { temperature: 0 } }, "repeatable", true],
    [SEEDED, "never", false],
  ];
  for (const [init, resume, goesOn] of cases) {
    const progress = begun(init, resume, [started(7n), tokens(0, [1])]);
    if (goesOn) {
      waitOf(progress);
    } else {
      assert.throws(
        () => progress.lose(undefined, true),
        (error) => error instanceof StreamLostError && error.choices[0]?.tokenIds[0] === 1 && error.code === Code.UNAVAILABLE,
      );
    }
  }
  waitOf(begun({}, "repeatable", [started(7n)])); // before any token there is nothing to contradict
});

test("losses and tries are bounded, and waits grow up to the longest", () => {
  const answering = begun(SEEDED, "always", [started(7n), tokens(0, [1])]);
  for (let i = 0; i < DEFAULT_RESUME_POLICY.maxLosses; i++) {
    waitOf(answering, bare(Code.UNAVAILABLE));
    answering.open();
    answering.receive(started(7n));
  }
  assert.throws(() => answering.lose(bare(Code.UNAVAILABLE), true), StreamLostError);

  const silent = begun(SEEDED, "always", [started(7n), tokens(0, [1])]);
  const waits = [];
  for (let i = 0; i < DEFAULT_RESUME_POLICY.maxAttempts; i++) {
    waits.push(waitOf(silent, bare(Code.UNAVAILABLE), false));
    silent.open();
  }
  assert.throws(() => silent.lose(bare(Code.UNAVAILABLE), true), StreamLostError);
  assert.deepEqual(waits, [50, 100, 200, 400, 800, 1600, 2500, 2500]);
});

test("it waits as long as told, and not beyond the deadline", () => {
  const draining = told(Code.UNAVAILABLE, "DRAINING", 9000);
  assert.equal(waitOf(begun(SEEDED, "always", [started(7n), tokens(0, [1])]), draining), 9000);
  const late = begun(SEEDED, "always", [started(7n), tokens(0, [1])], 6000);
  assert.throws(() => late.lose(draining, true), draining);
  const inTime = begun(SEEDED, "always", [started(7n), tokens(0, [1])], 6000);
  waitOf(inTime, bare(Code.UNAVAILABLE));
  assert.equal(inTime.open().timeout?.seconds, 5n);
});

test("another seed, model or prompt is not the same answer", () => {
  const progress = begun(SEEDED, "always", [started(7n), tokens(0, [1])]);
  waitOf(progress);
  progress.open();
  assert.throws(() => progress.receive(started(8n)), StreamLostError);
});

test("a stream that lost nothing but Finished is whole", () => {
  const progress = begun(SEEDED, "never", [started(7n), tokens(0, [1, 2], stopped(0))]);
  const loss = progress.lose(bare(Code.UNAVAILABLE), true);
  assert.ok("event" in loss && loss.event.case === "finished");
  assert.equal(loss.event.value.usage?.completionTokens, 2);
  assert.ok(progress.isEnded);
});

test("long request ids stay valid", () => {
  const progress = begun({ ...SEEDED, requestId: "i".repeat(MAX_REQUEST_ID_LENGTH) }, "always", []);
  waitOf(progress, bare(Code.INTERNAL));
  const { requestId } = progress.open();
  assert.equal(requestId.length, MAX_REQUEST_ID_LENGTH);
  assert.ok(requestId.endsWith("/resume-1"));
});

test("every reason has a kind", () => {
  for (const reason of Object.values(ErrorReason)) {
    if (typeof reason === "number" && reason !== ErrorReason.UNSPECIFIED) {
      assert.ok(KIND_BY_REASON.has(reason), ErrorReason[reason]);
    }
  }
});
