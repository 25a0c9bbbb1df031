package dev.hotgraph.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RequestInfo;
import com.google.rpc.ResourceInfo;
import com.google.rpc.RetryInfo;
import dev.hotgraph.v1.ErrorReason;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusException;
import io.grpc.StatusRuntimeException;
import java.io.Serializable;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/**
 * Why a call failed: its gRPC status and the google.rpc details in it. It is a {@link StatusRuntimeException}, so that
 * code which knows gRPC alone catches it too. What the generated stubs throw becomes one by {@link #from}.
 */
public class HotgraphException extends StatusRuntimeException {
    private static final long serialVersionUID = 1;

    private static final String DOMAIN = "hotgraph";
    private static final Metadata.Key<byte[]> DETAILS_KEY =
            Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

    /** One wrong field of a request: its path as in the contract, and what is wrong with it. */
    public record Violation(String field, String description) implements Serializable {}

    /** What an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name. */
    public record Resource(String type, String name) implements Serializable {}

    /** What the details told; what is absent is empty or null. */
    private static final class Details implements Serializable {
        private static final long serialVersionUID = 1;

        String reasonName = "";
        ErrorReason reason = ErrorReason.ERROR_REASON_UNSPECIFIED;
        Map<String, String> metadata = Map.of();
        List<Violation> violations = List.of();
        Duration retryAfter;
        Resource resource;
        String requestId = "";
    }

    private final Details details;

    private HotgraphException(Status status, Metadata trailers, Details details) {
        super(status, trailers);
        this.details = details;
    }

    /** The same error again, as the cause of a more special one. */
    HotgraphException(HotgraphException error) {
        this(error.getStatus().withCause(error), error.getTrailers(), error.details);
    }

    /** An error that this side found. */
    static HotgraphException of(Status.Code code, String message) {
        return of(code.toStatus().withDescription(message), null);
    }

    /** An error that this side found in the middle of the request with this id. */
    static HotgraphException of(Status.Code code, String message, String requestId) {
        Details details = new Details();
        details.requestId = requestId;
        return new HotgraphException(code.toStatus().withDescription(message), null, details);
    }

    /** The error of a call that ended with this status; trailers may be null. */
    static HotgraphException of(Status status, Metadata trailers) {
        return new HotgraphException(status, trailers, readDetails(trailers));
    }

    /** The error that gRPC's stands for: what the generated stubs throw. Anything else becomes UNKNOWN. */
    public static HotgraphException from(Throwable error) {
        for (Throwable cause = error; cause != null; cause = cause.getCause()) {
            if (cause instanceof HotgraphException typed) {
                return typed;
            }
            if (cause instanceof StatusRuntimeException failure) {
                return of(failure.getStatus(), failure.getTrailers());
            }
            if (cause instanceof StatusException failure) {
                return of(failure.getStatus(), failure.getTrailers());
            }
        }
        return of(Status.UNKNOWN.withDescription(String.valueOf(error)).withCause(error), null);
    }

    /** The code with the reason, where there is one, and the description. */
    @Override
    public String getMessage() {
        String reason = details.reasonName.isEmpty() ? "" : " (" + details.reasonName + ")";
        return code() + reason + ": " + description();
    }

    /** The gRPC status code. */
    public Status.Code code() {
        return getStatus().getCode();
    }

    /** The message as the server sent it, for people; empty when there is none. */
    public String description() {
        String text = getStatus().getDescription();
        return text == null ? "" : text;
    }

    /** What can be done about it. */
    public ErrorKind kind() {
        return ErrorKind.of(details.reason, code());
    }

    /** Whether the same request may succeed later or elsewhere. */
    public boolean isRetryable() {
        return kind() == ErrorKind.RETRYABLE;
    }

    /**
     * Why, for programs. ERROR_REASON_UNSPECIFIED when the status is not the daemon's own word but a proxy's or gRPC's,
     * and for a reason that this version does not know, which {@link #reasonName} tells.
     */
    public ErrorReason reason() {
        return details.reason;
    }

    /** The reason as it was sent; empty when none was. */
    public String reasonName() {
        return details.reasonName;
    }

    /** The numbers behind the message, as text. */
    public Map<String, String> metadata() {
        return details.metadata;
    }

    /** All wrong fields. */
    public List<Violation> violations() {
        return details.violations;
    }

    /** When to come back. */
    public Optional<Duration> retryAfter() {
        return Optional.ofNullable(details.retryAfter);
    }

    /** What was not found. */
    public Optional<Resource> resource() {
        return Optional.ofNullable(details.resource);
    }

    /** The request's id as the server knows it; empty when it was not told. */
    public String requestId() {
        return details.requestId;
    }

    /** Finds an internal error in the server's log; else it is empty. */
    public String incident() {
        return details.metadata.getOrDefault("incident", "");
    }

    /** Reads the details. One that cannot be read counts as absent. */
    private static Details readDetails(Metadata trailers) {
        Details found = new Details();
        byte[] packed = trailers == null ? null : trailers.get(DETAILS_KEY);
        if (packed == null) {
            return found;
        }
        List<Any> all;
        try {
            all = com.google.rpc.Status.parseFrom(packed).getDetailsList();
        } catch (InvalidProtocolBufferException unreadable) {
            return found;
        }
        for (Any detail : all) {
            try {
                readDetail(detail, found);
            } catch (InvalidProtocolBufferException unreadable) {
                continue; // the others may tell enough
            }
        }
        return found;
    }

    private static void readDetail(Any detail, Details found) throws InvalidProtocolBufferException {
        if (detail.is(ErrorInfo.class)) {
            ErrorInfo info = detail.unpack(ErrorInfo.class);
            if (info.getDomain().equals(DOMAIN)) {
                found.reasonName = info.getReason();
                found.reason = reasonNamed(info.getReason());
                found.metadata = Map.copyOf(info.getMetadataMap());
            }
        } else if (detail.is(BadRequest.class)) {
            List<Violation> violations = new ArrayList<>();
            for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
                violations.add(new Violation(violation.getField(), violation.getDescription()));
            }
            found.violations = List.copyOf(violations);
        } else if (detail.is(RetryInfo.class)) {
            Duration delay = Times.fromProto(detail.unpack(RetryInfo.class).getRetryDelay());
            found.retryAfter = delay.isNegative() ? Duration.ZERO : delay;
        } else if (detail.is(ResourceInfo.class)) {
            ResourceInfo info = detail.unpack(ResourceInfo.class);
            found.resource = new Resource(info.getResourceType(), info.getResourceName());
        } else if (detail.is(RequestInfo.class)) {
            found.requestId = detail.unpack(RequestInfo.class).getRequestId();
        }
    }

    private static ErrorReason reasonNamed(String name) {
        var known = ErrorReason.getDescriptor().findValueByName("ERROR_REASON_" + name);
        return known == null ? ErrorReason.ERROR_REASON_UNSPECIFIED : ErrorReason.valueOf(known);
    }
}
