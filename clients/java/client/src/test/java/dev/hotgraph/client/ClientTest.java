package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.hotgraph.v1.CompleteRequest;
import dev.hotgraph.v1.CompleteResponse;
import dev.hotgraph.v1.EvictGraphRequest;
import dev.hotgraph.v1.EvictGraphResponse;
import dev.hotgraph.v1.Finished;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.GenerateResponse;
import dev.hotgraph.v1.GetGraphRequest;
import dev.hotgraph.v1.GetGraphResponse;
import dev.hotgraph.v1.GraphServiceGrpc;
import dev.hotgraph.v1.InferenceServiceGrpc;
import dev.hotgraph.v1.PinGraphRequest;
import dev.hotgraph.v1.PinGraphResponse;
import dev.hotgraph.v1.SamplingParams;
import dev.hotgraph.v1.Started;
import dev.hotgraph.v1.Tokens;
import dev.hotgraph.v1.UnpinGraphRequest;
import dev.hotgraph.v1.UnpinGraphResponse;
import dev.hotgraph.v1.WatchGraphsRequest;
import dev.hotgraph.v1.WatchGraphsResponse;
import io.grpc.BindableService;
import io.grpc.Grpc;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.function.Executable;

/** The client against a server in this process that fails as it is told: retries, details, metadata, pauses. */
@Timeout(60)
class ClientTest {
    private static final GenerateRequest SEEDED = GenerateRequest.newBuilder()
            .setText("x")
            .setSampling(SamplingParams.newBuilder().setSeed(7))
            .build();
    private static final GenerateResponse STARTED = GenerateResponse.newBuilder()
            .setStarted(Started.newBuilder().setRequestId("r").setModel("m").setSeed(7))
            .build();

    private final List<Metadata> seen = new CopyOnWriteArrayList<>(); // the headers of each call
    private final List<AutoCloseable> opened = new ArrayList<>();

    @AfterEach
    void closeAll() throws Exception {
        for (AutoCloseable each : opened) {
            each.close();
        }
    }

    private Server serve(int port, BindableService service) throws IOException {
        Server server = Grpc.newServerBuilderForPort(port, InsecureServerCredentials.create())
                .addService(service)
                .intercept(new ServerInterceptor() {
                    @Override
                    public <Q, R> ServerCall.Listener<Q> interceptCall(
                            ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
                        seen.add(headers);
                        return next.startCall(call, headers);
                    }
                })
                .build()
                .start();
        opened.add(0, server::shutdownNow); // after the clients
        return server;
    }

    private HotgraphClient.Builder clientOf(BindableService service) throws IOException {
        return HotgraphClient.builder("127.0.0.1:" + serve(0, service).getPort());
    }

    private HotgraphClient open(HotgraphClient.Builder builder) {
        HotgraphClient client = builder.build();
        opened.add(0, client);
        return client;
    }

    private static void assertCode(Code code, Executable call) {
        assertEquals(
                code,
                assertThrows(StatusRuntimeException.class, call).getStatus().getCode());
    }

    private static GenerateResponse token(int id) {
        return GenerateResponse.newBuilder()
                .setTokens(Tokens.newBuilder().addTokenIds(id).setText("t" + id))
                .build();
    }

    /** Graphs whose calls fail so and so often before they answer. */
    private static final class FailingGraphs extends GraphServiceGrpc.GraphServiceImplBase {
        final Map<String, Integer> numCalls = new HashMap<>();

        private synchronized <T> void answer(String name, Code code, int numFailures, T answer, StreamObserver<T> to) {
            if (numCalls.merge(name, 1, Integer::sum) <= numFailures) {
                to.onError(code.toStatus().withDescription("gone").asRuntimeException());
                return;
            }
            to.onNext(answer);
            to.onCompleted();
        }

        @Override
        public void getGraph(GetGraphRequest request, StreamObserver<GetGraphResponse> to) {
            answer("get", Code.UNAVAILABLE, 2, GetGraphResponse.getDefaultInstance(), to);
        }

        @Override
        public void pinGraph(PinGraphRequest request, StreamObserver<PinGraphResponse> to) {
            answer("pin", Code.RESOURCE_EXHAUSTED, 100, PinGraphResponse.getDefaultInstance(), to);
        }

