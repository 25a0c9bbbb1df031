// The error of a failed call: its gRPC status and the google.rpc details in it. The only place that reads details.

import { fromBinary } from "@bufbuild/protobuf";
import { type GenMessage } from "@bufbuild/protobuf/codegenv2";
import { type Message } from "@bufbuild/protobuf";
import { anyUnpack, durationMs } from "@bufbuild/protobuf/wkt";
import { type Metadata, type ServiceError, status } from "@grpc/grpc-js";

import {
  BadRequestSchema,
  ErrorInfoSchema,
  RequestInfoSchema,
  ResourceInfoSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb.js";
import { type Status, StatusSchema } from "./gen/google/rpc/status_pb.js";
import { ErrorReason } from "./gen/hotgraph/v1/error_reason_pb.js";
import { type Choice, type Started } from "./gen/hotgraph/v1/generation_pb.js";

const DOMAIN = "hotgraph";
const DETAILS_KEY = "grpc-status-details-bin";

/**
 * What a caller can do about an error. `request`: mend the request; sending it again changes nothing. `retryable`: it may pass
 * later, or elsewhere. `deadline`: out of time. `cancelled`. `exhausted`: refused by the transport or a proxy, such as a message
 * over a size limit. `internal`: a mistake of the server's or the connection's; `incident` finds it in the server's log.
 */
export type ErrorKind = "internal" | "request" | "retryable" | "deadline" | "cancelled" | "exhausted";

/** One wrong field of a request: its path as in the contract, and what is wrong with it. */
export interface Violation {
  readonly field: string;
  readonly description: string;
}

/** What an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name. */
export interface Resource {
  readonly type: string;
  readonly name: string;
}

/** What the details tell; all optional, since a proxy's or gRPC's own status has none. */
export interface ErrorDetails {
  readonly reasonName?: string;
  readonly metadata?: Readonly<Record<string, string>>;
  readonly violations?: readonly Violation[];
  readonly retryAfterMs?: number;
  readonly resource?: Resource;
  readonly requestId?: string;
  readonly cause?: unknown;
}

/** Why a call failed. */
export class HotgraphError extends Error {
  override readonly name: string = "HotgraphError";
  /** The gRPC status code. */
  readonly code: status;
  /** What the message says without code and reason. */
  readonly description: string;
  /** The reason as it was sent; empty when the status is not the daemon's own word but a proxy's or gRPC's. */
  readonly reasonName: string;
  /** The numbers behind the message, as text. */
  readonly metadata: Readonly<Record<string, string>>;
  /** All wrong fields. */
  readonly violations: readonly Violation[];
  /** When to come back, in milliseconds. */
  readonly retryAfterMs: number | undefined;
  /** What was not found. */
  readonly resource: Resource | undefined;
  /** The request's id, as the server knows it. */
  readonly requestId: string;

  constructor(code: status, description: string, details: ErrorDetails = {}) {
    const reason = details.reasonName ? ` (${details.reasonName})` : "";
    super(`${status[code] ?? code}${reason}: ${description}`, "cause" in details ? { cause: details.cause } : undefined);
    this.code = code;
    this.description = description;
    this.reasonName = details.reasonName ?? "";
    this.metadata = details.metadata ?? {};
    this.violations = details.violations ?? [];
    this.retryAfterMs = details.retryAfterMs;
    this.resource = details.resource;
    this.requestId = details.requestId ?? "";
  }

  /** Why, for programs. Unspecified without a reason, and for one that this version does not know. */
  get reason(): ErrorReason {
    const number: unknown = Object.hasOwn(ErrorReason, this.reasonName)
      ? ErrorReason[this.reasonName as keyof typeof ErrorReason]
      : undefined;
    return typeof number === "number" ? number : ErrorReason.UNSPECIFIED;
  }

  /** What can be done about it: by the reason, and by the code when there is none. */
  get kind(): ErrorKind {
    return KIND_BY_REASON.get(this.reason) ?? KIND_BY_CODE.get(this.code) ?? "internal";
  }

  /** Whether the same request may succeed later or elsewhere. */
  get isRetryable(): boolean {
    return this.kind === "retryable";
  }

  /** Finds an internal error in the server's log. */
  get incident(): string | undefined {
    return this.metadata["incident"];
  }
}

/** A server that was lost in the middle of an answer, when going on elsewhere was off, not possible or in vain. */
export class StreamLostError extends HotgraphError {
  override readonly name = "StreamLostError";

  constructor(
    code: status,
    description: string,
    details: ErrorDetails,
    /** What came until then. */
    readonly started: Started | undefined,
    readonly choices: readonly Choice[],
  ) {
    super(code, description, details);
  }
}

export const KIND_BY_REASON: ReadonlyMap<ErrorReason, ErrorKind> = new Map<ErrorReason, ErrorKind>([
  [ErrorReason.INVALID_REQUEST, "request"],
  [ErrorReason.MALFORMED_MESSAGE, "request"],
  [ErrorReason.CONTEXT_LENGTH, "request"],
  [ErrorReason.MODEL_NOT_FOUND, "request"],
  [ErrorReason.GRAPH_NOT_FOUND, "request"],
  [ErrorReason.SERVICE_NOT_FOUND, "request"],
  [ErrorReason.DUPLICATE_REQUEST, "request"],
  [ErrorReason.NOT_POSSIBLE, "request"],
  [ErrorReason.EVENTS_GONE, "request"],
  [ErrorReason.UNAUTHENTICATED, "request"],
  [ErrorReason.PERMISSION_DENIED, "request"],
  [ErrorReason.MESSAGE_TOO_LARGE, "request"],
  [ErrorReason.QUEUE_FULL, "retryable"],
  [ErrorReason.GRAPH_NOT_READY, "retryable"],
  [ErrorReason.LOADING, "retryable"],
  [ErrorReason.DRAINING, "retryable"],
  [ErrorReason.ENGINE_FAILED, "retryable"],
  [ErrorReason.DEADLINE_EXCEEDED, "deadline"],
  [ErrorReason.SERVER_TIME_LIMIT, "deadline"],
  [ErrorReason.CANCELLED, "cancelled"],
  [ErrorReason.INTERNAL, "internal"],
]);

// Codes that are not here are internal.
const KIND_BY_CODE: ReadonlyMap<status, ErrorKind> = new Map<status, ErrorKind>([
  [status.INVALID_ARGUMENT, "request"],
  [status.NOT_FOUND, "request"],
  [status.ALREADY_EXISTS, "request"],
  [status.FAILED_PRECONDITION, "request"],
  [status.UNIMPLEMENTED, "request"],
  [status.OUT_OF_RANGE, "request"],
  [status.UNAUTHENTICATED, "request"],
  [status.PERMISSION_DENIED, "request"],
  [status.RESOURCE_EXHAUSTED, "exhausted"],
  [status.UNAVAILABLE, "retryable"],
  [status.ABORTED, "retryable"],
  [status.DEADLINE_EXCEEDED, "deadline"],
  [status.CANCELLED, "cancelled"],
]);

/** The error that gRPC's stands for. One that is typed already comes back as it is. */
export function fromError(error: unknown): HotgraphError {
  if (error instanceof HotgraphError) return error;
  if (!isServiceError(error)) {
    return new HotgraphError(status.UNKNOWN, error instanceof Error ? error.message : String(error), { cause: error });
  }
  const packed = packedStatus(error.metadata);
  const details: { -readonly [key in keyof ErrorDetails]: ErrorDetails[key] } = { cause: error };
  for (const any of packed?.details ?? []) {
    const unpack = <T extends Message>(schema: GenMessage<T>): T | undefined => anyUnpack(any, schema) as T | undefined;
    const info = unpack(ErrorInfoSchema);
    if (info?.domain === DOMAIN) {
      details.reasonName = info.reason;
      details.metadata = info.metadata;
    }
    const request = unpack(BadRequestSchema);
    if (request) details.violations = request.fieldViolations.map(({ field, description }) => ({ field, description }));
    const retry = unpack(RetryInfoSchema);
    if (retry) details.retryAfterMs = retry.retryDelay ? Math.max(durationMs(retry.retryDelay), 0) : 0;
    const resource = unpack(ResourceInfoSchema);
    if (resource) details.resource = { type: resource.resourceType, name: resource.resourceName };
    const id = unpack(RequestInfoSchema);
    if (id) details.requestId = id.requestId;
  }
  // The header's text went through an encoding of its own; that of the details did not.
  return new HotgraphError(error.code, packed?.message || error.details, details);
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && typeof error.code === "number" && "metadata" in error;
}

/** None at all when a byte of it is wrong: the code alone must then do. */
function packedStatus(metadata: Metadata): Status | undefined {
  const [value] = metadata.get(DETAILS_KEY);
  if (!(value instanceof Uint8Array)) return undefined;
  try {
    const read = fromBinary(StatusSchema, value);
    for (const any of read.details) {
      for (const schema of [ErrorInfoSchema, BadRequestSchema, RetryInfoSchema, ResourceInfoSchema, RequestInfoSchema]) {
        anyUnpack(any, schema);
      }
    }
    return read;
  } catch {
    return undefined;
  }
}
