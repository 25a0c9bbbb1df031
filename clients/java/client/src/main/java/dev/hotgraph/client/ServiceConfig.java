package dev.hotgraph.client;

import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * Tells gRPC which calls it tries again by itself: UNAVAILABLE and RESOURCE_EXHAUSTED, up to maxAttempts in all, as
 * long as nothing was answered. It waits as long as the server's push-back says, else 0.1 s, 0.2 s, 0.4 s with jitter.
 * Throttling: each failure takes one of 20 tokens and each success gives back a fifth of one; at half or less nothing
 * is tried again. EvictGraph is never tried again: a second time it would fail although the first one worked.
 */
final class ServiceConfig {
    static final int MAX_ATTEMPTS_LIMIT = 5; // gRPC takes no more

    private ServiceConfig() {}

    /** As gRPC wants it: JSON, of which every number is a double. */
    static Map<String, ?> of(int maxAttempts) {
        Map<String, Object> retried = new HashMap<>();
        retried.put("name", List.of(Map.of()));
        if (maxAttempts > 1) { // gRPC refuses a policy of one attempt
            retried.put(
                    "retryPolicy",
                    Map.of(
                            "maxAttempts",
                            (double) maxAttempts,
                            "initialBackoff",
                            "0.1s",
                            "maxBackoff",
                            "2s",
                            "backoffMultiplier",
                            2.0,
                            "retryableStatusCodes",
                            List.of("UNAVAILABLE", "RESOURCE_EXHAUSTED")));
        }
        Map<String, ?> notRetried =
                Map.of("name", List.of(Map.of("service", "hotgraph.v1.GraphService", "method", "EvictGraph")));
        return Map.of(
                "methodConfig", List.of(retried, notRetried),
                "retryThrottling", Map.of("maxTokens", 20.0, "tokenRatio", 0.2));
    }
}