        @Override
        public void unpinGraph(UnpinGraphRequest request, StreamObserver<UnpinGraphResponse> to) {
            answer("unpin", Code.INTERNAL, 1, UnpinGraphResponse.getDefaultInstance(), to);
        }

        @Override
        public void evictGraph(EvictGraphRequest request, StreamObserver<EvictGraphResponse> to) {
            answer("evict", Code.UNAVAILABLE, 1, EvictGraphResponse.getDefaultInstance(), to);
        }

        @Override
        public void watchGraphs(WatchGraphsRequest request, StreamObserver<WatchGraphsResponse> to) {
            to.onNext(WatchGraphsResponse.getDefaultInstance()); // and nothing more
        }
    }

    /** Calls that were not answered are tried again, but for EvictGraph and what is no passing failure. */
    @Test
    void unansweredCallsAreTriedAgain() throws Exception {
        FailingGraphs service = new FailingGraphs();
        var graphs = open(clientOf(service)).graphs();
        graphs.getGraph(GetGraphRequest.getDefaultInstance());
        assertCode(Code.RESOURCE_EXHAUSTED, () -> graphs.pinGraph(PinGraphRequest.getDefaultInstance()));
        assertCode(Code.INTERNAL, () -> graphs.unpinGraph(UnpinGraphRequest.getDefaultInstance()));
        assertCode(Code.UNAVAILABLE, () -> graphs.evictGraph(EvictGraphRequest.getDefaultInstance()));
        assertEquals(Map.of("get", 3, "pin", 4, "unpin", 1, "evict", 1), service.numCalls);
    }

    /** With one attempt nothing is tried again. */
    @Test
    void oneAttemptIsOne() throws Exception {
        FailingGraphs service = new FailingGraphs();
        var graphs = open(clientOf(service).maxAttempts(1)).graphs();
        assertCode(Code.UNAVAILABLE, () -> graphs.getGraph(GetGraphRequest.getDefaultInstance()));
        assertEquals(Map.of("get", 1), service.numCalls);
    }

