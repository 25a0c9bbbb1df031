package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import dev.hotgraph.v1.ChoiceFinish;
import dev.hotgraph.v1.ErrorReason;
import dev.hotgraph.v1.FinishReason;
import dev.hotgraph.v1.Finished;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.GenerateResponse;
import dev.hotgraph.v1.ResumedChoice;
import dev.hotgraph.v1.SamplingParams;
import dev.hotgraph.v1.Started;
import dev.hotgraph.v1.Tokens;
import dev.hotgraph.v1.Usage;
import io.grpc.Metadata;
import io.grpc.Status.Code;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.OptionalLong;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.Test;

/** The rules of going on after a lost server, without any connection and with a clock that stands still. */
class ProgressTest {
    private static final long NOW_NANOS = 1_000;
    private static final GenerateRequest DRAWN = GenerateRequest.getDefaultInstance();
    private static final GenerateRequest SEEDED = GenerateRequest.newBuilder()
            .setSampling(SamplingParams.newBuilder().setSeed(7))
            .build();

    private static GenerateResponse started(long seed) {
        return GenerateResponse.newBuilder()
                .setStarted(Started.newBuilder()
                        .setRequestId("r")
                        .setModel("m")
                        .setPromptTokens(5)
                        .setSeed(seed))
                .build();
    }

    private static Tokens.Builder tokens(int index, Integer... ids) {
        return Tokens.newBuilder()
                .setChoiceIndex(index)
                .addAllTokenIds(Arrays.asList(ids))
                .setText("x".repeat(ids.length));
    }

    private static GenerateResponse event(Tokens.Builder tokens) {
        return GenerateResponse.newBuilder().setTokens(tokens).build();
    }

    private static GenerateResponse finished(int numTokens, ChoiceFinish... finishes) {
        return GenerateResponse.newBuilder()
                .setFinished(Finished.newBuilder()
                        .addAllChoices(Arrays.asList(finishes))
                        .setUsage(Usage.newBuilder().setPromptTokens(5).setCompletionTokens(numTokens)))
                .build();
    }

    private static ChoiceFinish stopped(int index) {
        return ChoiceFinish.newBuilder()
                .setChoiceIndex(index)
                .setReason(FinishReason.FINISH_REASON_STOP)
                .build();
    }

    private static HotgraphException bare(Code code) {
        return HotgraphException.of(code, "gone");
    }

    /** The daemon's own word. */
    private static HotgraphException told(Code code, String reason, Duration retryAfter) {
        Metadata trailers = StatusProto.toStatusRuntimeException(com.google.rpc.Status.newBuilder()
                        .setCode(code.value())
                        .addDetails(Any.pack(ErrorInfo.newBuilder()
                                .setDomain("hotgraph")
                                .setReason(reason)
                                .build()))
                        .addDetails(Any.pack(RetryInfo.newBuilder()
                                .setRetryDelay(Times.toProto(retryAfter.toNanos()))
                                .build()))
                        .build())
                .getTrailers();
        return HotgraphException.of(code.toStatus(), trailers);
    }

    /** One whose first connection sent these messages. */
    private static Progress begun(
            GenerateRequest request, Resume resume, OptionalLong deadlineNanos, GenerateResponse... messages) {
        Progress progress =
                new Progress(request, resume, ResumePolicy.DEFAULT, deadlineNanos, () -> NOW_NANOS, (low, high) -> low);
        assertSame(request, progress.open());
        for (GenerateResponse message : messages) {
            assertSame(message, progress.receive(message));
        }
        return progress;
    }

    private static Progress begun(GenerateRequest request, Resume resume, GenerateResponse... messages) {
        return begun(request, resume, OptionalLong.empty(), messages);
    }

    /** The next connection asks for what is missing, and what it tells joins with what came. */
    @Test
    void goesOnWithWhatItHas() {
        GenerateRequest request = SEEDED.toBuilder().setNumChoices(3).build();
        Progress progress = begun(
                request,
                Resume.REPEATABLE,
                started(7),
                event(tokens(0, 1, 2)),
                event(tokens(1, 3).setFinish(stopped(1))));
        Progress.Loss loss = progress.lose(bare(Code.UNAVAILABLE), true);
        assertTrue(loss.waitNanos() > 0);
        assertNull(loss.event());
        GenerateRequest again = progress.open();
        assertEquals("r/resume-1", again.getRequestId());
        assertEquals("m", again.getModel());
        assertEquals(7, again.getSampling().getSeed());
        assertEquals(
                List.of(
                        ResumedChoice.newBuilder()
                                .setIndex(0)
                                .addTokenIds(1)
                                .addTokenIds(2)
                                .build(),
                        ResumedChoice.newBuilder().setIndex(2).build()),
                again.getResumeList());
        assertNull(progress.receive(started(7)));
        assertEquals(1, progress.numResumes());
        Finished whole = progress.receive(finished(5, stopped(0), stopped(2))).getFinished();
        assertEquals(6, whole.getUsage().getCompletionTokens());
        assertEquals(3, whole.getChoicesCount());
        assertEquals(whole.getUsage(), progress.completion().getUsage());
    }

