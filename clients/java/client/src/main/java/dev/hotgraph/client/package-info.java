/**
 * Calls a hotgraph daemon: one language model, kept hot, over gRPC.
 *
 * <p>A {@link dev.hotgraph.client.HotgraphClient} is one connection. It hands out the generated stubs of package
 * {@code dev.hotgraph.v1}; its other methods are what needs more than a stub: {@code generate} streams a generation and
 * goes on with it when its server is lost, {@code allGraphs} and its like read lists of many pages, {@code watchGraphs}
 * and {@code watchHealth} watch. Their errors are {@link dev.hotgraph.client.HotgraphException}s.
 */
package dev.hotgraph.client;
