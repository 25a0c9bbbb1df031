package dev.hotgraph.client;

import io.grpc.ConnectivityState;
import io.grpc.ManagedChannel;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * Finds a restarted daemon again soon. gRPC for Java pauses a second or more after a connection that failed, which
 * cannot be set, and every call fails meanwhile; this ends the pauses after 0.1 s, 0.16 s and so on up to 2 s, each
 * times 0.8 to 1.2 at random.
 */
final class Reconnector {
    private static final double FIRST_PAUSE_NANOS = 100e6;
    private static final double MAX_PAUSE_NANOS = 2e9;
    private static final double GROWTH = 1.6;
    private static final double JITTER = 0.2;

    private final ManagedChannel channel;
    private final ScheduledExecutorService timer;
    private double pauseNanos = FIRST_PAUSE_NANOS;
    private boolean isPausing;

    /** timer: whoever made it ends it, after the channel. */
    Reconnector(ManagedChannel channel, ScheduledExecutorService timer) {
        this.channel = channel;
        this.timer = timer;
    }

    /** From now until the channel is shut down. */
    synchronized void watch() {
        ConnectivityState state = channel.getState(false);
        switch (state) {
            case SHUTDOWN -> {
                return;
            }
            case READY -> pauseNanos = FIRST_PAUSE_NANOS;
            case TRANSIENT_FAILURE -> pause();
            case IDLE, CONNECTING -> {
                // Nothing to end.
            }
        }
        channel.notifyWhenStateChanged(state, this::watch);
    }

    private synchronized void pause() {
        if (isPausing) {
            return;
        }
        double factor = 1 + JITTER * ThreadLocalRandom.current().nextDouble(-1, 1);
        try {
            timer.schedule(this::connect, (long) (pauseNanos * factor), TimeUnit.NANOSECONDS);
        } catch (RejectedExecutionException closed) {
            return; // the client was closed meanwhile
        }
        isPausing = true;
        pauseNanos = Math.min(pauseNanos * GROWTH, MAX_PAUSE_NANOS);
    }

    private synchronized void connect() {
        isPausing = false;
        if (channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
            channel.resetConnectBackoff();
            pause(); // it may stay in this state while it tries
        }
    }
}
