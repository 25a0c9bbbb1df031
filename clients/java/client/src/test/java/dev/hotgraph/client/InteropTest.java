package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import com.google.gson.FieldNamingPolicy;
import com.google.gson.GsonBuilder;
import com.google.protobuf.ByteString;
import com.google.protobuf.Empty;
import dev.hotgraph.v1.Choice;
import dev.hotgraph.v1.CompleteResponse;
import dev.hotgraph.v1.DaemonState;
import dev.hotgraph.v1.DetokenizeRequest;
import dev.hotgraph.v1.DrainRequest;
import dev.hotgraph.v1.ErrorReason;
import dev.hotgraph.v1.EvictGraphRequest;
import dev.hotgraph.v1.FinishReason;
import dev.hotgraph.v1.Finished;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.GenerateResponse;
import dev.hotgraph.v1.GetGraphRequest;
import dev.hotgraph.v1.GetModelRequest;
import dev.hotgraph.v1.GetStatusRequest;
import dev.hotgraph.v1.Graph;
import dev.hotgraph.v1.GraphEvent;
import dev.hotgraph.v1.GraphEventType;
import dev.hotgraph.v1.GraphKey;
import dev.hotgraph.v1.GraphMode;
import dev.hotgraph.v1.GraphPolicy;
import dev.hotgraph.v1.GraphState;
import dev.hotgraph.v1.ListGraphsRequest;
import dev.hotgraph.v1.LogitBias;
import dev.hotgraph.v1.Model;
import dev.hotgraph.v1.OutputOptions;
import dev.hotgraph.v1.PinGraphRequest;
import dev.hotgraph.v1.PrewarmGraphsRequest;
import dev.hotgraph.v1.SamplerVariant;
import dev.hotgraph.v1.SamplingParams;
import dev.hotgraph.v1.StopConditions;
import dev.hotgraph.v1.TokenizeRequest;
import dev.hotgraph.v1.UnpinGraphRequest;
import io.grpc.CallOptions;
import io.grpc.Context;
import io.grpc.MethodDescriptor;
import io.grpc.Status.Code;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.protobuf.ProtoUtils;
import io.grpc.stub.ClientCalls;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Collection;
import java.util.Deque;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.function.Executable;

/** The cases of tests/interop/cases.json against real daemons with a real model. */
@Timeout(180)
class InteropTest {
    private static final Duration PATIENCE = Duration.ofSeconds(60); // for what takes a second on a quiet machine
    private static final ErrorReason NO_REASON = ErrorReason.ERROR_REASON_UNSPECIFIED;

    // One pangram with an emoji, all control characters but those that text cannot hold, and NUL.
    private static final String STRANGE = "Zwölf Boxkämpfer 漢字 😀 e\u0301 tab\t newline\n return\r bell\u0007"
            + " escape\u001b delete\u007f nul\u0000 end";

    /** The daemons that tests/interop started. */
    private record Daemons(
            String model,
            String unix,
            String tcp,
            String cut,
            String headersCut,
            Tls tls,
            Tls mutualTls,
            Handover handover) {}

    private record Tls(
            String target, String token, String rootCertificates, String certificateChain, String privateKey) {}

    private record Handover(String target, String drained) {}

    private static Daemons daemons;
    private static HotgraphClient client;

    private final List<HotgraphClient> opened = new ArrayList<>();

    @BeforeAll
    static void findDaemons() throws Exception {
        String path = System.getenv("HOTGRAPH_INTEROP");
        assumeTrue(path != null, "needs daemons: run test.sh under python -m tests.interop, or make test-client-java");
        daemons = new GsonBuilder()
                .setFieldNamingPolicy(FieldNamingPolicy.LOWER_CASE_WITH_UNDERSCORES)
                .create()
                .fromJson(Files.readString(Path.of(path)), Daemons.class);
        // Without gRPC's own retries, so that each refusal is seen at once.
        client = HotgraphClient.builder(daemons.unix()).maxAttempts(1).build();
    }

    @AfterAll
    static void closeClient() {
        if (client != null) {
            client.close();
        }
    }

    @AfterEach
    void closeOpened() {
        opened.forEach(HotgraphClient::close);
    }

