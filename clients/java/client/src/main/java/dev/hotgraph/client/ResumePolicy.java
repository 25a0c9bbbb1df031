package dev.hotgraph.client;

import java.time.Duration;
import java.util.Objects;

/**
 * How far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at random.
 *
 * @param maxLosses servers lost in the middle of one generation, or between their headers and its first event; it
 *     bounds what a request that kills servers can do
 * @param maxAttempts tries in a row to reach a server again, each of them with gRPC's own retries
 * @param firstBackoff the first wait
 * @param maxBackoff the longest wait
 * @param idle a stream whose tokens pause for longer counts as lost, for paths on which keepalive does not reach the
 *     server itself (a proxy answers it); zero: never
 */
public record ResumePolicy(int maxLosses, int maxAttempts, Duration firstBackoff, Duration maxBackoff, Duration idle) {
    /** What a client has that is told none. */
    public static final ResumePolicy DEFAULT =
            new ResumePolicy(3, 8, Duration.ofMillis(100), Duration.ofSeconds(5), Duration.ZERO);

    /** Throws IllegalArgumentException for a number or a time below zero. */
    public ResumePolicy {
        Objects.requireNonNull(firstBackoff, "firstBackoff");
        Objects.requireNonNull(maxBackoff, "maxBackoff");
        Objects.requireNonNull(idle, "idle");
        boolean isNegative = firstBackoff.isNegative() || maxBackoff.isNegative() || idle.isNegative();
        if (maxLosses < 0 || maxAttempts < 0 || isNegative) {
            throw new IllegalArgumentException("no part of a resume policy may be below zero");
        }
    }

    /** The same with another number of losses. */
    public ResumePolicy withMaxLosses(int value) {
        return new ResumePolicy(value, maxAttempts, firstBackoff, maxBackoff, idle);
    }

    /** The same with another number of attempts. */
    public ResumePolicy withMaxAttempts(int value) {
        return new ResumePolicy(maxLosses, value, firstBackoff, maxBackoff, idle);
    }

    /** The same with other waits. */
    public ResumePolicy withBackoff(Duration first, Duration longest) {
        return new ResumePolicy(maxLosses, maxAttempts, first, longest, idle);
    }

    /** The same with another longest pause between tokens. */
    public ResumePolicy withIdle(Duration value) {
        return new ResumePolicy(maxLosses, maxAttempts, firstBackoff, maxBackoff, value);
    }
}
