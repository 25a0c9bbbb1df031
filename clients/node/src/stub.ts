// Calls of any service over a gRPC channel: typed by the generated descriptors, errors of this package, streams that are read
// one message at a time. It knows no hotgraph message but for the session key.

import { createHash } from "node:crypto";

import {
  create,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type DescService,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import { type CallOptions as GrpcCallOptions, Client as Channel, type ClientReadableStream, Metadata, status } from "@grpc/grpc-js";

import { fromError, HotgraphError } from "./errors.js";
import { checkTimeout, type Token } from "./options.js";

const MAX_QUEUED = 256;

/** Of one call. */
export interface CallOptions {
  /** Ends the call when aborted: its error is of kind `cancelled`, with the signal's reason as cause. */
  readonly signal?: AbortSignal | undefined;
  /** The call's deadline, from now. */
  readonly timeoutMs?: number | undefined;
  /** More metadata. */
  readonly metadata?: Readonly<Record<string, string>> | undefined;
}

/** The calls of a service: a promise for an answer, an async iterable for a stream of them. */
export type Stub<S extends DescService> = {
  readonly [K in keyof S["method"]]: S["method"][K] extends DescMethodUnary<infer I, infer O>
    ? (request: MessageInitShape<I>, options?: CallOptions) => Promise<MessageShape<O>>
    : S["method"][K] extends DescMethodServerStreaming<infer I, infer O>
      ? (request: MessageInitShape<I>, options?: CallOptions) => AsyncGenerator<MessageShape<O>, void, undefined>
      : never;
};

/** What every call of a client shares. */
export interface CallContext {
  readonly channel: Channel;
  readonly token: Token | undefined;
  readonly clientId: string;
  readonly waitForReady: boolean;
  readonly timeoutMs: number | undefined;
  /** Aborted when the client is closed. */
  readonly closed: AbortSignal;
}

/** Makes the calls of a service. */
export function makeStub<S extends DescService>(context: CallContext, service: S): Stub<S> {
  const calls: Record<string, unknown> = {};
  for (const method of service.methods) {
    if (method.methodKind === "unary") {
      calls[method.localName] = (request: MessageInitShape<typeof method.input>, options?: CallOptions) =>
        callUnary(context, method as DescMethodUnary, request, options);
    } else if (method.methodKind === "server_streaming") {
      calls[method.localName] = (request: MessageInitShape<typeof method.input>, options?: CallOptions) =>
        readAll(context, method as DescMethodServerStreaming, request, options);
    }
  }
  return calls as Stub<S>;
}

/** `/package.Service/Method`. */
function pathOf(method: DescMethodUnary | DescMethodServerStreaming): string {
  return `/${method.parent.typeName}/${method.name}`;
}

async function callUnary(
  context: CallContext,
  method: DescMethodUnary,
  init: MessageInitShape<DescMethodUnary["input"]>,
  options: CallOptions = {},
): Promise<MessageShape<DescMethodUnary["output"]>> {
  checkTimeout(options.timeoutMs);
  const request = create(method.input, init);
  const packed = pack(() => toBinary(method.input, request));
  const answer = await callBytes(context, pathOf(method), packed, sessionKeyOf(request), {
    ...options,
    timeoutMs: options.timeoutMs ?? context.timeoutMs,
  });
  return unpack(() => fromBinary(method.output, answer));
}

/** One unary call of bytes, for methods that the contract does not know too. */
export async function callBytes(
  context: CallContext,
  path: string,
  request: Uint8Array,
  sessionKey: string,
  options: CallOptions,
): Promise<Uint8Array> {
  const grpcOptions = withDeadline(options.timeoutMs);
  const metadata = await metadataOf(context, sessionKey, options);
  const signal = anyOf(context.closed, options.signal);
  throwIfAborted(signal);
  let stop = (): void => undefined;
  try {
    return await new Promise((resolve, reject) => {
      const call = context.channel.makeUnaryRequest(
        path,
        (bytes: Uint8Array) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength),
        (bytes) => bytes,
        request,
        metadata,
        grpcOptions,
        (error, value) => {
          if (error) reject(fromError(error));
          else resolve(value ?? new Uint8Array());
        },
      );
      stop = onAbort(signal, () => {
        reject(abortError(signal));
        call.cancel();
      });
    });
  } finally {
    stop();
  }
}