    /** Metadata carries token, client id and session key, and details that cannot be read count as absent. */
    @Test
    void callsCarryWhatTheClientWasTold() throws Exception {
        Metadata unreadable = new Metadata();
        unreadable.put(
                Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER), new byte[] {0x1a, 0x7f});
        BindableService service = new InferenceServiceGrpc.InferenceServiceImplBase() {
            @Override
            public void complete(CompleteRequest request, StreamObserver<CompleteResponse> to) {
                to.onError(Status.NOT_FOUND.withDescription("gone").asRuntimeException(unreadable));
            }

            @Override
            public void generate(GenerateRequest request, StreamObserver<GenerateResponse> to) {
                to.onError(Status.NOT_FOUND.asRuntimeException());
            }
        };
        AtomicInteger numTokens = new AtomicInteger();
        HotgraphClient client = open(
                clientOf(service).token(() -> "t" + numTokens.incrementAndGet()).clientId("me"));
        HotgraphException error = assertThrows(
                HotgraphException.class,
                () -> client.complete(SEEDED.toBuilder().setSessionKey("plain").build()));
        assertEquals("gone", error.description());
        assertEquals("NOT_FOUND: gone", error.getMessage());
        assertEquals("", error.reasonName());
        try (Generation generation =
                client.generate(SEEDED.toBuilder().setSessionKey("ключ").build())) {
            assertCode(Code.NOT_FOUND, generation::receive);
        }
        assertEquals(List.of("bearer t1", "bearer t2"), headers("authorization"));
        assertEquals(List.of("me", "me"), headers("x-client-id"));
        assertEquals("plain", headers("session_id").get(0));
        assertTrue(headers("session_id").get(1).matches("[0-9a-f]{64}"));
    }

    private List<String> headers(String name) {
        Metadata.Key<String> key = Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
        return seen.stream().map(headers -> headers.get(key)).toList();
    }

    /** A token that cannot be had fails the call, and nothing is sent. */
    @Test
    void noTokenNoCall() throws Exception {
        HotgraphClient client = open(clientOf(new FailingGraphs()).token(() -> {
            throw new IllegalStateException("no vault");
        }));
        HotgraphException error = assertThrows(
                HotgraphException.class, () -> client.generate(SEEDED).result());
        assertEquals(Code.UNAUTHENTICATED, error.code());
        assertTrue(error.getMessage().contains("no vault"), error.getMessage());
        assertTrue(seen.isEmpty());
    }

    /** Answers each generation with what is told for its number, from 1. */
    private abstract static class Streams extends InferenceServiceGrpc.InferenceServiceImplBase {
        final List<GenerateRequest> asked = new CopyOnWriteArrayList<>();

        @Override
        public void generate(GenerateRequest request, StreamObserver<GenerateResponse> to) {
            asked.add(request);
            answer(asked.size(), (ServerCallStreamObserver<GenerateResponse>) to);
        }

        abstract void answer(int number, ServerCallStreamObserver<GenerateResponse> to);
    }

    /** A stream whose tokens pause for too long is lost, and goes on over another connection. */
    @Test
    void pausesAreLosses() throws Exception {
        Streams service = new Streams() {
            @Override
            void answer(int number, ServerCallStreamObserver<GenerateResponse> to) {
                to.onNext(STARTED);
                to.onNext(token(number));
                if (number > 1) { // the first sends nothing more
                    to.onNext(GenerateResponse.newBuilder()
                            .setFinished(Finished.getDefaultInstance())
                            .build());
                    to.onCompleted();
                }
            }
        };
        HotgraphClient client = open(clientOf(service));
        ResumePolicy policy = ResumePolicy.DEFAULT
                .withIdle(Duration.ofMillis(200))
                .withBackoff(Duration.ofMillis(1), Duration.ofMillis(1));
        try (Generation generation = client.generate(SEEDED, GenerateOptions.DEFAULT.withResumePolicy(policy))) {
            CompleteResponse answer = generation.result();
            assertEquals("t1t2", answer.getChoices(0).getText());
            assertEquals(List.of(1, 2), answer.getChoices(0).getTokenIdsList());
            assertEquals(1, generation.numResumes());
        }
        assertEquals(0, service.asked.get(0).getResumeCount());
        assertEquals(List.of(1), service.asked.get(1).getResume(0).getTokenIdsList());
    }

    /** What arrived before the connection was cut is not lost with it. */
    @Test
    void whatArrivedIsKept() throws Exception {
        Streams service = new Streams() {
            @Override
            void answer(int number, ServerCallStreamObserver<GenerateResponse> to) {
                to.onNext(STARTED);
                IntStream.range(0, 50).forEach(id -> to.onNext(token(id)));
            }
        };
        Server server = serve(0, service);
        HotgraphClient client = open(HotgraphClient.builder("127.0.0.1:" + server.getPort()));
        try (Generation generation = client.generate(SEEDED, GenerateOptions.DEFAULT.withResume(Resume.NEVER))) {
            generation.receive();
            Thread.sleep(300); // all is here
            server.shutdownNow().awaitTermination();
            Thread.sleep(100); // the end too
            StreamLostException lost = assertThrows(StreamLostException.class, generation::result);
            assertEquals(50, lost.choices().get(0).getTokenIdsCount());
            assertEquals(7, lost.started().orElseThrow().getSeed());
            assertInstanceOf(HotgraphException.class, lost.getCause());
        }
    }

    /** A reader that stops makes the server stop. */
    @Test
    void slowReadersHoldTheServer() throws Exception {
        AtomicInteger numSent = new AtomicInteger();
        CountDownLatch isBlocked = new CountDownLatch(1);
        Streams service = new Streams() {
            @Override
            void answer(int number, ServerCallStreamObserver<GenerateResponse> to) {
                GenerateResponse large = GenerateResponse.newBuilder()
                        .setTokens(Tokens.newBuilder().addTokenIds(1).setText("x".repeat(10_000)))
                        .build();
                to.setOnReadyHandler(() -> {
                    while (to.isReady() && numSent.get() < 10_000) {
                        numSent.incrementAndGet();
                        to.onNext(large);
                    }
                    isBlocked.countDown();
                });
            }
        };
        HotgraphClient client = open(clientOf(service));
        try (Generation generation = client.generate(SEEDED)) {
            generation.receive();
            assertTrue(isBlocked.await(30, TimeUnit.SECONDS));
            Thread.sleep(500);
            assertTrue(numSent.get() < 5_000, numSent.get() + " of 10000 were sent to nobody");
        }
    }

    /** A stream that sends its first event and then nothing until it is left. */
    private static Streams silent(CountDownLatch isLeft) {
        return new Streams() {
            @Override
            void answer(int number, ServerCallStreamObserver<GenerateResponse> to) {
                to.setOnCancelHandler(isLeft::countDown);
                to.onNext(STARTED);
            }
        };
    }

    /** Any thread may cancel; the reader that waits is told, and so is the server. */
    @Test
    void anyThreadCancels() throws Exception {
        CountDownLatch isLeft = new CountDownLatch(1);
        HotgraphClient client = open(clientOf(silent(isLeft)));
        try (Generation generation = client.generate(SEEDED)) {
            generation.receive();
            CompletableFuture.delayedExecutor(100, TimeUnit.MILLISECONDS).execute(generation::cancel);
            HotgraphException error = assertThrows(HotgraphException.class, generation::receive);
            assertEquals(ErrorKind.CANCELLED, error.kind());
            assertEquals(error, assertThrows(HotgraphException.class, generation::result));
        }
        assertTrue(isLeft.await(30, TimeUnit.SECONDS));
    }

    /** A thread that is interrupted while it reads leaves the call, and stays interrupted. */
    @Test
    void interruptsCancel() throws Exception {
        CountDownLatch isLeft = new CountDownLatch(1);
        HotgraphClient client = open(clientOf(silent(isLeft)));
        try (Generation generation = client.generate(SEEDED)) {
            generation.receive();
            Thread.currentThread().interrupt();
            HotgraphException error = assertThrows(HotgraphException.class, generation::receive);
            assertTrue(Thread.interrupted());
            assertEquals(ErrorKind.CANCELLED, error.kind());
        }
        assertTrue(isLeft.await(30, TimeUnit.SECONDS));
    }

    /** Closing the client ends what runs as cancelled, and nothing begins after it. */
    @Test
    void closingEndsWhatRuns() throws Exception {
        HotgraphClient client = open(clientOf(silent(new CountDownLatch(1))));
        HotgraphClient other = open(clientOf(new FailingGraphs()));
        try (Generation generation = client.generate(SEEDED);
                Watch<?> watch = other.watchGraphs(0)) {
            generation.receive();
            watch.next();
            client.close();
            other.close();
            for (Executable read : List.<Executable>of(generation::receive, watch::next)) {
                HotgraphException error = assertThrows(HotgraphException.class, read);
                assertEquals("CANCELLED: the client was closed", error.getMessage());
            }
        }
        assertThrows(HotgraphException.class, () -> client.generate(SEEDED));
        assertThrows(HotgraphException.class, other::watchGraphs);
    }

    /** A daemon that comes back is found long before gRPC's own pauses end, which grow to two minutes. */
    @Test
    void restartedServersAreFoundSoon() throws Exception {
        Server first = serve(0, new FailingGraphs());
        int port = first.getPort();
        HotgraphClient client = open(HotgraphClient.builder("127.0.0.1:" + port).maxAttempts(1));
        var graphs = client.graphs();
        assertCode(Code.RESOURCE_EXHAUSTED, () -> graphs.pinGraph(PinGraphRequest.getDefaultInstance()));
        first.shutdownNow().awaitTermination();
        long endNanos = System.nanoTime() + TimeUnit.SECONDS.toNanos(6); // gRPC alone would wait some 4 s after these
        while (System.nanoTime() < endNanos) {
            assertCode(Code.UNAVAILABLE, () -> graphs.pinGraph(PinGraphRequest.getDefaultInstance()));
            Thread.sleep(100);
        }
        serve(port, new FailingGraphs());
        var patient = graphs.withWaitForReady().withDeadlineAfter(Duration.ofSeconds(3));
        assertCode(Code.RESOURCE_EXHAUSTED, () -> patient.pinGraph(PinGraphRequest.getDefaultInstance()));
    }
}
