package dev.hotgraph.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;

/**
 * One server-streaming call, read by one thread that waits. One message is taken in ahead of the reader, so that a
 * reader that stops makes the server stop; gRPC hands over what had arrived before a connection failed all the same.
 */
final class MessageStream<R> {
    /** A message, or else the end: with this error or, when it is null, with OK. */
    record Arrival<R>(R message, HotgraphException error) {
        boolean isEnd() {
            return message == null;
        }
    }

    private final ClientCall<?, R> call;
    private final BlockingQueue<Arrival<R>> arrived = new LinkedBlockingQueue<>();
    private volatile boolean hasHeaders;
    private Arrival<R> end; // of the reader

    private MessageStream(ClientCall<?, R> call) {
        this.call = call;
    }

    static <Q, R> MessageStream<R> open(
            Channel channel, MethodDescriptor<Q, R> method, CallOptions options, Q request) {
        ClientCall<Q, R> call = channel.newCall(method, options);
        MessageStream<R> stream = new MessageStream<>(call);
        call.start(stream.listener(), new Metadata());
        call.request(1);
        call.sendMessage(request);
        call.halfClose();
        return stream;
    }

    private ClientCall.Listener<R> listener() {
        return new ClientCall.Listener<>() {
            @Override
            public void onHeaders(Metadata headers) {
                hasHeaders = true;
            }

            @Override
            public void onMessage(R message) {
                arrived.add(new Arrival<>(message, null));
            }

            @Override
            public void onClose(Status status, Metadata trailers) {
                arrived.add(new Arrival<>(null, status.isOk() ? null : HotgraphException.of(status, trailers)));
            }
        };
    }

    /** Whether the server began to answer. */
    boolean hasHeaders() {
        return hasHeaders;
    }

    /** Waits for the next message or the end, which may be read again. */
    Arrival<R> read() throws InterruptedException {
        return end == null ? taken(arrived.take()) : end;
    }

    /** The same, or null when nothing came within this time. */
    Arrival<R> read(long timeoutNanos) throws InterruptedException {
        return end == null ? taken(arrived.poll(timeoutNanos, TimeUnit.NANOSECONDS)) : end;
    }

    private Arrival<R> taken(Arrival<R> arrival) {
        if (arrival != null && arrival.isEnd()) {
            end = arrival;
        } else if (arrival != null) {
            call.request(1);
        }
        return arrival;
    }

    /** Ends the call, by any thread. The reader gets what had come, then CANCELLED. Does nothing when it has ended. */
    void cancel(String why) {
        call.cancel(why, null);
    }
}
