// The client: a channel, the stubs over it, and what makes common calls short.

import { create, fromBinary, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { Client as Channel, status } from "@grpc/grpc-js";

import { HotgraphError } from "./errors.js";
import { Health as HealthService, type HealthCheckResponse_ServingStatus } from "./gen/grpc_health/v1/health_pb.js";
import { AdminService, type Client as ClientInfo } from "./gen/hotgraph/v1/admin_service_pb.js";
import { type ChatMessage, ChatMessageSchema, ChatRole } from "./gen/hotgraph/v1/generation_pb.js";
import { type Graph, type GraphEvent } from "./gen/hotgraph/v1/graph_pb.js";
import { GraphService, type ListGraphsRequestSchema } from "./gen/hotgraph/v1/graph_service_pb.js";
import {
  CompleteRequestSchema,
  type CompleteResponse,
  GenerateRequestSchema,
  InferenceService,
} from "./gen/hotgraph/v1/inference_service_pb.js";
import { type Model } from "./gen/hotgraph/v1/model_pb.js";
import { type GenerateInit, type GenerateOptions, Generation } from "./generation.js";
import { channelCredentials, channelOptions, checkOptions, checkTimeout, type ClientOptions, DEFAULT_TARGET } from "./options.js";
import { DEFAULT_RESUME_POLICY, type Resume, type ResumePolicy } from "./progress.js";
import { callBytes, type CallContext, type CallOptions, makeStub, type Stub } from "./stub.js";

/** A connection to a daemon. Calls share it. Its errors are HotgraphErrors. */
export class Client implements Disposable {
  readonly inference: Stub<typeof InferenceService>;
  readonly graphCache: Stub<typeof GraphService>;
  readonly admin: Stub<typeof AdminService>;
  readonly health: Stub<typeof HealthService>;

  readonly #context: CallContext;
  readonly #closing = new AbortController();
  readonly #resume: Resume;
  readonly #policy: ResumePolicy;

  /**
   * It connects with the first call. target: unix:PATH, HOST:PORT, ipv4:10.0.0.1:50051,10.0.0.2:50051 or any other name that
   * gRPC resolves. Throws RangeError for what cannot work or is not safe.
   */
  constructor(
    readonly target: string = DEFAULT_TARGET,
    options: ClientOptions = {},
  ) {
    checkOptions(target, options);
    const channel = new Channel(target, channelCredentials(options.tls), channelOptions(target, options));
    this.#context = {
      channel,
      token: options.token,
      clientId: options.clientId ?? "",
      waitForReady: options.waitForReady ?? false,
      timeoutMs: options.timeoutMs,
      closed: this.#closing.signal,
    };
    this.#resume = options.resume ?? "repeatable";
    this.#policy = { ...DEFAULT_RESUME_POLICY, ...options.resumePolicy };
    this.inference = makeStub(this.#context, InferenceService);
    this.graphCache = makeStub(this.#context, GraphService);
    this.admin = makeStub(this.#context, AdminService);
    this.health = makeStub(this.#context, HealthService);
  }

  /** Ends every call and the connection. */
  close(): void {
    this.#closing.abort(new Error("the client was closed"));
    this.#context.channel.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Starts a generation. Throws RangeError for a timeout that is none, HotgraphError for a request that cannot be sent. */
  generate(request: GenerateInit, options: GenerateOptions = {}): Generation {
    const timeoutMs = options.timeoutMs ?? this.#context.timeoutMs;
    checkTimeout(timeoutMs);
    if (this.#closing.signal.aborted) throw new HotgraphError(status.CANCELLED, "the client was closed");
    const resume = options.resume ?? this.#resume;
    const policy = { ...this.#policy, ...options.resumePolicy };
    // Its own bytes, so that a caller who changes the request changes nothing that is under way.
    const own = fromBinary(GenerateRequestSchema, packed(request));
    return new Generation(this.#context, own, resume, policy, { ...options, timeoutMs });
  }

  /**
   * Generates and answers once, with all of it. It is one unary call, which gRPC sends again when the server is not reached;
   * `generate(...).result()` goes on after a lost server as well.
   */
  async complete(request: GenerateInit, options?: CallOptions): Promise<CompleteResponse> {
    return await this.inference.complete(fromBinary(CompleteRequestSchema, packed(request)), options); // the same field by field
  }

  /** The models that can be asked for, of all pages. */
  async *allModels(options?: CallOptions): AsyncGenerator<Model, void, undefined> {
    yield* pages(async (pageToken) => {
      const page = await this.inference.listModels({ pageToken }, options);
      return [page.models, page.nextPageToken];
    });
  }

  /** The entries of the graph cache in one of the states, or all, most hits first. pageSize is how many come at once. */
  async *allGraphs(
    request: MessageInitShape<typeof ListGraphsRequestSchema> = {},
    options?: CallOptions,
  ): AsyncGenerator<Graph, void, undefined> {
    const { pageSize = 0, states = [] } = request;
    yield* pages(async (pageToken) => {
      const page = await this.graphCache.listGraphs({ pageSize, states, pageToken }, options);
      return [page.graphs, page.nextPageToken];
    });
  }

  /** Those who called since the daemon's start. */
  async *allClients(options?: CallOptions): AsyncGenerator<ClientInfo, void, undefined> {
    yield* pages(async (pageToken) => {
      const page = await this.admin.listClients({ pageToken, pageSize: 1000 }, options);
      return [page.clients, page.nextPageToken];
    });
  }

  /**
   * The events of the graph cache as they happen, until the loop is left. after: kept events after this sequence number first,
   * 0n for all; undefined: only what happens from now on. A watch that lost its server throws; watch again after the last
   * sequence number.
   */
  async *watchGraphs(after?: bigint, options?: CallOptions): AsyncGenerator<GraphEvent, void, undefined> {
    const request = after === undefined ? {} : { afterSequence: after };
    for await (const { event } of this.graphCache.watchGraphs(request, options)) if (event) yield event;
  }

  /** The health now, and again whenever it changes: of the daemon (""), of one service, or of "hotgraph.warm". */
  async *watchHealth(
    service = "",
    options?: CallOptions,
  ): AsyncGenerator<HealthCheckResponse_ServingStatus, void, undefined> {
    for await (const answer of this.health.watch({ service }, options)) yield answer.status;
  }

  /** A unary call that this package does not know: bytes in, bytes out. path: /package.Service/Method. */
  async callBytes(path: string, request: Uint8Array, options: CallOptions = {}): Promise<Uint8Array> {
    checkTimeout(options.timeoutMs);
    const timeoutMs = options.timeoutMs ?? this.#context.timeoutMs;
    return await callBytes(this.#context, path, request, "", { ...options, timeoutMs });
  }
}

function packed(request: GenerateInit): Uint8Array {
  try {
    return toBinary(GenerateRequestSchema, create(GenerateRequestSchema, request));
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new HotgraphError(status.INVALID_ARGUMENT, message, { cause: error });
  }
}

async function* pages<T>(list: (token: string) => Promise<[T[], string]>): AsyncGenerator<T, void, undefined> {
  let token = "";
  do {
    const [items, next] = await list(token);
    yield* items;
    token = next;
  } while (token);
}

/** A prompt to continue. */
export function text(value: string): { case: "text"; value: string } {
  return { case: "text", value };
}

/** A prompt of token ids, taken as they are. */
export function tokenIds(...ids: number[]): { case: "tokenIds"; value: { ids: number[] } } {
  return { case: "tokenIds", value: { ids } };
}

/** A conversation, oldest turn first. */
export function chat(...messages: ChatMessage[]): { case: "chat"; value: { messages: ChatMessage[] } } {
  return { case: "chat", value: { messages } };
}

/** A turn with instructions for the whole conversation. */
export const system = (content: string): ChatMessage => create(ChatMessageSchema, { role: ChatRole.SYSTEM, content });

/** A turn of who asks. */
export const user = (content: string): ChatMessage => create(ChatMessageSchema, { role: ChatRole.USER, content });

/** A turn of the model. */
export const assistant = (content: string): ChatMessage =>
  create(ChatMessageSchema, { role: ChatRole.ASSISTANT, content });