    /** A loss is what no server said in its own words. */
    @Test
    void tellsLossesFromRefusals() {
        assertFalse(Progress.isLoss(bare(Code.UNAVAILABLE), false, false), "refused before an answer");
        assertTrue(Progress.isLoss(bare(Code.UNAVAILABLE), false, true), "lost after the headers");
        assertFalse(Progress.isLoss(bare(Code.RESOURCE_EXHAUSTED), false, true), "a limit after the headers");
        assertTrue(Progress.isLoss(bare(Code.UNAVAILABLE), true, false), "lost after it");
        assertTrue(Progress.isLoss(bare(Code.INTERNAL), false, false), "a proxy's mistake");
        assertTrue(Progress.isLoss(bare(Code.CANCELLED), false, false), "cancelled by another");
        assertFalse(Progress.isLoss(bare(Code.DEADLINE_EXCEEDED), true, true), "a deadline");
        assertFalse(Progress.isLoss(bare(Code.INVALID_ARGUMENT), true, true), "a wrong request");
        HotgraphException draining = told(Code.UNAVAILABLE, "DRAINING", Duration.ZERO);
        assertTrue(Progress.isLoss(draining, true, false), "draining after an answer");
        assertFalse(Progress.isLoss(draining, false, true), "draining before");
        HotgraphException mistake = told(Code.INTERNAL, "INTERNAL", Duration.ZERO);
        assertFalse(Progress.isLoss(mistake, true, true), "the daemon's own mistake");
    }

    /** When nothing came but headers the request goes out as it was, for as many servers as the policy allows. */
    @Test
    void goesOnAsItWasAfterHeadersAlone() {
        GenerateRequest request = DRAWN.toBuilder().setRequestId("mine").build();
        HotgraphException gone = bare(Code.UNAVAILABLE);
        Progress progress = begun(request, Resume.REPEATABLE);
        for (int i = 1; i <= ResumePolicy.DEFAULT.maxLosses(); i++) {
            assertTrue(progress.lose(gone, true).waitNanos() > 0);
            assertEquals(request.toBuilder().setRequestId("mine/resume-" + i).build(), progress.open());
        }
        assertSame(gone, assertThrows(HotgraphException.class, () -> progress.lose(gone, true)));
        Progress never = begun(request, Resume.NEVER);
        assertSame(gone, assertThrows(HotgraphException.class, () -> never.lose(gone, true)));
        Progress again = begun(request, Resume.REPEATABLE);
        again.lose(gone, true);
        again.open();
        assertTrue(again.lose(gone, false).waitNanos() > 0, "a server that was lost before is waited for");
    }

    /** Whether it goes on depends on the seed, on what it was told, and on whether a token came. */
    @Test
    void goesOnOnlyWhenTheAnswerStaysTheSame() {
        GenerateResponse token = event(tokens(0, 1));
        assertNull(
                begun(DRAWN, Resume.ALWAYS, started(7), token).lose(null, true).event());
        assertNull(begun(SEEDED, Resume.REPEATABLE, started(7), token)
                .lose(null, true)
                .event());
        assertNull(begun(DRAWN, Resume.REPEATABLE, started(7)).lose(null, true).event());
        for (Progress progress : List.of(
                begun(DRAWN, Resume.REPEATABLE, started(7), token), begun(SEEDED, Resume.NEVER, started(7), token))) {
            StreamLostException lost = assertThrows(StreamLostException.class, () -> progress.lose(null, true));
            assertEquals(Code.UNAVAILABLE, lost.code());
            assertEquals(List.of(1), lost.choices().get(0).getTokenIdsList());
            assertEquals("r", lost.requestId());
            assertSame(lost, progress.error());
        }
    }

    /** No more servers are lost than the policy allows. */
    @Test
    void lossesAreBounded() {
        Progress progress = begun(SEEDED, Resume.ALWAYS, started(7), event(tokens(0, 1)));
        for (int i = 0; i < ResumePolicy.DEFAULT.maxLosses(); i++) {
            progress.lose(bare(Code.UNAVAILABLE), true);
            progress.open();
            progress.receive(started(7));
        }
        assertThrows(StreamLostException.class, () -> progress.lose(bare(Code.UNAVAILABLE), true));
    }