    private HotgraphClient open(HotgraphClient.Builder builder) {
        HotgraphClient made = builder.build();
        opened.add(made);
        return made;
    }

    private static GenerateRequest.Builder greedy(String prompt, int maxTokens) {
        return GenerateRequest.newBuilder()
                .setText(prompt)
                .setMaxTokens(maxTokens)
                .setSampling(SamplingParams.newBuilder().setTemperature(0))
                .setStop(StopConditions.newBuilder().setIgnoreEos(true));
    }

    private static CompleteResponse result(HotgraphClient of, GenerateRequest.Builder request) {
        try (Generation generation = of.generate(request.build())) {
            return generation.result();
        }
    }

    /** The error that a call must fail with. */
    private static HotgraphException refusal(Code code, ErrorReason reason, Executable call) {
        HotgraphException error = HotgraphException.from(assertThrows(RuntimeException.class, call));
        assertEquals(code, error.code(), error::getMessage);
        assertEquals(reason, error.reason(), error::getMessage);
        return error;
    }

    /** Until no request holds a slot. */
    private static void waitFree() throws InterruptedException {
        Instant end = Instant.now().plus(PATIENCE);
        while (true) {
            var status = client.admin().getStatus(GetStatusRequest.getDefaultInstance());
            var scheduler = status.getScheduler();
            if (scheduler.getNumRunning() == 0
                    && scheduler.getNumWaiting() == 0
                    && status.getKvCache().getNumUsedBlocks() == 0) {
                return;
            }
            assertTrue(Instant.now().isBefore(end), () -> "slots are still held: " + status);
            Thread.sleep(5);
        }
    }

    private static List<Integer> ids(CompleteResponse answer) {
        return answer.getChoices(0).getTokenIdsList();
    }

    @Test
    @Case("unary_empty")
    void unaryEmpty() {
        var answer = client.admin().getStatus(GetStatusRequest.getDefaultInstance());
        assertEquals(DaemonState.DAEMON_STATE_SERVING, answer.getState());
        assertEquals(daemons.model(), answer.getModel());
    }

    @Test
    @Case("unary_large")
    void unaryLarge() {
        String text = "All that is gold does not glitter; é漢😀 ".repeat((1 << 20) / 45);
        var answer = client.inference()
                .tokenize(TokenizeRequest.newBuilder()
                        .setText(text)
                        .setAddSpecialTokens(false)
                        .build());
        byte[] joined = ByteString.copyFrom(answer.getPiecesList()).toByteArray();
        assertArrayEquals(text.getBytes(StandardCharsets.UTF_8), joined);
    }

    @Test
    @Case("request_too_large")
    void requestTooLarge() {
        var request = TokenizeRequest.newBuilder().setText("x".repeat(5 << 20)).build();
        HotgraphException error =
                refusal(Code.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE, () -> client.inference()
                        .tokenize(request));
        assertEquals(Integer.toString(4 << 20), error.metadata().get("limit_bytes"));
        assertEquals(ErrorKind.REQUEST, error.kind());
    }

    @Test
    @Case("text")
    void text() {
        var tokens = client.inference()
                .tokenize(TokenizeRequest.newBuilder()
                        .setText(STRANGE)
                        .setAddSpecialTokens(false)
                        .build());
        var back = client.inference()
                .detokenize(DetokenizeRequest.newBuilder()
                        .addAllTokenIds(tokens.getTokenIdsList())
                        .build());
        assertEquals(STRANGE, back.getText());
    }

    @Test
    @Case("stream")
    void stream() throws InterruptedException {
        List<GenerateResponse.EventCase> order = new ArrayList<>();
        StringBuilder text = new StringBuilder();
        int numTokens = 0;
        try (Generation generation = client.generate(greedy("The sky is", 12).build())) {
            for (GenerateResponse event : generation) {
                if (order.isEmpty() || order.get(order.size() - 1) != event.getEventCase()) {
                    order.add(event.getEventCase());
                }
                text.append(event.getTokens().getText());
                numTokens += event.getTokens().getTokenIdsCount();
            }
            assertEquals(
                    List.of(
                            GenerateResponse.EventCase.STARTED,
                            GenerateResponse.EventCase.TOKENS,
                            GenerateResponse.EventCase.FINISHED),
                    order);
            Finished finished = generation.finished().orElseThrow();
            assertEquals(12, numTokens);
            assertEquals(12, finished.getUsage().getCompletionTokens());
            assertEquals(generation.text(), text.toString());
            assertFalse(generation.text().isEmpty());
            assertTrue(Times.fromProto(finished.getTimings().getTotal()).toNanos() > 0);
            assertTrue(finished.getReceipt().getNumSteps() > 0);
            assertEquals(
                    FinishReason.FINISH_REASON_LENGTH, finished.getChoices(0).getReason());
        }
        waitFree();
    }

