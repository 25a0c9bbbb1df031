// Reads one generation: opens its connections one after the other, as progress.ts decides.

import { type MessageInitShape } from "@bufbuild/protobuf";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { status } from "@grpc/grpc-js";

import { HotgraphError } from "./errors.js";
import { type Choice, type Finished, type Started } from "./gen/hotgraph/v1/generation_pb.js";
import {
  type CompleteResponse,
  type GenerateRequest,
  type GenerateRequestSchema,
  InferenceService,
} from "./gen/hotgraph/v1/inference_service_pb.js";
import { type GenerationEvent, Progress, type Resume, type ResumePolicy } from "./progress.js";
import { abortError, anyOf, type CallContext, type CallOptions, onAbort, StreamReader } from "./stub.js";

/** A GenerateRequest as a plain object; what is left out has the server's default. */
export type GenerateInit = MessageInitShape<typeof GenerateRequestSchema>;

/** Of one generation. timeoutMs: for all of it, reconnections included. */
export interface GenerateOptions extends CallOptions {
  /** Instead of what the client was told. */
  readonly resume?: Resume | undefined;
  /** Instead of what the client was told, each part of it. */
  readonly resumePolicy?: Partial<ResumePolicy> | undefined;
}

type Reader = StreamReader<typeof InferenceService.method.generate>;

const SETTLE_MS = 1000; // how long the status after the last event may take
const GRACE_MS = 2000; // beyond the request's timeout, for the server to tell that it passed

/**
 * One generation under way: an async iterable of Started, Tokens and Finished events. After a lost server it goes on over a new
 * connection without the reader noticing, as the client's resume and resumePolicy allow. It ends when all is read, when the loop
 * is left, by `cancel`, by its signal or its deadline; one of them must happen.
 */
export class Generation implements AsyncIterableIterator<GenerationEvent, undefined, undefined>, AsyncDisposable {
  readonly #context: CallContext;
  readonly #options: CallOptions;
  readonly #progress: Progress;
  readonly #callEndMs: number | undefined; // on the progress's clock
  readonly #signal: AbortSignal;
  readonly #stopListening: () => void;
  #reader: Reader | undefined;
  #waitMs = 0;
  #skipWait: (() => void) | undefined;
  #last: Promise<unknown> = Promise.resolve(); // reads come one after the other
  #isSettled = false;

  /** Use `client.generate`. */
  constructor(
    context: CallContext,
    request: GenerateRequest,
    resume: Resume,
    policy: ResumePolicy,
    options: CallOptions,
  ) {
    this.#context = context;
    this.#options = options;
    const ends: number[] = [];
    const callEnds: number[] = [];
    const now = performance.now();
    if (options.timeoutMs !== undefined) {
      ends.push(now + options.timeoutMs);
      callEnds.push(now + options.timeoutMs);
    }
    const requestMs = request.timeout ? durationMs(request.timeout) : 0;
    if (requestMs > 0) {
      ends.push(now + requestMs);
      callEnds.push(now + requestMs + GRACE_MS);
    }
    this.#callEndMs = callEnds.length > 0 ? Math.min(...callEnds) : undefined;
    this.#progress = new Progress(request, resume, policy, ends.length > 0 ? Math.min(...ends) : undefined);
    this.#signal = anyOf(context.closed, options.signal);
    this.#open();
    this.#stopListening = onAbort(this.#signal, () => this.#stop(abortError(this.#signal)));
  }

