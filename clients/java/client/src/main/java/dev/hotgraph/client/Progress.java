package dev.hotgraph.client;

import dev.hotgraph.v1.Choice;
import dev.hotgraph.v1.ChoiceFinish;
import dev.hotgraph.v1.CompleteResponse;
import dev.hotgraph.v1.Finished;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.GenerateResponse;
import dev.hotgraph.v1.Receipt;
import dev.hotgraph.v1.ResumedChoice;
import dev.hotgraph.v1.Started;
import dev.hotgraph.v1.Timings;
import dev.hotgraph.v1.TokenLogprobs;
import dev.hotgraph.v1.Tokens;
import dev.hotgraph.v1.Usage;
import io.grpc.Status;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.OptionalLong;
import java.util.Set;
import java.util.TreeMap;
import java.util.concurrent.ThreadLocalRandom;
import java.util.function.DoubleBinaryOperator;
import java.util.function.LongSupplier;

/**
 * One generation over as many connections as it takes: what came so far, and what to do when a connection ends. It
 * knows messages and time but no channel: {@link Generation} opens the calls and reads them. Not safe for use by
 * several threads.
 *
 * <p>A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status:
 * what stands between client and server changes the code. The exceptions are the daemon's own refusals, errors of the
 * request and deadlines. Before the server's headers gRPC's own retries apply ({@link ServiceConfig}), after them these
 * rules: the same request goes out again with the seed that Started told and, for each choice that has not ended, the
 * tokens that came. The server goes on from them and sends only what is new, so that ids and texts join without a seam.
 * A call whose connection breaks between the headers and the first event gRPC does not try again; nothing came of it,
 * so the request goes out as it was.
 */
final class Progress {
    static final int MAX_REQUEST_ID_LENGTH = 128;
    private static final int MAX_CHOICES = 1024; // more than a server takes; it says so

    enum State {
        NEW,
        /** A connection is there, or under way. */
        OPEN,
        /** Waits before the next connection. */
        LOST,
        /** Finished, failed or cancelled. */
        ENDED
    }

    private static final Map<State, Set<State>> TRANSITIONS = Map.of(
            State.NEW, Set.of(State.OPEN, State.ENDED),
            State.OPEN, Set.of(State.LOST, State.ENDED),
            State.LOST, Set.of(State.OPEN, State.ENDED),
            State.ENDED, Set.of());

    /** What a lost connection leads to: the wait before the next, or, when only it was missing, the last event. */
    record Loss(long waitNanos, GenerateResponse event) {}

    /** What came of one choice. Times are of its tokens, on the progress's clock. */
    private static final class Came {
        final List<Integer> tokenIds = new ArrayList<>();
        final StringBuilder text = new StringBuilder();
        final List<TokenLogprobs> logprobs = new ArrayList<>();
        ChoiceFinish finish;
        long firstNanos;
        long lastNanos;

        void add(Tokens tokens, long nowNanos) {
            if (tokens.getTokenIdsCount() > 0) {
                if (tokenIds.isEmpty()) {
                    firstNanos = nowNanos;
                }
                lastNanos = nowNanos;
            }
            tokenIds.addAll(tokens.getTokenIdsList());
            text.append(tokens.getText());
            logprobs.addAll(tokens.getLogprobsList());
            if (tokens.hasFinish()) {
                finish = tokens.getFinish();
            }
        }
    }

    private final GenerateRequest request;
    private final Resume resume;
    private final ResumePolicy policy;
    private final OptionalLong deadlineNanos; // on the clock
    private final LongSupplier clock;
    private final DoubleBinaryOperator uniform;
    private final long beganNanos;
    private final Map<Integer, Came> choices = new TreeMap<>(Integer::compareUnsigned);

    private State state = State.NEW;
    private Started started;
    private Finished finished;
    private HotgraphException error; // what it failed with
    private int numResumes;
    private int numConnections;
    private int numLosses;
    private int numFailedAttempts; // in a row, without an event
    private boolean isConnectionAnswered;
    private boolean hasConnectionTokens;
    private List<Integer> endedBefore = List.of(); // choices that were whole when this connection began

    Progress(GenerateRequest request, Resume resume, ResumePolicy policy, OptionalLong deadlineNanos) {
        this(request, resume, policy, deadlineNanos, System::nanoTime, Progress::drawn);
    }