    @Test
    @Case("stream_is_unary")
    void streamIsUnary() {
        GenerateRequest request = GenerateRequest.newBuilder()
                .setText("Once upon a time")
                .setMaxTokens(16)
                .setNumChoices(2)
                .setSampling(SamplingParams.newBuilder().setSeed(-1).setTemperature(0.8f)) // -1: the largest there is
                .setOutput(OutputOptions.newBuilder().setLogprobs(2))
                .build();
        CompleteResponse streamed = result(client, request.toBuilder());
        CompleteResponse unary = client.complete(request, PATIENCE);
        assertEquals(2, unary.getChoicesCount());
        assertEquals("18446744073709551615", Long.toUnsignedString(unary.getSeed()));
        for (int i = 0; i < 2; i++) {
            Choice one = streamed.getChoices(i);
            Choice other = unary.getChoices(i);
            assertEquals(other.getTokenIdsList(), one.getTokenIdsList());
            assertEquals(other.getText(), one.getText());
            assertEquals(other.getTokenIdsCount(), other.getLogprobsCount());
            assertEquals(one.getTokenIdsCount(), one.getLogprobsCount());
        }
    }

    @Test
    @Case("chat")
    void chat() {
        GenerateRequest request = greedy("", 24)
                .clearStop()
                .setChat(Chat.of(Chat.system("Be brief."), Chat.user("What is the capital of France?")))
                .build();
        try (Generation generation = client.generate(request)) {
            String joined = String.join("", generation.texts());
            assertTrue(joined.contains("Paris"), joined);
            assertEquals(joined, generation.result().getChoices(0).getText());
        }
    }

    @Test
    @Case("slow_reader")
    void slowReader() throws InterruptedException {
        CompleteResponse fast = result(client, greedy("The sky is", 40));
        try (Generation generation = client.generate(greedy("The sky is", 40).build())) {
            int numEvents = 0;
            for (GenerateResponse event : generation) {
                if (event.hasTokens() && ++numEvents == 2) {
                    client.complete(greedy("others", 4).build());
                    Thread.sleep(1000);
                }
            }
            assertEquals(ids(fast), generation.choices().get(0).getTokenIdsList());
        }
    }

    @Test
    @Case("cancel_at_once")
    void cancelAtOnce() throws InterruptedException {
        Generation generation = client.generate(greedy("The sky is", 1000).build());
        generation.close();
        refusal(Code.CANCELLED, NO_REASON, generation::receive);
        waitFree();
    }

    @Test
    @Case("cancel_midway")
    void cancelMidway() throws Exception {
        GenerateRequest request = greedy("The sky is", 1000).build();
        try (Generation generation = client.generate(request)) {
            for (GenerateResponse event : generation) {
                if (event.hasTokens() && generation.choices().get(0).getTokenIdsCount() >= 3) {
                    var status = client.admin().getStatus(GetStatusRequest.getDefaultInstance());
                    assertEquals(1, status.getScheduler().getNumRunning());
                    break;
                }
            }
        }
        waitFree();

        Context.CancellableContext context = Context.current().withCancellation();
        try (Generation generation = context.call(() -> client.generate(request))) {
            HotgraphException error = refusal(Code.CANCELLED, NO_REASON, () -> {
                for (GenerateResponse event : generation) {
                    if (event.hasTokens()) {
                        context.cancel(null);
                    }
                }
            });
            assertEquals(ErrorKind.CANCELLED, error.kind());
        }
        waitFree();
    }

