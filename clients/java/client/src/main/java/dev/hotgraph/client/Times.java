package dev.hotgraph.client;

import java.time.Duration;

/** Durations of Java and of protobuf, and nanoseconds as both. */
final class Times {
    private static final long NANOS_PER_SECOND = 1_000_000_000;

    private Times() {}

    static Duration fromProto(com.google.protobuf.Duration duration) {
        return Duration.ofSeconds(duration.getSeconds(), duration.getNanos());
    }

    static com.google.protobuf.Duration toProto(long nanos) {
        return com.google.protobuf.Duration.newBuilder()
                .setSeconds(nanos / NANOS_PER_SECOND)
                .setNanos((int) (nanos % NANOS_PER_SECOND))
                .build();
    }

    /** In nanoseconds; the longest there is, 292 years, for more. */
    static long nanosOf(Duration duration) {
        try {
            return duration.toNanos();
        } catch (ArithmeticException tooLong) {
            return duration.isNegative() ? Long.MIN_VALUE : Long.MAX_VALUE;
        }
    }
}
