package dev.hotgraph.client;

/** When a generation goes on with an answer after a lost server. */
public enum Resume {
    /** Greedy requests and those with a seed, and any other before its first token. */
    REPEATABLE,
    /** Always, with the seed that the server drew. */
    ALWAYS,
    /** Never: what gRPC tries again by itself is all. */
    NEVER
}
