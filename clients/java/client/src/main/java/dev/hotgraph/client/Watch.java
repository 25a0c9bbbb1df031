package dev.hotgraph.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.function.Function;

/**
 * What happens, as it happens. It waits for each event; errors are {@link HotgraphException}s. It ends by
 * {@link #close}, which any thread may call, and with the {@link io.grpc.Context} it was started in; open it in a
 * {@code try}. One thread reads.
 *
 * @param <T> what an event is
 */
public final class Watch<T> implements Iterable<T>, Iterator<T>, AutoCloseable {
    private final OpenCalls openCalls;
    private final Runnable endWithClient = () -> cancel(OpenCalls.CLOSED);
    private final Reader<T> reader;
    private volatile String why = ""; // it was ended here
    private T next;

    /** The next event, or null when the server ended the watch. Throws HotgraphException. */
    private interface Reader<T> {
        T read() throws InterruptedException;

        void cancel(String why);
    }

    /** Begins. Throws when the client was closed. */
    <Q, R> Watch(
            Channel channel, OpenCalls openCalls, MethodDescriptor<Q, R> method, Q request, Function<R, T> decode) {
        this.openCalls = openCalls;
        openCalls.add(endWithClient);
        MessageStream<R> stream = MessageStream.open(channel, method, CallOptions.DEFAULT, request);
        this.reader = new Reader<>() {
            @Override
            public T read() throws InterruptedException {
                MessageStream.Arrival<R> arrival = stream.read();
                if (arrival.error() != null) {
                    throw arrival.error();
                }
                return arrival.isEnd() ? null : decode.apply(arrival.message());
            }

            @Override
            public void cancel(String why) {
                stream.cancel(why);
            }
        };
    }

    @Override
    public boolean hasNext() {
        if (next == null) {
            next = read();
        }
        return next != null;
    }

    private T read() {
        try {
            return reader.read();
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
            cancel("the thread was interrupted");
            throw HotgraphException.of(Status.Code.CANCELLED, why);
        } catch (HotgraphException failure) {
            openCalls.remove(endWithClient);
            throw why.isEmpty() ? failure : HotgraphException.of(Status.Code.CANCELLED, why);
        }
    }

    @Override
    public T next() {
        if (!hasNext()) {
            throw new NoSuchElementException("the server ended the watch");
        }
        T event = next;
        next = null;
        return event;
    }

    /** The events that are still to come, once. */
    @Override
    public Iterator<T> iterator() {
        return this;
    }

    /** Ends it; a waiting reader gets an error of kind CANCELLED. */
    @Override
    public void close() {
        cancel("the watch was closed");
    }

    private void cancel(String reason) {
        if (why.isEmpty()) {
            why = reason;
        }
        openCalls.remove(endWithClient);
        reader.cancel(reason);
    }
}
