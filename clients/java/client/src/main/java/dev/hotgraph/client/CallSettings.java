package dev.hotgraph.client;

import io.grpc.CallCredentials;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.concurrent.Executor;
import java.util.function.Supplier;

/** What every call carries: token, client id, session key. That a token goes only where it may was checked before. */
final class CallSettings implements ClientInterceptor {
    private static final CallOptions.Key<String> SESSION_KEY = CallOptions.Key.create("hotgraph session key");
    private static final Metadata.Key<String> AUTHORIZATION = ascii("authorization");
    private static final Metadata.Key<String> CLIENT_ID = ascii("x-client-id");
    private static final Metadata.Key<String> SESSION_ID = ascii("session_id");

    private final CallCredentials token; // or null
    private final String clientId;
    private final boolean isWaiting;

    /**
     * token: asked before each call, or null; clientId: empty for none; isWaiting: for a server, up to the deadline.
     */
    CallSettings(Supplier<String> token, String clientId, boolean isWaiting) {
        this.token = token == null ? null : new Token(token);
        this.clientId = clientId;
        this.isWaiting = isWaiting;
    }

    private static Metadata.Key<String> ascii(String name) {
        return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
    }

    /** Options of a call whose request has this session key, which may be empty. */
    static CallOptions withSessionKey(CallOptions options, String key) {
        return key.isEmpty() ? options : options.withOption(SESSION_KEY, sessionValue(key));
    }

    /** What a balancer hashes: the key, or its SHA-256 when no header may hold it. */
    static String sessionValue(String key) {
        boolean isPlain = key.strip().equals(key) && key.chars().allMatch(c -> c >= ' ' && c <= '~');
        if (isPlain) {
            return key;
        }
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            return HexFormat.of().formatHex(digest.digest(key.getBytes(StandardCharsets.UTF_8)));
        } catch (NoSuchAlgorithmException cannotBe) {
            throw new IllegalStateException("every Java has SHA-256", cannotBe);
        }
    }

    @Override
    public <Q, R> ClientCall<Q, R> interceptCall(MethodDescriptor<Q, R> method, CallOptions told, Channel next) {
        CallOptions options = isWaiting ? told.withWaitForReady() : told;
        if (token != null && options.getCredentials() == null) {
            options = options.withCallCredentials(token);
        }
        String sessionId = options.getOption(SESSION_KEY);
        return new ForwardingClientCall.SimpleForwardingClientCall<>(next.newCall(method, options)) {
            @Override
            public void start(Listener<R> listener, Metadata headers) {
                if (!clientId.isEmpty()) {
                    headers.put(CLIENT_ID, clientId);
                }
                if (sessionId != null) {
                    headers.put(SESSION_ID, sessionId);
                }
                super.start(listener, headers);
            }
        };
    }

    private static final class Token extends CallCredentials {
        private final Supplier<String> source;

        Token(Supplier<String> source) {
            this.source = source;
        }

        @Override
        public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
            executor.execute(
                    () -> { // the source may wait for something
                        Metadata headers = new Metadata();
                        try {
                            headers.put(AUTHORIZATION, "bearer " + source.get());
                        } catch (RuntimeException failure) {
                            applier.fail(Status.UNAUTHENTICATED
                                    .withDescription("no token could be had: " + failure.getMessage())
                                    .withCause(failure));
                            return;
                        }
                        applier.apply(headers);
                    });
        }
    }
}