    @Test
    @Case("deadline")
    void deadline() throws Exception {
        GenerateRequest request = greedy("The sky is", 1000).build();
        Duration timeout = Duration.ofMillis(700);
        checkDeadline(() -> client.generate(request, GenerateOptions.DEFAULT.withTimeout(timeout)));
        var timer = Executors.newSingleThreadScheduledExecutor();
        try (Context.CancellableContext context =
                Context.current().withDeadlineAfter(timeout.toMillis(), TimeUnit.MILLISECONDS, timer)) {
            checkDeadline(() -> context.call(() -> client.generate(request)));
        } finally {
            timer.shutdownNow();
        }
    }

    private static void checkDeadline(Callable<Generation> start) throws Exception {
        Instant begin = Instant.now();
        try (Generation generation = start.call()) {
            HotgraphException error = assertThrows(HotgraphException.class, generation::result);
            assertEquals(ErrorKind.DEADLINE, error.kind(), error::getMessage);
            assertEquals(Code.DEADLINE_EXCEEDED, error.code());
        }
        Duration took = Duration.between(begin, Instant.now());
        assertTrue(took.toMillis() < 1700, "ended after " + took);
        waitFree();
    }

    @Test
    @Case("timeout_field")
    void timeoutField() throws InterruptedException {
        var request = greedy("The sky is", 1000).setTimeout(Times.toProto(500_000_000));
        refusal(Code.DEADLINE_EXCEEDED, ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED, () -> result(client, request));
        waitFree();
    }

    @Test
    @Case("violations")
    void violations() {
        GenerateRequest request = GenerateRequest.newBuilder()
                .setRequestId("no spaces")
                .setText("")
                .setMaxTokens(0)
                .setNumChoices(17)
                .setSampling(SamplingParams.newBuilder()
                        .setTemperature(3)
                        .setTopP(0)
                        .setMinP(2)
                        .setRepetitionPenalty(0)
                        .setPresencePenalty(-3)
                        .setFrequencyPenalty(3)
                        .addLogitBias(LogitBias.newBuilder().setTokenId(1).setBias(101)))
                .setStop(StopConditions.newBuilder().addStrings(""))
                .setOutput(OutputOptions.newBuilder().setLogprobs(21))
                .setTimeout(Times.toProto(-1_000_000_000))
                .build();
        HotgraphException error = refusal(
                Code.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_INVALID_REQUEST, () -> client.complete(request));
        Set<String> fields = new TreeSet<>();
        for (HotgraphException.Violation violation : error.violations()) {
            assertTrue(fields.add(violation.field()), violation.field());
            assertFalse(violation.description().isEmpty(), violation.field());
        }
        assertEquals(
                Set.of(
                        "max_tokens",
                        "num_choices",
                        "output.logprobs",
                        "request_id",
                        "sampling.frequency_penalty",
                        "sampling.logit_bias[0].bias",
                        "sampling.min_p",
                        "sampling.presence_penalty",
                        "sampling.repetition_penalty",
                        "sampling.temperature",
                        "sampling.top_p",
                        "stop.strings[0]",
                        "text",
                        "timeout"),
                fields);
    }

    @Test
    @Case("status_message")
    void statusMessage() {
        String name = "naïve 😀\t\n\u007f%";
        HotgraphException error =
                refusal(Code.NOT_FOUND, ErrorReason.ERROR_REASON_MODEL_NOT_FOUND, () -> client.inference()
                        .getModel(GetModelRequest.newBuilder().setName(name).build()));
        assertEquals(name, error.resource().orElseThrow().name());
        assertTrue(error.description().contains("naïve 😀"), error::getMessage);
    }

    @Test
    @Case("not_found")
    void notFound() {
        HotgraphException error =
                refusal(Code.NOT_FOUND, ErrorReason.ERROR_REASON_GRAPH_NOT_FOUND, () -> client.graphs()
                        .getGraph(GetGraphRequest.newBuilder()
                                .setName("graphs/none")
                                .build()));
        assertEquals(
                new HotgraphException.Resource("hotgraph.v1.Graph", "graphs/none"),
                error.resource().orElseThrow());
    }