    /** No more tries in a row are made than the policy allows, after waits that grow to the longest. */
    @Test
    void attemptsAreBounded() {
        Progress progress = begun(SEEDED, Resume.ALWAYS, started(7), event(tokens(0, 1)));
        long lastNanos = 0;
        for (int i = 0; i < ResumePolicy.DEFAULT.maxAttempts(); i++) {
            long waitNanos = progress.lose(bare(Code.UNAVAILABLE), false).waitNanos();
            assertTrue(waitNanos >= lastNanos, waitNanos + " after " + lastNanos);
            assertTrue(waitNanos <= ResumePolicy.DEFAULT.maxBackoff().toNanos());
            lastNanos = waitNanos;
            progress.open();
        }
        assertThrows(StreamLostException.class, () -> progress.lose(bare(Code.UNAVAILABLE), true));
    }

    /** It waits as long as the server says, and fails at once when that is after the deadline. */
    @Test
    void waitsAsLongAsToldAndNoLongerThanTheDeadline() {
        HotgraphException draining = told(Code.UNAVAILABLE, "DRAINING", Duration.ofSeconds(9));
        GenerateResponse token = event(tokens(0, 1));
        Progress patient = begun(SEEDED, Resume.ALWAYS, started(7), token);
        assertTrue(patient.lose(draining, true).waitNanos() >= TimeUnit.SECONDS.toNanos(9));
        OptionalLong deadlineNanos = OptionalLong.of(NOW_NANOS + TimeUnit.SECONDS.toNanos(5));
        Progress hurried = begun(SEEDED, Resume.ALWAYS, deadlineNanos, started(7), token);
        assertSame(draining, assertThrows(HotgraphException.class, () -> hurried.lose(draining, true)));
        Progress late = new Progress(
                SEEDED, Resume.ALWAYS, ResumePolicy.DEFAULT, OptionalLong.of(0), () -> NOW_NANOS, (low, high) -> low);
        assertEquals(
                ErrorKind.DEADLINE,
                assertThrows(HotgraphException.class, late::open).kind());
    }

    /** A server with another seed cannot go on with the answer. */
    @Test
    void anotherSeedIsNotTheSameAnswer() {
        Progress progress = begun(SEEDED, Resume.ALWAYS, started(7), event(tokens(0, 1)));
        progress.lose(null, true);
        progress.open();
        assertThrows(StreamLostException.class, () -> progress.receive(started(8)));
        assertTrue(progress.isEnded());
    }

    /** When every choice is whole, the missing last event is made here. */
    @Test
    void onlyFinishedWasLost() {
        Progress progress =
                begun(SEEDED, Resume.NEVER, started(7), event(tokens(0, 1, 2).setFinish(stopped(0))));
        Progress.Loss loss = progress.lose(bare(Code.UNAVAILABLE), true);
        assertNotNull(loss.event());
        assertEquals(2, loss.event().getFinished().getUsage().getCompletionTokens());
        assertTrue(progress.isEnded());
    }

    /** The id of a resumed request is not longer than a server takes. */
    @Test
    void longRequestIdsStayValid() {
        String id = "i".repeat(Progress.MAX_REQUEST_ID_LENGTH);
        Progress progress = begun(SEEDED.toBuilder().setRequestId(id).build(), Resume.ALWAYS);
        progress.lose(bare(Code.INTERNAL), true);
        String again = progress.open().getRequestId();
        assertEquals(Progress.MAX_REQUEST_ID_LENGTH, again.length());
        assertTrue(again.endsWith("/resume-1"), again);
    }

    /** A reason of the daemon's decides alone what can be done, whatever the code. */
    @Test
    void everyReasonHasAKind() {
        for (ErrorReason reason : ErrorReason.values()) {
            boolean isKnown = reason != ErrorReason.UNRECOGNIZED && reason != ErrorReason.ERROR_REASON_UNSPECIFIED;
            boolean isByReason = ErrorKind.of(reason, Code.UNKNOWN) == ErrorKind.of(reason, Code.UNAVAILABLE);
            assertEquals(isKnown, isByReason, reason.name());
        }
    }

    /** Times become protobuf's and come back. */
    @Test
    void timesAreProtobufs() {
        long nanos = TimeUnit.HOURS.toNanos(30) + 5;
        assertEquals(Duration.ofNanos(nanos), Times.fromProto(Times.toProto(nanos)));
        assertEquals(Long.MAX_VALUE, Times.nanosOf(Duration.ofSeconds(Long.MAX_VALUE)));
        assertEquals(Long.MIN_VALUE, Times.nanosOf(Duration.ofSeconds(Long.MIN_VALUE)));
    }
}