  /** Begins the next connection. Throws when the time is over. */
  #open(): void {
    const request = this.#progress.open();
    const timeoutMs = this.#callEndMs === undefined ? undefined : Math.max(this.#callEndMs - performance.now(), 1);
    this.#reader = new StreamReader(this.#context, InferenceService.method.generate, request, {
      ...this.#options,
      timeoutMs,
    });
  }

  /** The next event; done after Finished. Throws HotgraphError; StreamLostError for a server that was lost in vain. */
  next(): Promise<IteratorResult<GenerationEvent, undefined>> {
    const result = this.#last.then(() => this.#next());
    this.#last = result.catch(() => undefined);
    return result;
  }

  async #next(): Promise<IteratorResult<GenerationEvent, undefined>> {
    while (!this.#progress.isEnded) {
      let event: GenerationEvent | undefined;
      try {
        event = await this.#advance();
      } catch (error) {
        this.#release();
        throw error;
      }
      if (event) return { done: false, value: event };
    }
    if (this.#progress.error) throw this.#progress.error;
    await this.#settle();
    return { done: true, value: undefined };
  }

  /** Reads one message, or waits and opens the next connection. */
  async #advance(): Promise<GenerationEvent | undefined> {
    const progress = this.#progress;
    if (progress.state === "lost") {
      await this.#wait(this.#waitMs);
      if (!progress.isEnded) this.#open();
      return undefined;
    }
    const reader = this.#reader!;
    const idleMs = progress.isIdleBounded ? progress.policy.idleMs : undefined;
    const idle = new HotgraphError(status.UNAVAILABLE, `no event for ${idleMs} ms`);
    const timer = idleMs === undefined ? undefined : setTimeout(() => reader.close(idle), idleMs);
    const { message, error } = await reader.read();
    clearTimeout(timer);
    if (progress.isEnded) return undefined; // cancelled meanwhile
    if (message) return progress.receive(message);
    const loss = progress.lose(error, reader.hasHeaders);
    if ("event" in loss) return loss.event;
    this.#waitMs = loss.waitMs;
    return undefined;
  }

  async #wait(ms: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#skipWait = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#skipWait = undefined;
  }

  /** Lets a finished call end by itself: a cancel now would look to the server as if the caller had left. */
  async #settle(): Promise<void> {
    if (this.#isSettled) return;
    this.#isSettled = true;
    const reader = this.#reader!;
    const timer = setTimeout(() => reader.close(), SETTLE_MS);
    while ((await reader.read()).message) {
      // Its status is what is waited for; everything is here already.
    }
    clearTimeout(timer);
    this.#release();
  }

  /** Ends it with this error, if it has not ended. */
  #stop(error: HotgraphError): boolean {
    const isStopped = !this.#progress.isEnded;
    if (isStopped) {
      this.#progress.fail(error);
      this.#release();
    }
    return isStopped;
  }

  #release(): void {
    this.#stopListening?.();
    this.#skipWait?.();
    this.#reader?.close();
  }

  /** Ends it; the server frees its place at the next step. A waiting reader gets an error of kind `cancelled`. False when it had ended. */
  cancel(): boolean {
    return this.#stop(new HotgraphError(status.CANCELLED, "the generation was cancelled"));
  }

  /** What leaving a `for await` does: ends it, unless all has come. */
  async return(): Promise<IteratorResult<GenerationEvent, undefined>> {
    if (this.#progress.finished) await this.#settle();
    this.cancel();
    return { done: true, value: undefined };
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }

  /** The pieces of the first choice's text, as they come. Leaving the loop before the end ends the call. */
  async *texts(): AsyncGenerator<string, void, undefined> {
    for await (const event of this) {
      if (event.case === "tokens" && event.value.choiceIndex === 0 && event.value.text) yield event.value.text;
    }
  }

  /** Reads what is left: the whole answer, events already read included. */
  async result(): Promise<CompleteResponse> {
    while (!(await this.next()).done) {
      // The progress keeps what comes.
    }
    return this.#progress.completion();
  }

  /** The first event, once it came. */
  get started(): Started | undefined {
    return this.#progress.started;
  }

  /** The last event, once it came. */
  get finished(): Finished | undefined {
    return this.#progress.finished;
  }

  /** The text of the first choice so far. */
  get text(): string {
    return this.#progress.text;
  }

  /** Every choice as far as it came. */
  get choices(): Choice[] {
    return this.#progress.choices();
  }

  /** How often another connection went on so far. */
  get numResumes(): number {
    return this.#progress.numResumes;
  }
}