    @Test
    @Case("retry_info")
    void retryInfo() {
        // What another test captured goes, so that there is something to wait for.
        var ready = ListGraphsRequest.newBuilder().addStates(GraphState.GRAPH_STATE_READY);
        for (Graph graph : client.allGraphs(ready.build())) {
            client.graphs()
                    .evictGraph(EvictGraphRequest.newBuilder()
                            .setName(graph.getName())
                            .build());
        }
        var request = greedy("The sky is", 4)
                .setNumChoices(7)
                .setSampling(SamplingParams.newBuilder().setTopK(5).setTemperature(1))
                .setGraphPolicy(GraphPolicy.newBuilder().setMode(GraphMode.GRAPH_MODE_REQUIRE));
        HotgraphException error =
                refusal(Code.UNAVAILABLE, ErrorReason.ERROR_REASON_GRAPH_NOT_READY, () -> result(client, request));
        assertTrue(error.retryAfter().orElseThrow().toNanos() > 0);
        assertTrue(error.isRetryable());
    }

    @Test
    @Case("unimplemented")
    void unimplemented() {
        for (String method : List.of("hotgraph.v1.InferenceService/Dream", "hotgraph.v1.DreamService/Dream")) {
            var marshaller = ProtoUtils.marshaller(Empty.getDefaultInstance());
            var descriptor = MethodDescriptor.newBuilder(marshaller, marshaller)
                    .setType(MethodDescriptor.MethodType.UNARY)
                    .setFullMethodName(method)
                    .build();
            refusal(
                    Code.UNIMPLEMENTED,
                    NO_REASON,
                    () -> ClientCalls.blockingUnaryCall(
                            client.channel(), descriptor, CallOptions.DEFAULT, Empty.getDefaultInstance()));
        }
    }

    @Test
    @Case("client_id")
    void clientId() {
        HotgraphClient named = open(HotgraphClient.builder(daemons.unix()).clientId("interop-java"));
        named.complete(greedy("hello", 1).build());
        boolean isFound = false;
        for (var other : client.allClients()) {
            isFound |= other.getName().equals("clients/interop-java")
                    && other.getUserAgent().contains("hotgraph-java/")
                    && other.getNumRequests() > 0;
        }
        assertTrue(isFound, "ListClients does not know the caller");
    }

    /** At least two, of which the first is ready. */
    private static List<Graph> prewarmed() {
        var request = PrewarmGraphsRequest.newBuilder().setWait(Times.toProto(TimeUnit.SECONDS.toNanos(30)));
        for (int rows = 1; rows <= 3; rows++) {
            request.addKeys(
                    GraphKey.newBuilder().setTokens(4).setRows(rows).setSampler(SamplerVariant.SAMPLER_VARIANT_GREEDY));
        }
        List<Graph> graphs = client.graphs().prewarmGraphs(request.build()).getGraphsList();
        assertTrue(graphs.size() >= 2, "too few buckets for a list of pages");
        assertEquals(GraphState.GRAPH_STATE_READY, graphs.get(0).getState());
        return graphs;
    }

    @Test
    @Case("pages")
    void pages() {
        prewarmed();
        List<String> names = new ArrayList<>();
        for (Graph graph :
                client.allGraphs(ListGraphsRequest.newBuilder().setPageSize(1).build())) {
            names.add(graph.getName());
        }
        var whole = client.graphs().listGraphs(ListGraphsRequest.getDefaultInstance());
        assertEquals(whole.getTotalSize(), names.size());
        assertEquals(names.size(), Set.copyOf(names).size());
        for (Model model : client.allModels()) {
            assertEquals(daemons.model(), model.getId());
        }
    }

    @Test
    @Case("graphs")
    void graphs() {
        Graph ready = prewarmed().get(0);
        var graphs = client.graphs().withDeadlineAfter(PATIENCE);
        var got = graphs.getGraph(
                GetGraphRequest.newBuilder().setName(ready.getName()).build());
        assertEquals(ready.getKey(), got.getGraph().getKey());
        var pinned = graphs.pinGraph(
                PinGraphRequest.newBuilder().setName(ready.getName()).build());
        long expireSeconds = pinned.getGraph().getPin().getExpireTime().getSeconds();
        assertTrue(expireSeconds > Instant.now().getEpochSecond(), pinned::toString);
        graphs.unpinGraph(
                UnpinGraphRequest.newBuilder().setName(ready.getName()).build());
        Deque<GraphEventType> wanted = new ArrayDeque<>(List.of(
                GraphEventType.GRAPH_EVENT_TYPE_PLANNED,
                GraphEventType.GRAPH_EVENT_TYPE_PUBLISHED,
                GraphEventType.GRAPH_EVENT_TYPE_PINNED,
                GraphEventType.GRAPH_EVENT_TYPE_UNPINNED));
        long sequence = 0;
        try (Watch<GraphEvent> watch = client.watchGraphs(0)) {
            while (!wanted.isEmpty()) {
                GraphEvent event = watch.next();
                assertTrue(event.getSequence() > sequence, event.getSequence() + " after " + sequence);
                sequence = event.getSequence();
                if (event.getGraph().getName().equals(ready.getName()) && event.getType() == wanted.peek()) {
                    wanted.remove();
                }
            }
        }
    }

