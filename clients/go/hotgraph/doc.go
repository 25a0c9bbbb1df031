// Package hotgraph calls a hotgraph daemon: one language model, kept hot, over gRPC.
//
// A [Client] is one connection. Its fields are the generated stubs of package hotgraphv1 (the folder v1 below this one),
// with errors typed as [*Error]; its methods are what needs more than a stub: [Client.Generate] streams a generation and
// goes on with it when its server is lost, [Client.AllGraphs] and its like read lists of many pages, [Client.WatchGraphs]
// and [Client.WatchHealth] watch. Deadlines and cancellation are those of the context.
package hotgraph
