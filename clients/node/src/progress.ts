// One generation over as many connections as it takes: what came so far, and what to do when a connection ends. It knows
// messages and time but no channel: generation.ts opens the calls and reads them.
//
// A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status: what stands
// between client and server changes the code. The exceptions are the daemon's own refusals, errors of the request and deadlines.
// Before the server's headers gRPC's own retries apply (serviceConfig), after them these rules: the same request goes out again
// with the seed that Started told and, for each choice that has not ended, the tokens that came. The server goes on from them and
// sends only what is new, so that ids and texts join without a seam. A call whose connection breaks between the headers and the
// first event gRPC does not try again; nothing came of it, so the request goes out as it was.

import { clone, create } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { status } from "@grpc/grpc-js";

import { HotgraphError, StreamLostError } from "./errors.js";
import {
  type Choice,
  type ChoiceFinish,
  ChoiceSchema,
  type Finished,
  FinishedSchema,
  ReceiptSchema,
  ResumedChoiceSchema,
  SamplingParamsSchema,
  type Started,
  type TokenLogprobs,
  type Tokens,
  UsageSchema,
} from "./gen/hotgraph/v1/generation_pb.js";
import {
  type CompleteResponse,
  CompleteResponseSchema,
  type GenerateRequest,
  GenerateRequestSchema,
  type GenerateResponse,
} from "./gen/hotgraph/v1/inference_service_pb.js";

/** `{ case: "started" | "tokens" | "finished", value }`. */
export type GenerationEvent = Exclude<GenerateResponse["event"], { case: undefined }>;

/**
 * When a generation goes on after a lost server. `repeatable`: greedy requests and those with a seed, and any other before its
 * first token. `always`: also with the seed that the server drew. `never`: only what gRPC tries again by itself.
 */
export type Resume = "repeatable" | "always" | "never";

/** How far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at random. */
export interface ResumePolicy {
  /**
   * Servers lost in the middle of one generation, or between their headers and its first event; it bounds what a request that
   * kills servers can do.
   */
  readonly maxLosses: number;
  /** Tries in a row to reach a server again, each of them with gRPC's own retries. */
  readonly maxAttempts: number;
  readonly firstBackoffMs: number;
  readonly maxBackoffMs: number;
  /**
   * A stream whose tokens pause for longer counts as lost, for paths on which keepalive does not reach the server itself (a
   * proxy answers it). 0: never.
   */
  readonly idleMs: number;
}

export const DEFAULT_RESUME_POLICY: ResumePolicy = {
  maxLosses: 3,
  maxAttempts: 8,
  firstBackoffMs: 100,
  maxBackoffMs: 5000,
  idleMs: 0,
};

export const MAX_REQUEST_ID_LENGTH = 128;
const MAX_CHOICES_KEPT = 1024; // more than a server takes; it says so

type State = "new" | "open" | "lost" | "ended"; // lost: waits before the next connection

const TRANSITIONS: Readonly<Record<State, readonly State[]>> = {
  new: ["open", "ended"],
  open: ["lost", "ended"],
  lost: ["open", "ended"],
  ended: [],
};

/** What came of one choice. */
interface Kept {
  tokenIds: number[];
  text: string;
  logprobs: TokenLogprobs[];
  finish: ChoiceFinish | undefined;
  firstMs: number; // of its tokens
  lastMs: number;
}

/** What follows from a lost connection: a wait before the next, or the last event when nothing but it was missing. */
export type Loss = { readonly waitMs: number } | { readonly event: GenerationEvent };

export class Progress {
  state: State = "new";
  error: HotgraphError | undefined;
  started: Started | undefined;
  finished: Finished | undefined;
  numResumes = 0;

  readonly #kept = new Map<number, Kept>();
  readonly #beganMs: number;
  #numConnections = 0;
  #numLosses = 0;
  #numFailedAttempts = 0; // in a row, without an event
  #isConnectionAnswered = false;
  #hasConnectionTokens = false;
  #endedBefore: number[] = []; // choices that were whole when this connection began

