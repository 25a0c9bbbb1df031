package dev.hotgraph.client;

import io.grpc.Status;
import java.util.HashSet;
import java.util.List;
import java.util.Set;

/** What ends every stream of a client when the client is closed. Threads share it. */
final class OpenCalls {
    static final String CLOSED = "the client was closed";

    private final Set<Runnable> ends = new HashSet<>();
    private boolean isClosed;

    /** Throws when the client was closed. */
    synchronized void add(Runnable end) {
        if (isClosed) {
            throw HotgraphException.of(Status.Code.CANCELLED, CLOSED);
        }
        ends.add(end);
    }

    synchronized void remove(Runnable end) {
        ends.remove(end);
    }

    void endAll() {
        List<Runnable> all;
        synchronized (this) {
            isClosed = true;
            all = List.copyOf(ends);
        }
        all.forEach(Runnable::run);
    }
}