    @Test
    @Case("health")
    void health() {
        var answer = client.health().check(HealthCheckRequest.getDefaultInstance());
        assertEquals(ServingStatus.SERVING, answer.getStatus());
        try (Watch<ServingStatus> watch = client.watchHealth("hotgraph.v1.InferenceService")) {
            assertEquals(ServingStatus.SERVING, watch.next());
        }
        refusal(Code.NOT_FOUND, ErrorReason.ERROR_REASON_SERVICE_NOT_FOUND, () -> client.health()
                .check(HealthCheckRequest.newBuilder().setService("none").build()));
    }

    /** A unary call and a stream. */
    private void check(HotgraphClient.Builder builder) {
        HotgraphClient made = open(builder);
        assertEquals(ids(made.complete(greedy("hello", 2).build())), ids(result(made, greedy("hello", 2))));
    }

    private void fails(HotgraphClient.Builder builder, Code code, ErrorReason reason) {
        HotgraphClient made = open(builder);
        refusal(code, reason, () -> made.complete(greedy("hello", 1).build(), PATIENCE));
    }

    @Test
    @Case("tcp")
    void tcp() {
        check(HotgraphClient.builder(daemons.tcp()));
        check(HotgraphClient.builder("ipv4:127.0.0.1:1," + daemons.tcp())); // nobody listens at the first address
    }

    private static HotgraphClient.Builder plain() {
        return HotgraphClient.builder(daemons.tls().target());
    }

    private static HotgraphClient.Builder encrypted() throws Exception {
        return plain().tls(Path.of(daemons.tls().rootCertificates()));
    }

    @Test
    @Case("tls")
    void tls() throws Exception {
        String token = daemons.tls().token();
        check(encrypted().token(token));
        fails(plain().tls().token(token).maxAttempts(1), Code.UNAVAILABLE, NO_REASON);
        fails(plain().token(token).maxAttempts(1), Code.UNAVAILABLE, NO_REASON);
    }

    @Test
    @Case("token")
    void token() throws Exception {
        for (HotgraphClient.Builder wrong : List.of(encrypted().token("wrong"), encrypted())) {
            fails(wrong, Code.UNAUTHENTICATED, ErrorReason.ERROR_REASON_UNAUTHENTICATED);
        }
        check(encrypted().token(daemons.tls().token()));
    }

    @Test
    @Case("mutual_tls")
    void mutualTls() throws Exception {
        Tls mutual = daemons.mutualTls();
        Path roots = Path.of(mutual.rootCertificates());
        check(HotgraphClient.builder(mutual.target())
                .tls(roots, Path.of(mutual.certificateChain()), Path.of(mutual.privateKey())));
        fails(HotgraphClient.builder(mutual.target()).tls(roots).maxAttempts(1), Code.UNAVAILABLE, NO_REASON);
    }

    private static GenerateRequest.Builder seeded() {
        return greedy("Once upon a time", 64)
                .setSampling(SamplingParams.newBuilder().setSeed(7).setTemperature(0.9f));
    }

    private static void assertNoSeam(CompleteResponse whole, Generation generation) {
        CompleteResponse answer = generation.result();
        assertTrue(generation.numResumes() > 0, "the stream was not broken");
        assertEquals(ids(whole), ids(answer));
        assertEquals(whole.getChoices(0).getText(), answer.getChoices(0).getText());
        assertEquals(whole.getUsage().getCompletionTokens(), answer.getUsage().getCompletionTokens());
    }

