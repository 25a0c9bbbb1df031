package dev.hotgraph.client;

import dev.hotgraph.v1.Choice;
import dev.hotgraph.v1.CompleteResponse;
import dev.hotgraph.v1.Finished;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.GenerateResponse;
import dev.hotgraph.v1.InferenceServiceGrpc;
import dev.hotgraph.v1.Started;
import dev.hotgraph.v1.Tokens;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.Status;
import java.time.Duration;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Optional;
import java.util.OptionalLong;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * One generation under way: Started, Tokens and Finished, as they come. After a lost server it goes on over a new
 * connection without the reader noticing, as the client's {@link Resume} and {@link ResumePolicy} allow.
 *
 * <p>It ends when all is read, by {@link #close} or {@link #cancel}, by its timeout, when the thread that reads is
 * interrupted, and with the {@link Context} it was started in; one of them must happen, so open it in a {@code try}.
 * One thread reads and closes; any may cancel.
 */
public final class Generation implements Iterable<GenerateResponse>, AutoCloseable {
    private static final long SETTLE_NANOS = TimeUnit.SECONDS.toNanos(1); // for the status after the last event
    // Beyond the request's timeout, for the server to tell that it passed.
    private static final long GRACE_NANOS = TimeUnit.SECONDS.toNanos(2);

    private final Channel channel;
    private final CallOptions options;
    private final Deadline callDeadline; // or null
    private final OpenCalls openCalls;
    private final Runnable endWithClient = () -> cancel(OpenCalls.CLOSED);
    private final Context.CancellableContext context;
    private final CountDownLatch over = new CountDownLatch(1); // the context is

    private final Object lock = new Object(); // over progress and why
    private final Progress progress;
    private String why = ""; // it was cancelled here

    // Of the reader alone.
    private final Iterator<GenerateResponse> events = new Events();
    private MessageStream<GenerateResponse> stream;
    private long waitNanos;
    private boolean isSettled;

    /** Opens the first connection. Throws when the client was closed. */
    Generation(
            Channel channel,
            CallOptions options,
            OpenCalls openCalls,
            GenerateRequest request,
            Resume resume,
            ResumePolicy policy,
            Optional<Duration> timeout) {
        this.channel = channel;
        this.openCalls = openCalls;
        Deadline end = Context.current().getDeadline();
        Deadline callEnd = null; // the context's is kept by gRPC
        if (timeout.isPresent()) {
            callEnd = Deadline.after(Times.nanosOf(timeout.get()), TimeUnit.NANOSECONDS);
            end = sooner(end, callEnd);
        }
        long requestNanos = request.hasTimeout() ? Times.nanosOf(Times.fromProto(request.getTimeout())) : 0;
        if (requestNanos > 0) {
            Deadline told = Deadline.after(requestNanos, TimeUnit.NANOSECONDS);
            end = sooner(end, told);
            callEnd = sooner(callEnd, told.offset(GRACE_NANOS, TimeUnit.NANOSECONDS));
        }
        this.callDeadline = callEnd;
        this.options = callEnd == null ? options : options.withDeadline(callEnd);
        OptionalLong endNanos = end == null
                ? OptionalLong.empty()
                : OptionalLong.of(System.nanoTime() + end.timeRemaining(TimeUnit.NANOSECONDS));
        this.progress = new Progress(request, resume, policy, endNanos);
        this.context = Context.current().withCancellation();
        this.context.addListener(ended -> over.countDown(), Runnable::run);
        try {
            openCalls.add(endWithClient);
            open();
        } catch (HotgraphException error) {
            release();
            if (!progress.isEnded()) { // else the first read tells it
                throw error;
            }
        }
    }

    private static Deadline sooner(Deadline one, Deadline other) {
        return one == null ? other : one.minimum(other);
    }

    /** Begins the next connection. Throws when the time is over. */
    private void open() {
        GenerateRequest request;
        synchronized (lock) {
            request = progress.open();
        }
        Context before = context.attach();
        try {
            stream = MessageStream.open(channel, InferenceServiceGrpc.getGenerateMethod(), options, request);
        } finally {
            context.detach(before);
        }
    }

    /**
     * Waits for the next event; empty after Finished.
     *
     * @throws StreamLostException for a server that was lost in vain
     * @throws HotgraphException for any other end; reading again throws it again
     */
    public Optional<GenerateResponse> receive() {
        while (true) {
            Progress.State state;
            HotgraphException error;
            synchronized (lock) {
                state = progress.state();
                error = progress.error();
            }
            if (error != null) {
                throw error;
            }
            if (state == Progress.State.ENDED) {
                settle();
                return Optional.empty();
            }
            try {
                GenerateResponse event = state == Progress.State.LOST ? reopen() : advance();
                if (event != null) {
                    return Optional.of(event);
                }
            } catch (InterruptedException interrupted) {
                Thread.currentThread().interrupt();
                cancel("the thread was interrupted");
                throw ended();
            } catch (HotgraphException failure) {
                release();
                throw failure;
            }
        }
    }

    /** Waits and opens the next connection. */
    private GenerateResponse reopen() throws InterruptedException {
        if (over.await(waitNanos, TimeUnit.NANOSECONDS)) {
            throw ended();
        }
        open();
        return null;
    }

    /** Reads one message. Returns null when there is no event in it, and when the connection was lost. */
    private GenerateResponse advance() throws InterruptedException {
        long idleNanos;
        synchronized (lock) {
            idleNanos =
                    progress.isIdleBounded() ? Times.nanosOf(progress.policy().idle()) : 0;
        }
        MessageStream.Arrival<GenerateResponse> arrival = idleNanos > 0 ? stream.read(idleNanos) : stream.read();
        if (arrival == null) {
            String text = "no event for " + progress.policy().idle();
            stream.cancel(text);
            arrival = new MessageStream.Arrival<>(null, HotgraphException.of(Status.Code.UNAVAILABLE, text));
        }
        HotgraphException error = arrival.error();
        if (error != null && error.reasonName().isEmpty() && isOver()) {
            throw ended();
        }
        synchronized (lock) {
            if (!arrival.isEnd()) {
                return progress.receive(arrival.message());
            }
            Progress.Loss loss = progress.lose(error, stream.hasHeaders());
            waitNanos = loss.waitNanos();
            return loss.event();
        }
    }

    /** Whether this side ended it: the context or the deadline. */
    private boolean isOver() {
        return context.isCancelled() || (callDeadline != null && callDeadline.isExpired());
    }

    /** Ends the progress with why this side ended it, and returns that. */
    private HotgraphException ended() {
        boolean isTime = !context.isCancelled() || context.cancellationCause() instanceof TimeoutException;
        release();
        synchronized (lock) {
            if (why.isEmpty() && isTime) {
                return progress.fail(HotgraphException.of(Status.Code.DEADLINE_EXCEEDED, "the deadline passed"));
            }
            String text = why.isEmpty() ? "the context was cancelled" : why;
            return progress.fail(HotgraphException.of(Status.Code.CANCELLED, text));
        }
    }

    /** Lets a finished call end by itself: a cancel now would look to the server as if the caller had left. */
    private void settle() {
        if (isSettled) {
            return;
        }
        isSettled = true;
        long endNanos = System.nanoTime() + SETTLE_NANOS;
        try {
            MessageStream.Arrival<GenerateResponse> arrival;
            do {
                arrival = stream.read(endNanos - System.nanoTime()); // its status; everything is here already
            } while (arrival != null && !arrival.isEnd());
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
        release();
    }

    /**
     * Ends it if it has not ended; the server frees its place at the next step, and a waiting reader gets an error of
     * kind CANCELLED. Any thread may.
     */
    public void cancel() {
        cancel("the generation was cancelled");
    }

    private void cancel(String reason) {
        synchronized (lock) {
            if (why.isEmpty()) {
                why = reason;
            }
        }
        release();
    }

    /** Lets go of all that it holds; cancels the call that runs. */
    private void release() {
        openCalls.remove(endWithClient);
        context.cancel(null);
    }

    /** Ends it if it has not ended, as {@link #cancel}. For the thread that reads. */
    @Override
    public void close() {
        boolean isFinished;
        synchronized (lock) {
            isFinished = progress.finished() != null;
        }
        if (isFinished) {
            settle();
        }
        cancel();
    }

    /** The events that are still to come, once: all iterators are the same. */
    @Override
    public Iterator<GenerateResponse> iterator() {
        return events;
    }

    private final class Events implements Iterator<GenerateResponse> {
        private GenerateResponse next;

        @Override
        public boolean hasNext() {
            if (next == null) {
                next = receive().orElse(null);
            }
            return next != null;
        }

        @Override
        public GenerateResponse next() {
            if (!hasNext()) {
                throw new NoSuchElementException("the generation has finished");
            }
            GenerateResponse event = next;
            next = null;
            return event;
        }
    }

    /** The pieces of the first choice's text that are still to come. */
    public Iterable<String> texts() {
        return () -> new Iterator<>() {
            private String next = "";

            @Override
            public boolean hasNext() {
                while (next.isEmpty() && events.hasNext()) {
                    Tokens tokens = events.next().getTokens();
                    next = tokens.getChoiceIndex() == 0 ? tokens.getText() : "";
                }
                return !next.isEmpty();
            }

            @Override
            public String next() {
                if (!hasNext()) {
                    throw new NoSuchElementException("the generation has finished");
                }
                String text = next;
                next = "";
                return text;
            }
        };
    }

    /** Reads what is left: the whole answer, events already read included. */
    public CompleteResponse result() {
        while (receive().isPresent()) {
            // The progress keeps what comes.
        }
        synchronized (lock) {
            return progress.completion();
        }
    }

    /** The first event, once it came. */
    public Optional<Started> started() {
        synchronized (lock) {
            return Optional.ofNullable(progress.started());
        }
    }

    /** The last event, once it came. */
    public Optional<Finished> finished() {
        synchronized (lock) {
            return Optional.ofNullable(progress.finished());
        }
    }

    /** The text of the first choice so far. */
    public String text() {
        synchronized (lock) {
            return progress.text();
        }
    }

    /** Every choice as far as it came. */
    public List<Choice> choices() {
        synchronized (lock) {
            return progress.choices();
        }
    }

    /** How often another connection went on so far. */
    public int numResumes() {
        synchronized (lock) {
            return progress.numResumes();
        }
    }
}
