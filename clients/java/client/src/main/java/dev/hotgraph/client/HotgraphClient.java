package dev.hotgraph.client;

import com.google.protobuf.InvalidProtocolBufferException;
import dev.hotgraph.v1.AdminServiceGrpc;
import dev.hotgraph.v1.Client;
import dev.hotgraph.v1.CompleteRequest;
import dev.hotgraph.v1.CompleteResponse;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.Graph;
import dev.hotgraph.v1.GraphEvent;
import dev.hotgraph.v1.GraphServiceGrpc;
import dev.hotgraph.v1.InferenceServiceGrpc;
import dev.hotgraph.v1.ListClientsRequest;
import dev.hotgraph.v1.ListGraphsRequest;
import dev.hotgraph.v1.ListModelsRequest;
import dev.hotgraph.v1.Model;
import dev.hotgraph.v1.WatchGraphsRequest;
import dev.hotgraph.v1.WatchGraphsResponse;
import io.grpc.CallOptions;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc;
import java.io.IOException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Objects;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * A connection to a daemon, made with the first call. Threads share it. Deadlines and cancellation are those of each
 * call or of the current {@link io.grpc.Context}.
 *
 * <p>Unsigned numbers of the contract are signed ones here, as protobuf does in Java: {@link Long#toUnsignedString}
 * shows a seed as the server does.
 */
public final class HotgraphClient implements AutoCloseable {
    /** Where the daemon listens when it is told nothing. */
    public static final String DEFAULT_TARGET = "unix:hotgraph.sock";

    /** That of this package; the user agent tells it. */
    public static final String VERSION = "0.1.0";

    // A long completion with log-probabilities is larger than gRPC's default of 4 MiB.
    private static final int MAX_RECEIVE_BYTES = 64 << 20;
    private static final int MAX_PAGE_SIZE = 1000;
    private static final long CLOSE_SECONDS = 5;

    private final ManagedChannel channel;
    private final ScheduledExecutorService timer;
    private final OpenCalls openCalls = new OpenCalls();
    private final Resume resume;
    private final ResumePolicy resumePolicy;

    private HotgraphClient(ManagedChannel channel, Resume resume, ResumePolicy resumePolicy) {
        this.channel = channel;
        this.resume = resume;
        this.resumePolicy = resumePolicy;
        this.timer = Executors.newSingleThreadScheduledExecutor(task -> {
            Thread thread = new Thread(task, "hotgraph-reconnect");
            thread.setDaemon(true);
            return thread;
        });
        new Reconnector(channel, timer).watch();
    }

    /** A client with all the defaults. See {@link Builder#build}. */
    public static HotgraphClient connect(String target) {
        return builder(target).build();
    }

    /**
     * What makes a client. target: {@code unix:PATH}, {@code HOST:PORT}, {@code ipv4:10.0.0.1:50051,10.0.0.2:50051} or
     * any other name that gRPC resolves.
     */
    public static Builder builder(String target) {
        return new Builder(target);
    }

    /** The stub of the inference service. What it throws becomes typed by {@link HotgraphException#from}. */
    public InferenceServiceGrpc.InferenceServiceBlockingStub inference() {
        return InferenceServiceGrpc.newBlockingStub(channel);
    }

    /** The stub of the graph cache's service. */
    public GraphServiceGrpc.GraphServiceBlockingStub graphs() {
        return GraphServiceGrpc.newBlockingStub(channel);
    }

    /** The stub of the daemon's own service. */
    public AdminServiceGrpc.AdminServiceBlockingStub admin() {
        return AdminServiceGrpc.newBlockingStub(channel);
    }

    /** The stub of gRPC's health service. */
    public HealthGrpc.HealthBlockingStub health() {
        return HealthGrpc.newBlockingStub(channel);
    }

    /** The connection, for stubs of other kinds and calls that this package does not know. */
    public ManagedChannel channel() {
        return channel;
    }

    /** Starts a generation, as the client was told. */
    public Generation generate(GenerateRequest request) {
        return generate(request, GenerateOptions.DEFAULT);
    }

    /** Starts a generation. It must be read to its end or closed. */
    public Generation generate(GenerateRequest request, GenerateOptions options) {
        return new Generation(
                channel,
                CallSettings.withSessionKey(CallOptions.DEFAULT, request.getSessionKey()),
                openCalls,
                request,
                options.resume().orElse(resume),
                options.resumePolicy().orElse(resumePolicy),
                options.timeout());
    }

    /**
     * Generates and answers once, with all of it. It is one unary call, which gRPC sends again when the server is not
     * reached; {@code generate(request).result()} goes on after a lost server as well.
     */
    public CompleteResponse complete(GenerateRequest request) {
        return complete(request, inference());
    }

    /** The same with a deadline, so long from now. */
    public CompleteResponse complete(GenerateRequest request, Duration timeout) {
        return complete(request, inference().withDeadlineAfter(timeout));
    }

    private static CompleteResponse complete(
            GenerateRequest request, InferenceServiceGrpc.InferenceServiceBlockingStub stub) {
        CompleteRequest unary;
        try {
            unary = CompleteRequest.parseFrom(request.toByteString()); // the same field by field
        } catch (InvalidProtocolBufferException cannotBe) {
            throw new IllegalStateException("the two requests of the contract have become different", cannotBe);
        }
        CallOptions options = CallSettings.withSessionKey(stub.getCallOptions(), unary.getSessionKey());
        return typed(() -> io.grpc.stub.ClientCalls.blockingUnaryCall(
                stub.getChannel(), InferenceServiceGrpc.getCompleteMethod(), options, unary));
    }

    /** The models that can be asked for, of all pages. */
    public Iterable<Model> allModels() {
        return new Pages<>(token -> {
            var page = inference()
                    .listModels(
                            ListModelsRequest.newBuilder().setPageToken(token).build());
            return new Pages.Page<>(page.getModelsList(), page.getNextPageToken());
        });
    }

    /**
     * The entries of the graph cache in one of the states, or all, most hits first. The request's page size is how many
     * come at once.
     */
    public Iterable<Graph> allGraphs(ListGraphsRequest request) {
        return new Pages<>(token -> {
            var page =
                    graphs().listGraphs(request.toBuilder().setPageToken(token).build());
            return new Pages.Page<>(page.getGraphsList(), page.getNextPageToken());
        });
    }

    /** Those who called since the daemon's start. */
    public Iterable<Client> allClients() {
        return new Pages<>(token -> {
            var page = admin().listClients(ListClientsRequest.newBuilder()
                    .setPageToken(token)
                    .setPageSize(MAX_PAGE_SIZE)
                    .build());
            return new Pages.Page<>(page.getClientsList(), page.getNextPageToken());
        });
    }

    /**
     * The events of the graph cache from now on. A watch that lost its server throws; watch again after the last
     * sequence number.
     */
    public Watch<GraphEvent> watchGraphs() {
        return watchGraphs(WatchGraphsRequest.getDefaultInstance());
    }

    /** The same, but first the kept events after this sequence number; 0 for all. */
    public Watch<GraphEvent> watchGraphs(long afterSequence) {
        return watchGraphs(
                WatchGraphsRequest.newBuilder().setAfterSequence(afterSequence).build());
    }

    private Watch<GraphEvent> watchGraphs(WatchGraphsRequest request) {
        return new Watch<>(
                channel, openCalls, GraphServiceGrpc.getWatchGraphsMethod(), request, WatchGraphsResponse::getEvent);
    }

    /** The health now, and again whenever it changes: of the daemon (""), of one service, or of "hotgraph.warm". */
    public Watch<ServingStatus> watchHealth(String service) {
        HealthCheckRequest request =
                HealthCheckRequest.newBuilder().setService(service).build();
        return new Watch<>(channel, openCalls, HealthGrpc.getWatchMethod(), request, HealthCheckResponse::getStatus);
    }

    /** Ends every call and the connection. */
    @Override
    public void close() {
        openCalls.endAll(); // first: a generation would take the end of the connection for a lost server
        channel.shutdownNow();
        timer.shutdownNow();
        try {
            channel.awaitTermination(CLOSE_SECONDS, TimeUnit.SECONDS);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    /** What the call returns, or its error as this package's. */
    static <T> T typed(Supplier<T> call) {
        try {
            return call.get();
        } catch (StatusRuntimeException error) {
            throw HotgraphException.from(error);
        }
    }

    /** What a client is told about its connection. */
    public static final class Builder {
        private final String target;
        private ChannelCredentials credentials = InsecureChannelCredentials.create();
        private Supplier<String> token;
        private boolean isInsecureTokenAllowed;
        private String clientId = "";
        private int maxAttempts = 4;
        private boolean isWaiting;
        private Duration keepalive = Duration.ofSeconds(10);
        private Duration keepaliveTimeout = Duration.ofSeconds(5);
        private Resume resume = Resume.REPEATABLE;
        private ResumePolicy resumePolicy = ResumePolicy.DEFAULT;
        private Consumer<ManagedChannelBuilder<?>> more = channel -> {};

        private Builder(String target) {
            this.target = Objects.requireNonNull(target, "target");
        }

        /** Encrypts, trusting the system's roots. */
        public Builder tls() {
            return credentials(TlsChannelCredentials.create());
        }

        /** Encrypts, trusting the certificates of this PEM file alone. */
        public Builder tls(Path rootCertificates) throws IOException {
            return credentials(TlsChannelCredentials.newBuilder()
                    .trustManager(rootCertificates.toFile())
                    .build());
        }

        /** Mutual TLS: the same, and shows this certificate chain with this key (PEM, PKCS 8). */
        public Builder tls(Path rootCertificates, Path certificateChain, Path privateKey) throws IOException {
            return credentials(TlsChannelCredentials.newBuilder()
                    .trustManager(rootCertificates.toFile())
                    .keyManager(certificateChain.toFile(), privateKey.toFile())
                    .build());
        }

        /** Connects with gRPC credentials of one's own. */
        public Builder credentials(ChannelCredentials value) {
            credentials = Objects.requireNonNull(value, "credentials");
            return this;
        }

        /** Sends {@code authorization: bearer TOKEN} with every call. Not over plain TCP to another host: see build. */
        public Builder token(String value) {
            Objects.requireNonNull(value, "token");
            return token(() -> value);
        }

        /** Asks for the token before each call; one that throws fails the call as UNAUTHENTICATED. */
        public Builder token(Supplier<String> source) {
            token = Objects.requireNonNull(source, "source");
            return this;
        }

        /** Lets a token go over plain TCP to another host, for a path that is safe by other means. */
        public Builder allowInsecureToken() {
            isInsecureTokenAllowed = true;
            return this;
        }

        /** Names the caller to the daemon: AdminService.ListClients shows it. */
        public Builder clientId(String value) {
            clientId = Objects.requireNonNull(value, "clientId");
            return this;
        }

        /** Bounds how often gRPC sends a call that was not answered yet, 1 to 5 in all; 4 by default. */
        public Builder maxAttempts(int value) {
            maxAttempts = value;
            return this;
        }

        /** Lets calls wait for a server, up to their deadline, instead of failing at once when there is none. */
        public Builder waitForReady() {
            isWaiting = true;
            return this;
        }

        /**
         * Pings after so much silence during calls; a server that does not answer in time is dead. gRPC takes no less
         * than ten seconds, which is the default, with a timeout of five.
         */
        public Builder keepalive(Duration silence, Duration timeout) {
            keepalive = Objects.requireNonNull(silence, "silence");
            keepaliveTimeout = Objects.requireNonNull(timeout, "timeout");
            return this;
        }

        /** What a generation does when its server is lost; REPEATABLE by default. */
        public Builder resume(Resume value) {
            resume = Objects.requireNonNull(value, "resume");
            return this;
        }

        /** How far a generation goes after a lost server. */
        public Builder resumePolicy(ResumePolicy value) {
            resumePolicy = Objects.requireNonNull(value, "resumePolicy");
            return this;
        }

        /** Hands the channel to be to something that sets what gRPC knows besides; it wins over ours. */
        public Builder configure(Consumer<ManagedChannelBuilder<?>> setter) {
            more = more.andThen(setter);
            return this;
        }

        /**
         * The client; it connects with the first call. Throws IllegalArgumentException for what cannot work, and for a
         * token that would go over plain TCP to another host.
         */
        public HotgraphClient build() {
            check();
            ManagedChannelBuilder<?> channel = Grpc.newChannelBuilder(Target.forGrpc(target), credentials)
                    .userAgent("hotgraph-java/" + VERSION)
                    .maxInboundMessageSize(MAX_RECEIVE_BYTES)
                    .defaultServiceConfig(ServiceConfig.of(maxAttempts))
                    .keepAliveTime(Times.nanosOf(keepalive), TimeUnit.NANOSECONDS)
                    .keepAliveTimeout(Times.nanosOf(keepaliveTimeout), TimeUnit.NANOSECONDS)
                    .intercept(new CallSettings(token, clientId, isWaiting));
            if (Target.isUnix(target)) {
                channel.overrideAuthority("localhost"); // as other gRPC libraries do; a path is no authority
            }
            more.accept(channel);
            return new HotgraphClient(channel.build(), resume, resumePolicy);
        }

        private void check() {
            boolean isPlain = credentials instanceof InsecureChannelCredentials;
            if (target.isEmpty()) {
                throw new IllegalArgumentException("the target is empty");
            }
            if (maxAttempts < 1 || maxAttempts > ServiceConfig.MAX_ATTEMPTS_LIMIT) {
                throw new IllegalArgumentException(
                        "attempts must be 1 to " + ServiceConfig.MAX_ATTEMPTS_LIMIT + ", not " + maxAttempts);
            }
            if (keepalive.isNegative()
                    || keepalive.isZero()
                    || keepaliveTimeout.isNegative()
                    || keepaliveTimeout.isZero()) {
                throw new IllegalArgumentException("keepalive and its timeout must be positive");
            }
            if (token != null && isPlain && !isInsecureTokenAllowed && !Target.isLocal(target)) {
                throw new IllegalArgumentException("a token would go to " + target
                        + " in plain text: use TLS, or allowInsecureToken when the path is safe");
            }
        }
    }
}