  /** deadlineMs: on the clock of `nowMs`; undefined: none. */
  constructor(
    readonly request: GenerateRequest,
    readonly resume: Resume,
    readonly policy: ResumePolicy,
    readonly deadlineMs: number | undefined,
    readonly nowMs: () => number = () => performance.now(),
    readonly uniform: (low: number, high: number) => number = (low, high) => low + (high - low) * Math.random(),
  ) {
    this.#beganMs = nowMs();
    const numChoices = Math.min(request.numChoices ?? 1, MAX_CHOICES_KEPT);
    for (let index = 0; index < numChoices; index++) this.#choice(index);
  }

  get isEnded(): boolean {
    return this.state === "ended";
  }

  /** Whether the next event must come within policy.idleMs: tokens flow on this connection. */
  get isIdleBounded(): boolean {
    return this.policy.idleMs > 0 && this.#hasConnectionTokens;
  }

  /** The text of the first choice so far. */
  get text(): string {
    return this.#kept.get(0)?.text ?? "";
  }

  /** Every choice as far as it came. */
  choices(): Choice[] {
    return this.#sorted().map(([index, { tokenIds, text, logprobs, finish }]) =>
      create(ChoiceSchema, {
        index,
        text,
        tokenIds: [...tokenIds],
        logprobs: [...logprobs],
        ...(finish ? { finish } : {}),
      }),
    );
  }

  /** The whole answer, once it has finished. */
  completion(): CompleteResponse {
    const answer = create(CompleteResponseSchema, { choices: this.choices() });
    if (this.started) {
      answer.requestId = this.started.requestId;
      answer.model = this.started.model;
      answer.seed = this.started.seed;
    }
    if (this.finished?.usage) answer.usage = this.finished.usage;
    if (this.finished?.timings) answer.timings = this.finished.timings;
    if (this.finished?.receipt) answer.receipt = this.finished.receipt;
    return answer;
  }

  /** What the next connection sends: from new or lost to open. Throws when the time is over. */
  open(): GenerateRequest {
    const leftMs = this.leftMs();
    if (leftMs !== undefined && leftMs <= 0) {
      throw this.fail(new HotgraphError(status.DEADLINE_EXCEEDED, "the deadline passed"));
    }
    this.#move("open");
    this.#isConnectionAnswered = false;
    this.#hasConnectionTokens = false;
    this.#numConnections++;
    this.#endedBefore = this.#sorted().flatMap(([index, { finish }]) => (finish ? [index] : []));
    return this.#numConnections === 1 ? this.request : this.#again(leftMs);
  }

  /** Until the deadline. */
  leftMs(): number | undefined {
    return this.deadlineMs === undefined ? undefined : this.deadlineMs - this.nowMs();
  }

  /** The request for a connection after the first. */
  #again(leftMs: number | undefined): GenerateRequest {
    const request = clone(GenerateRequestSchema, this.request);
    if (leftMs !== undefined) request.timeout = durationFromMs(Math.ceil(leftMs));
    const base = this.started?.requestId ?? request.requestId;
    if (base) {
      // The id itself may still be in flight on a server that is only half dead.
      const suffix = `/resume-${this.#numConnections - 1}`;
      request.requestId = base.slice(0, MAX_REQUEST_ID_LENGTH - suffix.length) + suffix;
    }
    if (this.started) {
      request.model = this.started.model;
      request.sampling ??= create(SamplingParamsSchema);
      request.sampling.seed = this.started.seed;
    }
    if (this.#hasTokens()) {
      for (const [index, { tokenIds, finish }] of this.#sorted()) {
        if (!finish) request.resume.push(create(ResumedChoiceSchema, { index, tokenIds: [...tokenIds] }));
      }
    }
    return request;
  }

  /**
   * Takes in what the connection sent: the event for the caller, or undefined when there is none in it. Throws when the server
   * that goes on would not give the same tokens.
   */
  receive({ event }: GenerateResponse): GenerationEvent | undefined {
    switch (event.case) {
      case "started":
        this.#isConnectionAnswered = true;
        this.#numFailedAttempts = 0;
        return this.#takeStarted(event.value) ? event : undefined;
      case "tokens":
        this.#hasConnectionTokens = true;
        this.#add(event.value);
        return event;
      case "finished":
        return this.#finish(this.#merge(event.value));
      case undefined:
        return undefined; // a kind of event that this version does not know
    }
  }

  #takeStarted(started: Started): boolean {
    const first = this.started;
    if (first === undefined) {
      this.started = started;
      return true;
    }
    const { model, seed, promptTokens } = started;
    if (first.model !== model || first.seed !== seed || first.promptTokens !== promptTokens) {
      throw this.fail(this.#lost("the server that answered again has another model, prompt or seed", undefined));
    }
    this.numResumes++;
    return false;
  }

  #add({ choiceIndex, tokenIds, text, logprobs, finish }: Tokens): void {
    const kept = this.#choice(choiceIndex);
    if (tokenIds.length > 0) {
      kept.lastMs = this.nowMs();
      if (kept.tokenIds.length === 0) kept.firstMs = kept.lastMs;
    }
    for (const id of tokenIds) kept.tokenIds.push(id);
    kept.text += text;
    kept.logprobs.push(...logprobs);
    kept.finish = finish ?? kept.finish;
  }

  /**
   * Takes in that the connection ended before Finished, with this error or, when it is undefined, with OK: from open to lost, or
   * to ended. Throws when the generation cannot go on: with the daemon's own error as it is, with any other loss after the first
   * event as a StreamLostError. hadHeaders: the server had begun to answer.
   */
  lose(cause: HotgraphError | undefined, hadHeaders: boolean): Loss {
    const isAnswered = this.started !== undefined;
    if (cause && !isLoss(cause, isAnswered || this.#numConnections > 1, hadHeaders)) throw this.fail(cause);
    if (isAnswered && this.#sorted().every(([, { finish }]) => finish)) {
      return { event: this.#finish(this.#finishedAlone()) };
    }
    const isOwnWord = cause !== undefined && cause.reasonName !== "" && cause.kind === "retryable";
    if (this.#isConnectionAnswered || (!isAnswered && hadHeaders)) this.#numLosses++;
    else this.#numFailedAttempts++;
    const waitMs = this.#waitMs(cause);
    const leftMs = this.leftMs();
    if (!this.#mayResume() || (leftMs !== undefined && waitMs >= leftMs)) {
      const isBare = cause === undefined || (isAnswered && !isOwnWord);
      throw this.fail(isBare ? this.#lost("the server was lost in the middle of an answer", cause) : cause);
    }
    this.#move("lost");
    return { waitMs };
  }

  #mayResume(): boolean {
    if (this.#numLosses > this.policy.maxLosses || this.#numFailedAttempts >= this.policy.maxAttempts) return false;
    // Before any token there is nothing that a second try could contradict.
    return this.resume === "repeatable" ? isRepeatable(this.request) || !this.#hasTokens() : this.resume === "always";
  }

  #waitMs(cause: HotgraphError | undefined): number {
    const backoffMs = Math.min(this.policy.firstBackoffMs * 2 ** this.#numFailedAttempts, this.policy.maxBackoffMs);
    // Never before the time told, and not all clients of one server at once.
    return Math.max(backoffMs * this.uniform(0.5, 1.5), (cause?.retryAfterMs ?? 0) * this.uniform(1, 1.25));
  }

  #lost(message: string, cause: HotgraphError | undefined): StreamLostError {
    const text = cause ? `${message}: ${cause.description}` : message;
    const requestId = this.started?.requestId ?? "";
    const details = cause ? { requestId, cause } : { requestId };
    return new StreamLostError(cause?.code ?? status.UNAVAILABLE, text, details, this.started, this.choices());
  }

  /** Finished as one unbroken call would have told it: choices and tokens of earlier connections count. */
  #merge(finished: Finished): Finished {
    for (const finish of finished.choices) this.#choice(finish.choiceIndex).finish = finish;
    const whole = clone(FinishedSchema, finished);
    whole.choices = this.#finishes();
    whole.usage ??= create(UsageSchema);
    for (const index of this.#endedBefore) whole.usage.completionTokens += this.#choice(index).tokenIds.length;
    return whole;
  }

  /** Finished when every choice is whole and only that event was lost. Its timings are this side's. */
  #finishedAlone(): Finished {
    const kept = [...this.#kept.values()].filter(({ tokenIds }) => tokenIds.length > 0);
    const longest = kept.reduce<Kept | undefined>(
      (best, each) => (best && best.tokenIds.length >= each.tokenIds.length ? best : each),
      undefined,
    );
    const firstMs = Math.min(...kept.map((each) => each.firstMs));
    const lastMs = Math.max(...kept.map((each) => each.lastMs));
    const numGaps = (longest?.tokenIds.length ?? 0) - 1;
    const duration = (ms: number) => durationFromMs(Math.round(ms));
    return create(FinishedSchema, {
      choices: this.#finishes(),
      usage: {
        promptTokens: this.started?.promptTokens ?? 0,
        completionTokens: kept.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0),
      },
      timings: {
        queue: duration(0),
        total: duration(this.nowMs() - this.#beganMs),
        ...(longest
          ? {
              prefill: duration(firstMs - this.#beganMs),
              timeToFirstToken: duration(firstMs - this.#beganMs),
              decode: duration(lastMs - firstMs),
            }
          : {}),
        ...(longest && numGaps > 0
          ? { timePerOutputToken: duration((longest.lastMs - longest.firstMs) / numGaps) }
          : {}),
      },
      receipt: create(ReceiptSchema),
    });
  }

  #finishes(): ChoiceFinish[] {
    return this.#sorted().flatMap(([, { finish }]) => (finish ? [finish] : []));
  }

  #finish(finished: Finished): GenerationEvent {
    this.finished = finished;
    this.#move("ended");
    return { case: "finished", value: finished };
  }

  /** Ends it, and returns the error to throw. */
  fail(error: HotgraphError): HotgraphError {
    this.error = error;
    this.#move("ended");
    return error;
  }

  #move(next: State): void {
    if (!TRANSITIONS[this.state].includes(next)) throw new Error(`a generation cannot go from ${this.state} to ${next}`);
    this.state = next;
  }

  #hasTokens(): boolean {
    return [...this.#kept.values()].some(({ tokenIds }) => tokenIds.length > 0);
  }

  #choice(index: number): Kept {
    let kept = this.#kept.get(index);
    if (!kept) {
      kept = { tokenIds: [], text: "", logprobs: [], finish: undefined, firstMs: 0, lastMs: 0 };
      this.#kept.set(index, kept);
    }
    return kept;
  }

  #sorted(): [number, Kept][] {
    return [...this.#kept].sort(([a], [b]) => a - b);
  }
}

/**
 * Whether a stream that ended with this error lost its server. isReached: a server was lost before, or told an event. hadHeaders:
 * the server had begun to answer.
 */
export function isLoss(error: HotgraphError, isReached: boolean, hadHeaders: boolean): boolean {
  if (error.kind === "cancelled") return true; // not by us: something between us and the server let go
  if (error.reasonName !== "") return isReached && error.kind === "retryable";
  if (error.code === status.UNAVAILABLE) return isReached || hadHeaders; // before the headers gRPC has tried again already
  if (error.code === status.RESOURCE_EXHAUSTED) return isReached;
  return error.kind !== "request" && error.kind !== "deadline";
}

/** Whether the same request gives the same tokens again by itself: greedy, or with a seed. */
function isRepeatable({ sampling }: GenerateRequest): boolean {
  return sampling?.seed !== undefined || sampling?.temperature === 0;
}