async function* readAll(
  context: CallContext,
  method: DescMethodServerStreaming,
  init: MessageInitShape<DescMethodServerStreaming["input"]>,
  options: CallOptions = {},
): AsyncGenerator<MessageShape<DescMethodServerStreaming["output"]>, void, undefined> {
  checkTimeout(options.timeoutMs);
  const reader = new StreamReader(context, method, create(method.input, init), options);
  try {
    for (;;) {
      const result = await reader.read();
      if (result.error !== undefined) throw result.error;
      if (result.message === undefined) return;
      yield result.message;
    }
  } finally {
    reader.close();
  }
}

/** A message, or an error, or neither when the stream ended with OK. */
export interface ReadResult<T> {
  readonly message?: T;
  readonly error?: HotgraphError;
}

/**
 * One streaming call under way. Errors come as results, so that none is lost when nobody reads. It keeps up to MAX_QUEUED
 * messages that were not read yet: more would fill memory, and fewer be lost, since gRPC for Node throws away what it was not
 * asked for when a call fails.
 */
export class StreamReader<M extends DescMethodServerStreaming> {
  readonly #queue: MessageShape<M["output"]>[] = [];
  readonly #signal: AbortSignal;
  readonly #stopListening: () => void;
  #call: ClientReadableStream<MessageShape<M["output"]>> | undefined;
  #error: HotgraphError | undefined;
  #hasHeaders = false;
  #isDrained = false; // every message is in the queue, or was
  #hasStatus = false;
  #wake: (() => void) | undefined;

  constructor(context: CallContext, method: M, request: MessageShape<M["input"]>, options: CallOptions) {
    this.#signal = anyOf(context.closed, options.signal);
    this.#stopListening = onAbort(this.#signal, () => this.#end(abortError(this.#signal)));
    void this.#open(context, method, request, options);
  }

  async #open(context: CallContext, method: M, request: MessageShape<M["input"]>, options: CallOptions): Promise<void> {
    try {
      const grpcOptions = withDeadline(options.timeoutMs);
      const packed = pack(() => toBinary(method.input, request));
      const metadata = await metadataOf(context, sessionKeyOf(request), options);
      if (this.#isOver) return;
      const call = context.channel.makeServerStreamRequest(
        pathOf(method),
        (bytes: Uint8Array) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength),
        (bytes): MessageShape<M["output"]> => fromBinary<M["output"]>(method.output, bytes),
        packed,
        metadata,
        grpcOptions,
      );
      this.#call = call;
      call.on("metadata", () => {
        this.#hasHeaders = true;
      });
      call.on("data", (message: MessageShape<M["output"]>) => {
        this.#queue.push(message);
        if (this.#queue.length >= MAX_QUEUED) call.pause();
        this.#notify();
      });
      call.on("end", () => {
        this.#isDrained = true; // an error may come before the messages that arrived before it were read
        this.#notify();
      });
      call.on("error", (error) => {
        this.#error ??= fromError(error);
      });
      call.on("status", () => {
        this.#hasStatus = true;
        this.#notify();
      });
    } catch (error) {
      this.#end(fromError(error));
    }
  }