    Progress(
            GenerateRequest request,
            Resume resume,
            ResumePolicy policy,
            OptionalLong deadlineNanos,
            LongSupplier clock,
            DoubleBinaryOperator uniform) {
        this.request = request;
        this.resume = resume;
        this.policy = policy;
        this.deadlineNanos = deadlineNanos;
        this.clock = clock;
        this.uniform = uniform;
        this.beganNanos = clock.getAsLong();
        long numChoices = request.hasNumChoices() ? Integer.toUnsignedLong(request.getNumChoices()) : 1;
        for (int index = 0; index < Math.min(numChoices, MAX_CHOICES); index++) {
            choices.put(index, new Came());
        }
    }

    private static double drawn(double low, double high) {
        return low + (high - low) * ThreadLocalRandom.current().nextDouble();
    }

    State state() {
        return state;
    }

    boolean isEnded() {
        return state == State.ENDED;
    }

    Started started() {
        return started;
    }

    Finished finished() {
        return finished;
    }

    HotgraphException error() {
        return error;
    }

    int numResumes() {
        return numResumes;
    }

    ResumePolicy policy() {
        return policy;
    }

    /** Whether the next event must come within policy.idle: tokens flow on this connection. */
    boolean isIdleBounded() {
        return !policy.idle().isZero() && hasConnectionTokens;
    }

    /** The text of the first choice so far. */
    String text() {
        Came first = choices.get(0);
        return first == null ? "" : first.text.toString();
    }

    /** Every choice as far as it came. */
    List<Choice> choices() {
        List<Choice> found = new ArrayList<>();
        choices.forEach((index, came) -> {
            Choice.Builder choice = Choice.newBuilder()
                    .setIndex(index)
                    .setText(came.text.toString())
                    .addAllTokenIds(came.tokenIds)
                    .addAllLogprobs(came.logprobs);
            if (came.finish != null) {
                choice.setFinish(came.finish);
            }
            found.add(choice.build());
        });
        return found;
    }

    /** The whole answer, once it has finished. */
    CompleteResponse completion() {
        CompleteResponse.Builder whole = CompleteResponse.newBuilder().addAllChoices(choices());
        if (started != null) {
            whole.setRequestId(started.getRequestId())
                    .setModel(started.getModel())
                    .setSeed(started.getSeed());
        }
        if (finished.hasUsage()) {
            whole.setUsage(finished.getUsage());
        }
        if (finished.hasTimings()) {
            whole.setTimings(finished.getTimings());
        }
        if (finished.hasReceipt()) {
            whole.setReceipt(finished.getReceipt());
        }
        return whole.build();
    }

    /** What the next connection sends: from new or lost to open. Throws when the time is over. */
    GenerateRequest open() {
        long leftNanos = 0;
        if (deadlineNanos.isPresent()) {
            leftNanos = deadlineNanos.getAsLong() - clock.getAsLong();
            if (leftNanos <= 0) {
                throw fail(HotgraphException.of(Status.Code.DEADLINE_EXCEEDED, "the deadline passed"));
            }
        }
        move(State.OPEN);
        isConnectionAnswered = false;
        hasConnectionTokens = false;
        numConnections++;
        endedBefore = choices.keySet().stream()
                .filter(index -> choices.get(index).finish != null)
                .toList();
        return numConnections == 1 ? request : again(leftNanos);
    }

    /** The request for a connection after the first. leftNanos: until the deadline, 0 when there is none. */
    private GenerateRequest again(long leftNanos) {
        GenerateRequest.Builder next = request.toBuilder();
        if (leftNanos > 0) {
            next.setTimeout(Times.toProto(leftNanos));
        }
        String base = started == null ? request.getRequestId() : started.getRequestId();
        if (!base.isEmpty()) {
            // The id itself may still be in flight on a server that is only half dead.
            String suffix = "/resume-" + (numConnections - 1);
            next.setRequestId(
                    base.substring(0, Math.min(base.length(), MAX_REQUEST_ID_LENGTH - suffix.length())) + suffix);
        }
        if (started != null) {
            next.setModel(started.getModel());
            next.getSamplingBuilder().setSeed(started.getSeed());
        }
        if (hasTokens()) {
            choices.forEach((index, came) -> {
                if (came.finish == null) {
                    next.addResume(ResumedChoice.newBuilder().setIndex(index).addAllTokenIds(came.tokenIds));
                }
            });
        }
        return next.build();
    }

