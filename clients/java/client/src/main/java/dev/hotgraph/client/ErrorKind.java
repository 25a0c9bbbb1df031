package dev.hotgraph.client;

import dev.hotgraph.v1.ErrorReason;
import io.grpc.Status;

/** What a caller can do about an error. */
public enum ErrorKind {
    /**
     * A mistake of the server's or the connection's; {@link HotgraphException#incident()} finds it in the server's log.
     */
    INTERNAL,
    /** Wants the request mended; sending it again changes nothing. */
    REQUEST,
    /** May pass: later, or elsewhere, not before {@link HotgraphException#retryAfter()}. */
    RETRYABLE,
    /** Out of time. */
    DEADLINE,
    /** Was cancelled. */
    CANCELLED,
    /** Refused by the transport or a proxy, such as a message over a size limit. */
    EXHAUSTED;

    /** By the reason, and by the code when there is none that this version knows. */
    static ErrorKind of(ErrorReason reason, Status.Code code) {
        return switch (reason) {
            case ERROR_REASON_INVALID_REQUEST,
                    ERROR_REASON_MALFORMED_MESSAGE,
                    ERROR_REASON_CONTEXT_LENGTH,
                    ERROR_REASON_MODEL_NOT_FOUND,
                    ERROR_REASON_GRAPH_NOT_FOUND,
                    ERROR_REASON_SERVICE_NOT_FOUND,
                    ERROR_REASON_DUPLICATE_REQUEST,
                    ERROR_REASON_NOT_POSSIBLE,
                    ERROR_REASON_EVENTS_GONE,
                    ERROR_REASON_UNAUTHENTICATED,
                    ERROR_REASON_PERMISSION_DENIED,
                    ERROR_REASON_MESSAGE_TOO_LARGE -> REQUEST;
            case ERROR_REASON_QUEUE_FULL,
                    ERROR_REASON_GRAPH_NOT_READY,
                    ERROR_REASON_LOADING,
                    ERROR_REASON_DRAINING,
                    ERROR_REASON_ENGINE_FAILED -> RETRYABLE;
            case ERROR_REASON_DEADLINE_EXCEEDED, ERROR_REASON_SERVER_TIME_LIMIT -> DEADLINE;
            case ERROR_REASON_CANCELLED -> CANCELLED;
            case ERROR_REASON_INTERNAL -> INTERNAL;
            case ERROR_REASON_UNSPECIFIED, UNRECOGNIZED -> of(code);
        };
    }

    private static ErrorKind of(Status.Code code) {
        return switch (code) {
            case INVALID_ARGUMENT,
                    NOT_FOUND,
                    ALREADY_EXISTS,
                    FAILED_PRECONDITION,
                    UNIMPLEMENTED,
                    OUT_OF_RANGE,
                    UNAUTHENTICATED,
                    PERMISSION_DENIED -> REQUEST;
            case RESOURCE_EXHAUSTED -> EXHAUSTED;
            case UNAVAILABLE, ABORTED -> RETRYABLE;
            case DEADLINE_EXCEEDED -> DEADLINE;
            case CANCELLED -> CANCELLED;
            default -> INTERNAL;
        };
    }
}