  get #isOver(): boolean {
    return this.#isDrained && this.#hasStatus;
  }

  /** Whether the server began to answer. */
  get hasHeaders(): boolean {
    return this.#hasHeaders;
  }

  #notify(): void {
    this.#wake?.();
  }

  /** Ends it from this side. */
  #end(error: HotgraphError): void {
    if (this.#isOver) return;
    this.#error = error;
    this.#isDrained = true;
    this.#hasStatus = true;
    this.#queue.length = 0;
    this.#call?.cancel();
    this.#call?.resume(); // lets it end
    this.#notify();
  }

  /** The next message. One read at a time. */
  async read(): Promise<ReadResult<MessageShape<M["output"]>>> {
    for (;;) {
      const message = this.#queue.shift();
      if (message !== undefined) {
        if (this.#queue.length < MAX_QUEUED) this.#call?.resume();
        return { message };
      }
      if (this.#isOver) {
        this.#stopListening();
        return this.#error === undefined ? {} : { error: this.#error };
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
      this.#wake = undefined;
    }
  }

  /** Ends the call if it has not ended: a waiting read gets this error. */
  close(error = new HotgraphError(status.CANCELLED, "the stream was left")): void {
    this.#stopListening();
    this.#end(error);
  }
}

function withDeadline(timeoutMs: number | undefined): GrpcCallOptions {
  return timeoutMs === undefined ? {} : { deadline: Date.now() + timeoutMs };
}

/**
 * What every call carries. That a token goes only where it may was checked before. Throws UNAUTHENTICATED when the token cannot
 * be had, INVALID_ARGUMENT for what no header may hold: no failure of the server's that would be worth another try.
 */
async function metadataOf(context: CallContext, sessionKey: string, options: CallOptions): Promise<Metadata> {
  const metadata = new Metadata({ waitForReady: context.waitForReady });
  const set = (key: string, value: string): void => {
    try {
      metadata.set(key, value);
    } catch (error) {
      throw new HotgraphError(status.INVALID_ARGUMENT, `no metadata: ${key}`, { cause: error });
    }
  };
  if (context.token !== undefined) set("authorization", `bearer ${await readToken(context.token)}`);
  if (context.clientId) set("x-client-id", context.clientId);
  if (sessionKey) set("session_id", sessionHeader(sessionKey));
  for (const [key, value] of Object.entries(options.metadata ?? {})) set(key, value);
  return metadata;
}

async function readToken(token: Token): Promise<string> {
  if (typeof token === "string") return token;
  try {
    return await token();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new HotgraphError(status.UNAUTHENTICATED, `no token: ${message}`, { cause: error });
  }
}

function sessionKeyOf(request: object): string {
  return "sessionKey" in request && typeof request.sessionKey === "string" ? request.sessionKey : "";
}

/** What a balancer hashes; a key that no header may hold goes as its SHA-256. */
function sessionHeader(key: string): string {
  const isPlain = key.trim() === key && /^[ -~]*$/.test(key);
  return isPlain ? key : createHash("sha256").update(key).digest("hex");
}

function pack(write: () => Uint8Array): Uint8Array {
  try {
    return write();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new HotgraphError(status.INVALID_ARGUMENT, message, { cause: error });
  }
}

function unpack<T>(read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw new HotgraphError(status.INTERNAL, "the answer is no message of its type", { cause: error });
  }
}

export function anyOf(first: AbortSignal, second: AbortSignal | undefined): AbortSignal {
  return second === undefined ? first : AbortSignal.any([first, second]);
}

/** Returns what stops listening. */
export function onAbort(signal: AbortSignal, act: () => void): () => void {
  if (signal.aborted) {
    act();
    return () => undefined;
  }
  signal.addEventListener("abort", act, { once: true });
  return () => signal.removeEventListener("abort", act);
}

/** AbortSignal.timeout's end is a deadline, any other is the caller's. */
export function abortError(signal: AbortSignal): HotgraphError {
  const reason: unknown = signal.reason;
  const isTimeout = reason instanceof Error && reason.name === "TimeoutError";
  const message = reason instanceof Error ? reason.message : String(reason);
  return new HotgraphError(isTimeout ? status.DEADLINE_EXCEEDED : status.CANCELLED, message, { cause: reason });
}

function throwIfAborted(signal: AbortSignal): void {
  if (signal.aborted) throw abortError(signal);
}