    /**
     * Takes in what the connection sent. Returns the event for the caller, or null when there is none in it. Throws
     * when the server that goes on would not give the same tokens.
     */
    GenerateResponse receive(GenerateResponse message) {
        switch (message.getEventCase()) {
            case STARTED -> {
                isConnectionAnswered = true;
                numFailedAttempts = 0;
                return takeStarted(message);
            }
            case TOKENS -> {
                hasConnectionTokens = true;
                Tokens tokens = message.getTokens();
                came(tokens.getChoiceIndex()).add(tokens, clock.getAsLong());
            }
            case FINISHED -> {
                return finish(merge(message.getFinished()));
            }
            case EVENT_NOT_SET -> {
                // An event of a later contract: the caller may know it.
            }
        }
        return message;
    }

    private GenerateResponse takeStarted(GenerateResponse message) {
        Started now = message.getStarted();
        if (started == null) {
            started = now;
            return message;
        }
        boolean isSame = started.getModel().equals(now.getModel())
                && started.getSeed() == now.getSeed()
                && started.getPromptTokens() == now.getPromptTokens();
        if (!isSame) {
            throw fail(lost("the server that answered again has another model, prompt or seed", null));
        }
        numResumes++;
        return null;
    }

    /**
     * Takes in that the connection ended before Finished, with this error or, when it is null, with OK: from open to
     * lost, or to ended. Throws when the generation cannot go on: the daemon's own error as it is, any other loss after
     * the first event as a StreamLostException. hadHeaders: the server had begun to answer.
     */
    Loss lose(HotgraphException cause, boolean hadHeaders) {
        boolean isAnswered = started != null;
        if (cause != null && !isLoss(cause, isAnswered || numConnections > 1, hadHeaders)) {
            throw fail(cause);
        }
        if (isAnswered && areAllFinished()) {
            return new Loss(0, finish(finishedAlone()));
        }
        boolean isOwnWord = cause != null && !cause.reasonName().isEmpty() && cause.isRetryable();
        if (isConnectionAnswered || (!isAnswered && hadHeaders)) {
            numLosses++;
        } else {
            numFailedAttempts++;
        }
        long waitNanos = waitNanos(cause);
        boolean isInTime = deadlineNanos.isEmpty() || waitNanos < deadlineNanos.getAsLong() - clock.getAsLong();
        if (!mayResume() || !isInTime) {
            boolean isLost = cause == null || (isAnswered && !isOwnWord);
            throw fail(isLost ? lost("the server was lost in the middle of an answer", cause) : cause);
        }
        move(State.LOST);
        return new Loss(waitNanos, null);
    }

    /**
     * Whether a stream that ended with this error lost its server. isReached: a server was lost before, or told an
     * event. hadHeaders: the server had begun to answer.
     */
    static boolean isLoss(HotgraphException error, boolean isReached, boolean hadHeaders) {
        ErrorKind kind = error.kind();
        if (kind == ErrorKind.CANCELLED) {
            return true; // not by us: something between us and the server let go
        }
        if (!error.reasonName().isEmpty()) {
            return isReached && kind == ErrorKind.RETRYABLE;
        }
        if (error.code() == Status.Code.UNAVAILABLE) {
            return isReached || hadHeaders; // before the headers gRPC has tried again already
        }
        if (error.code() == Status.Code.RESOURCE_EXHAUSTED) {
            return isReached;
        }
        return kind != ErrorKind.REQUEST && kind != ErrorKind.DEADLINE;
    }

    private boolean mayResume() {
        if (numLosses > policy.maxLosses() || numFailedAttempts >= policy.maxAttempts()) {
            return false;
        }
        return switch (resume) {
            case ALWAYS -> true;
            case NEVER -> false;
            // Before any token there is nothing that a second try could contradict.
            case REPEATABLE -> isRepeatable(request) || !hasTokens();
        };
    }

    /** Whether the same request gives the same tokens again by itself: greedy, or with a seed. */
    private static boolean isRepeatable(GenerateRequest request) {
        var sampling = request.getSampling();
        return sampling.hasSeed() || (sampling.hasTemperature() && sampling.getTemperature() == 0);
    }