    @Test
    @Case("cut_and_resume")
    void cutAndResume() throws InterruptedException {
        CompleteResponse whole = result(client, seeded());
        HotgraphClient cut = open(HotgraphClient.builder(daemons.cut()));
        var often = GenerateOptions.DEFAULT.withResumePolicy(ResumePolicy.DEFAULT.withMaxLosses(64));
        try (Generation generation = cut.generate(seeded().build(), often)) {
            assertNoSeam(whole, generation);
        }
        HotgraphClient other = open(HotgraphClient.builder(daemons.cut()));
        var never = GenerateOptions.DEFAULT.withResume(Resume.NEVER);
        try (Generation generation = other.generate(seeded().build(), never)) {
            StreamLostException lost = assertThrows(StreamLostException.class, generation::result);
            assertTrue(lost.choices().get(0).getTokenIdsCount() > 0);
            assertTrue(lost.started().isPresent());
        }
        waitFree();
    }

    @Test
    @Case("headers_cut")
    void headersCut() throws InterruptedException {
        CompleteResponse whole = result(client, seeded());
        HotgraphClient cut = open(HotgraphClient.builder(daemons.headersCut()));
        try (Generation generation = cut.generate(seeded().setRequestId("cut").build())) {
            CompleteResponse answer = generation.result();
            assertEquals("cut/resume-2", answer.getRequestId());
            assertEquals(0, generation.numResumes());
            assertEquals(ids(whole), ids(answer));
        }
        HotgraphClient other = open(HotgraphClient.builder(daemons.headersCut()));
        var never = GenerateOptions.DEFAULT.withResume(Resume.NEVER);
        try (Generation generation = other.generate(seeded().build(), never)) {
            refusal(Code.UNAVAILABLE, NO_REASON, generation::result);
        }
        GenerateRequest drawn = GenerateRequest.newBuilder()
                .setText("Once upon a time")
                .setMaxTokens(4)
                .setRequestId("drawn")
                .build();
        HotgraphClient third = open(HotgraphClient.builder(daemons.headersCut()));
        var once = GenerateOptions.DEFAULT.withResumePolicy(ResumePolicy.DEFAULT.withMaxLosses(1));
        try (Generation generation = third.generate(drawn, once)) {
            assertEquals("drawn/resume-1", generation.result().getRequestId());
        }
        waitFree();
    }

    @Test
    @Case("drain_and_resume")
    void drainAndResume() {
        CompleteResponse whole = result(client, seeded());
        HotgraphClient drained = open(HotgraphClient.builder(daemons.handover().drained()));
        HotgraphClient handedOver =
                open(HotgraphClient.builder(daemons.handover().target()));
        try (Generation generation = handedOver.generate(seeded().build())) {
            boolean isDrained = false;
            for (GenerateResponse event : generation) {
                if (event.hasTokens() && !isDrained) {
                    isDrained = true;
                    var answer = drained.admin()
                            .drain(DrainRequest.newBuilder()
                                    .setGrace(Times.toProto(300_000_000))
                                    .build());
                    assertEquals(DaemonState.DAEMON_STATE_DRAINING, answer.getState());
                    assertEquals(1, answer.getNumRequests());
                }
            }
            assertNoSeam(whole, generation);
        }
    }

    @Test
    @Case("soak")
    void soak() throws Exception {
        var request = DetokenizeRequest.newBuilder()
                .addTokenIds(504)
                .addTokenIds(6376)
                .build();
        ExecutorService threads = Executors.newFixedThreadPool(8);
        try {
            Collection<Callable<String>> calls = new ArrayList<>();
            for (int i = 0; i < 200; i++) {
                calls.add(() -> client.inference().detokenize(request).getText());
            }
            for (Future<String> text : threads.invokeAll(calls)) {
                assertFalse(text.get().isEmpty());
            }
        } finally {
            threads.shutdownNow();
        }
        for (int i = 0; i < 20; i++) {
            try (HotgraphClient one = HotgraphClient.builder(daemons.unix())
                    .maxAttempts(1)
                    .configure(channel -> channel.userAgent("soak"))
                    .build()) {
                assertFalse(one.inference().detokenize(request).getText().isEmpty());
            }
        }
    }
}