    private long waitNanos(HotgraphException cause) {
        double longest = Times.nanosOf(policy.maxBackoff());
        double backoff = Math.min(Times.nanosOf(policy.firstBackoff()) * Math.pow(2, numFailedAttempts), longest);
        double told = cause == null ? 0 : cause.retryAfter().map(Times::nanosOf).orElse(0L);
        // Never before the time told, and not all clients of one server at once.
        return (long) Math.max(backoff * uniform.applyAsDouble(0.5, 1.5), told * uniform.applyAsDouble(1, 1.25));
    }

    private StreamLostException lost(String message, HotgraphException cause) {
        Status.Code code = cause == null ? Status.Code.UNAVAILABLE : cause.code();
        String text = cause == null ? message : message + ": " + cause.description();
        String requestId = started == null ? "" : started.getRequestId();
        return new StreamLostException(HotgraphException.of(code, text, requestId), started, choices());
    }

    /** Finished as one unbroken call would have told it: choices and tokens of earlier connections count. */
    private Finished merge(Finished last) {
        for (ChoiceFinish finish : last.getChoicesList()) {
            came(finish.getChoiceIndex()).finish = finish;
        }
        Finished.Builder whole = last.toBuilder().clearChoices().addAllChoices(finishes());
        Usage.Builder usage = whole.getUsageBuilder();
        for (int index : endedBefore) {
            usage.setCompletionTokens(
                    usage.getCompletionTokens() + choices.get(index).tokenIds.size());
        }
        return whole.build();
    }

    /** Finished when every choice is whole and only that event was lost. Its timings are this side's. */
    private Finished finishedAlone() {
        int numTokens = 0;
        Came longest = new Came();
        long firstNanos = Long.MAX_VALUE; // since the beginning
        long lastNanos = 0;
        for (Came came : choices.values()) {
            numTokens += came.tokenIds.size();
            if (came.tokenIds.isEmpty()) {
                continue;
            }
            if (came.tokenIds.size() > longest.tokenIds.size()) {
                longest = came;
            }
            firstNanos = Math.min(firstNanos, came.firstNanos - beganNanos);
            lastNanos = Math.max(lastNanos, came.lastNanos - beganNanos);
        }
        Timings.Builder timings =
                Timings.newBuilder().setQueue(Times.toProto(0)).setTotal(Times.toProto(clock.getAsLong() - beganNanos));
        if (numTokens > 0) {
            timings.setPrefill(Times.toProto(firstNanos))
                    .setTimeToFirstToken(Times.toProto(firstNanos))
                    .setDecode(Times.toProto(lastNanos - firstNanos));
        }
        int numGaps = longest.tokenIds.size() - 1;
        if (numGaps > 0) {
            timings.setTimePerOutputToken(Times.toProto((longest.lastNanos - longest.firstNanos) / numGaps));
        }
        return Finished.newBuilder()
                .addAllChoices(finishes())
                .setUsage(Usage.newBuilder()
                        .setPromptTokens(started.getPromptTokens())
                        .setCompletionTokens(numTokens))
                .setTimings(timings)
                .setReceipt(Receipt.getDefaultInstance())
                .build();
    }

    private GenerateResponse finish(Finished whole) {
        finished = whole;
        move(State.ENDED);
        return GenerateResponse.newBuilder().setFinished(whole).build();
    }

    /** Ends it with this error, which it returns. */
    HotgraphException fail(HotgraphException failure) {
        error = failure;
        move(State.ENDED);
        return failure;
    }

    private void move(State next) {
        if (!TRANSITIONS.get(state).contains(next)) {
            throw new IllegalStateException("a generation cannot go from " + state + " to " + next);
        }
        state = next;
    }

    private Came came(int index) {
        return choices.computeIfAbsent(index, unknown -> new Came());
    }

    private boolean hasTokens() {
        return choices.values().stream().anyMatch(came -> !came.tokenIds.isEmpty());
    }

    private boolean areAllFinished() {
        return choices.values().stream().allMatch(came -> came.finish != null);
    }

    private List<ChoiceFinish> finishes() {
        return choices.values().stream()
                .map(came -> came.finish)
                .filter(Objects::nonNull)
                .toList();
    }
}
